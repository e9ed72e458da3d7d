"""A finished run's model, copied to where it is wanted, with an ONNX file beside it."""

from collections.abc import Iterator

from pipeline.models.exporting import load_classifier
from pipeline.models.onnx_export import export_onnx
from pipeline.runs.folder import RunFolder
from pipeline.storage import Location


def export_run(run: RunFolder, target: Location, *, onnx: bool) -> Iterator[str]:
    """Write the run's model to ``target``; yields a line for each thing written.

    Raises:
        StorageError: the run has no model, or ``target`` cannot be written.
        WeightsError: the ONNX file does not give the network's numbers.
    """
    for copy in run.copy_model(target):
        yield f"exported {copy}"
    if onnx:
        classifier = load_classifier(str(target))
        side = classifier.description.preprocessing.image_size
        check = export_onnx(classifier.module, target, side)
        yield (
            f"exported {check.file}: its logits differ by at most "
            f"{check.max_difference:.1e} from the network's"
        )
