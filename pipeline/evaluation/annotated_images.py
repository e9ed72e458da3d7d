"""Images of a collection and what is annotated on them, matched by the names of their files."""

from pathlib import PurePosixPath

import pyarrow as pa

from pipeline.data.ground_truth import GroundTruth
from pipeline.data.lake import Collection
from pipeline.errors import DataError
from pipeline.evaluation.evaluate import read_ground_truth
from pipeline.storage import Location


def annotated_images(
    images: str, ground_truth: str, *, num_images: int | None
) -> tuple[pa.Table, list[GroundTruth]]:
    """The annotated images in the order of their URIs, ``num_images`` at most.

    Returns:
        Their rows, as ``Collection`` gives them, and the annotations of each row.

    Raises:
        DataError: no image of the collection is annotated, or the annotations cannot be read.
    """
    truths = {
        PurePosixPath(one.file_name).name: one
        for one in read_ground_truth(Location.parse(ground_truth))
    }
    inputs = pa.concat_tables(list(Collection(images).chunks()))
    named = [PurePosixPath(uri).name in truths for uri in inputs["uri"].to_pylist()]
    chosen = inputs.filter(pa.array(named, pa.bool_())).sort_by("uri").slice(0, num_images)
    if not chosen.num_rows:
        raise DataError(f"none of {inputs.num_rows} images of {images} is in {ground_truth}")
    return chosen, [truths[PurePosixPath(uri).name] for uri in chosen["uri"].to_pylist()]
