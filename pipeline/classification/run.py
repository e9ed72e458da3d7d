"""One classifier's training run from its settings to its results, on this worker; knows no Ray.

The same function trains in this process, under torchrun and as a Ray Train worker: who trains
together is asked of torch (training/workers.py). Rank 0 alone writes; all read the same folder.
``export_run`` copies a finished run's model to where it is wanted, with an ONNX file beside it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from pipeline.classification.augment import CROP_PCT, crop_of
from pipeline.classification.confusion import Confusion, confusion_picture, count_confusion
from pipeline.classification.setup import ClassifierSetup, set_up
from pipeline.config import TrainClassifierJob
from pipeline.data.loader import BatchLoader
from pipeline.data.pseudo_labels import config_hash
from pipeline.errors import StorageError
from pipeline.models.exporting import (
    ClassifierDescription,
    Preprocessing,
    export_classifier,
    load_classifier,
)
from pipeline.models.features import NORMALIZATIONS
from pipeline.models.onnx_export import export_onnx
from pipeline.runs.curves import curves_picture
from pipeline.runs.folder import RunFolder
from pipeline.runs.life import (
    Outside,
    Telling,
    TrainingRun,
    summary_of,
)
from pipeline.runs.record import Epoch
from pipeline.storage import Location
from pipeline.tracking.tracker import Tracker
from pipeline.training.loop import AUTOCAST
from pipeline.training.workers import Workers


def train_classifier_here(
    job: TrainClassifierJob, folder: RunFolder, workers: Workers, outside: Outside
) -> dict[str, Any]:
    """Train on this worker, or tell what was trained; see ``TrainingRun.run``."""
    return _ClassifierRun(job, folder, workers, outside).run()


class _ClassifierRun(TrainingRun):
    """Validation, and the model of the best epoch at the end."""

    job: TrainClassifierJob
    setup: ClassifierSetup

    def set_up(self) -> ClassifierSetup:
        return set_up(self.job, self.workers)

    def tags(self) -> dict[str, str]:
        return {"patchseed.pair_key": config_hash(self.job.what_pairs())}

    def telling(self) -> Telling:
        shown = partial(_shown, floor_cells=_floor_cells(self.setup))
        return Telling(_described(self.setup), self.setup.data.describe(), shown)

    def look(self, epoch: int, numbers: dict[str, float]) -> float | None:
        terms = ("train/cross_entropy", "train/drloc_weighted")
        numbers["train/loss"] = sum(numbers[name] for name in terms if name in numbers)
        numbers["val/accuracy"] = self._measure(self.setup.validation).accuracy
        return numbers["val/accuracy"]

    def _measure(self, images: BatchLoader) -> Confusion:
        return measure(self.setup, images, self.workers, self.job.precision)

    def finish(self, tracker: Tracker) -> dict[str, Any]:
        """Test the last and the selected epoch, write the model, the pictures and the summary."""
        confusion = self._measure(self.setup.validation)
        metrics = {"val/accuracy_last": confusion.accuracy}
        if self.setup.test is not None:
            confusion = self._measure(self.setup.test)
            metrics["test/accuracy_last"] = confusion.accuracy
        best = self.folder.checkpoints.best()
        if best is None:
            raise StorageError(f"{self.folder.place} holds no checkpoint of this run any more")
        if best.epoch + 1 < self.setup.settings.num_epochs:
            self.setup.state.load_state_dict(best.state["loop"])
            confusion = self._measure(self.setup.test or self.setup.validation)
        metrics["val/accuracy_best"] = float(best.score or 0.0)
        metrics["selected_epoch"] = best.epoch + 1
        if self.setup.test is not None:
            metrics["test/accuracy_selected"] = confusion.accuracy
        summary = self._summary(metrics)
        if self.record is not None:
            self._write_results(summary, confusion, tracker)
        return summary

    def _summary(self, metrics: dict[str, float]) -> dict[str, Any]:
        weights, side = self.setup.weights, self.setup.image_size
        return {
            **summary_of(self.job, self.workers, metrics),
            "pair_key": config_hash(self.job.what_pairs()),
            "data": self.setup.data.describe(),
            "grids": self.setup.task.objective.classifier.grid_shapes((side, side)),
            "started_from": None if weights is None else weights.sha256,
        }

    def _write_results(
        self, summary: dict[str, Any], confusion: Confusion, tracker: Tracker
    ) -> None:
        assert self.record is not None
        model = self.folder.place.child("model")
        export_classifier(self.setup.evaluated, describe(self.job, self.setup, summary), model)
        figures = {
            "curves": curves_picture(self.record.history, _floor_cells(self.setup)),
            "confusion": confusion_picture(confusion, self.setup.data.classes),
        }
        self.publish(summary, figures, tracker)


@torch.inference_mode()
def measure(
    setup: ClassifierSetup, images: BatchLoader, workers: Workers, precision: str
) -> Confusion:
    """The confusion over all images of all workers, of the network that would be exported."""
    network = setup.evaluated
    was_training = network.training
    network.eval()
    num_classes = len(setup.data.classes)
    counts_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=workers.device)
    kind = AUTOCAST[precision]
    for batch in images:
        images_B3HW = batch.images_B3HW.to(workers.device, non_blocking=True)
        if setup.task.channels_last:
            images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
        with torch.autocast(workers.device.type, dtype=kind, enabled=kind is not None):
            predicted_B = network(images_B3HW).logits_BK.argmax(dim=1)
        true_B = batch.targets_B.to(workers.device, non_blocking=True)
        counts_KK += count_confusion(true_B, predicted_B, num_classes)
    network.train(was_training)
    # Once over the whole set: workers may have different numbers of batches.
    return Confusion(workers.total(counts_KK).cpu().numpy())


def _floor_cells(setup: ClassifierSetup) -> float | None:
    """The position error of the best constant guess, which a head that learns stays below."""
    drloc = setup.task.objective.drloc
    return None if drloc is None else drloc.floor_cells


def _shown(history: Sequence[Epoch], *, floor_cells: float | None) -> str:
    """The last epoch, for people."""
    numbers = history[-1]
    best = max(history, key=lambda one: (one["val/accuracy"], -one["epoch"]))
    parts = [f"loss {numbers['train/loss']:.3f}"]
    if "train/drloc" in numbers:
        parts.append(
            f"drloc {numbers['train/drloc']:.3f} (off by "
            f"{numbers['train/drloc_error_cells']:.2f} cells, a constant by {floor_cells:.2f})"
        )
    parts.append(f"val {numbers['val/accuracy']:.2%}")
    parts.append(f"best {best['val/accuracy']:.2%} (epoch {best['epoch']:.0f})")
    return " ".join(parts)


def _described(setup: ClassifierSetup) -> list[str]:
    """What is about to be trained on what, and against which floor."""
    data, drloc = setup.data, setup.task.objective.drloc
    num_weights = sum(one.numel() for one in setup.task.objective.classifier.parameters())
    side = setup.image_size
    grids = setup.task.objective.classifier.grid_shapes((side, side))
    shown = ", ".join(f"{height} x {width} x {depth}" for depth, height, width in grids)
    fingerprint = data.fingerprint
    lines = [
        f"{data.name}: {fingerprint.num_train:,} training, {fingerprint.num_validation:,} "
        f"validation and {fingerprint.num_test:,} test images of {len(data.classes)} classes; "
        f"the best epoch is chosen on the {data.selected_on} images",
        *data.notes,
        f"network: {num_weights:,} weights at {side} px, grid {shown}; "
        f"{setup.task.steps_per_epoch} step{'s' * (setup.task.steps_per_epoch > 1)} per epoch",
    ]
    if drloc is None:
        return [*lines, "DRLoc is off: this is the paired baseline"]
    return [*lines, f"DRLoc: a constant guess is off by {drloc.floor_cells:.3f} cells"]


def describe(
    job: TrainClassifierJob, setup: ClassifierSetup, summary: dict[str, Any]
) -> ClassifierDescription:
    """What an exported model says of itself."""
    augment, side = job.augment, setup.image_size
    mean, std = NORMALIZATIONS[augment.normalize]
    return ClassifierDescription(
        architecture=job.model.name,
        classes=setup.data.classes,
        preprocessing=Preprocessing(
            image_size=side,
            mean=mean,
            std=std,
            crop="whole" if crop_of(augment, side) == "pad" else "centre",
            crop_pct=CROP_PCT,
        ),
        image_size=side,
        patch_size=setup.patch_size,
        drop_path=job.model.drop_path,
        stages=job.drloc.stages,
        tap=job.model.tap,
        options=job.model.option_values(),
        metrics=summary["metrics"],
        made_by={name: value for name, value in summary.items() if name != "metrics"},
    )


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
