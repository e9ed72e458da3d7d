"""The boxes under test: a pseudo-label table, or a JSON file ``{file name: [x0, y0, x1, y1]}``.

Shape letters:  D boxes of one image
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import Boxes, as_boxes
from pipeline.data.ground_truth import read_json
from pipeline.data.pseudo_labels import iterate_labels, read_manifest
from pipeline.errors import DataError
from pipeline.storage import Location

COLUMNS = ("uri", "width", "height", "status", "boxes", "scores", "labels")


@dataclass(frozen=True, eq=False)
class Detections:
    """All boxes of one image, in the order of the table.

    Attributes:
        boxes_D4: xyxy in pixels.
        scores_D: 1 where the table has none.
        labels_D: 1 where the table has none.
    """

    boxes_D4: Boxes
    scores_D: NDArray[np.float64]
    labels_D: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.boxes_D4)


def detections(
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float] | None = None,
    labels: Sequence[int] | None = None,
) -> Detections:
    """Boxes of one image; without scores or labels these are 1."""
    boxes_D4 = as_boxes(boxes)
    ones = [1] * len(boxes_D4)
    return Detections(
        boxes_D4,
        np.array(scores or ones, dtype=np.float64),
        np.array(labels or ones, dtype=np.int64),
    )


@dataclass(frozen=True)
class Prediction:
    """The boxes of one image.

    Attributes:
        name: URI of the image, or its file name.
        box: the best one, xyxy in pixels; None where the method found or could do nothing.
        status: as in the pseudo-label table; ``ok`` for every box of a JSON file.
        width: of the image the box was measured on; None where unknown.
        height: likewise.
        detections: all of its boxes.
    """

    name: str
    box: tuple[float, float, float, float] | None
    status: str = "ok"
    width: int | None = None
    height: int | None = None
    detections: Detections = field(default_factory=lambda: detections([]), compare=False)


def read_predictions(place: Location) -> Iterator[Prediction]:
    """One prediction per row of the table, or per entry of the JSON file.

    Of several boxes in a row the one with the highest score counts, the first among equals; CorLoc
    judges one box per image. A row whose status is not ``ok`` has no box.

    Raises:
        DataError: the place is missing, is neither of the two, or holds impossible boxes.
    """
    if place.required("--labels").kind() == "folder":
        return _from_table(place)
    if place.name.lower().endswith(".parquet"):
        raise DataError(
            f"--labels {place} is a single file: give the folder of the table, in which "
            "_MANIFEST.json lies"
        )
    return _from_json(read_json(place), place)


def describe_labels(place: Location) -> dict[str, Any]:
    """Where the labels come from: the path, and for a table also its run and what made it."""
    if place.kind() != "folder":
        return {"source": str(place)}
    manifest = read_manifest(place)
    first = next(iterate_labels(place, ["method"]), None)
    methods = [] if first is None else sorted(first["method"].unique().to_pylist())
    return {
        "source": str(place),
        "run_id": manifest.run_id,
        "method": ", ".join(methods) or None,
        "config_hash": manifest.config_hash,
        "weights_sha256": manifest.weights_sha256,
        "created_at": manifest.created_at,
        "versions": manifest.versions,
    }


def _from_table(folder: Location) -> Iterator[Prediction]:
    for table in iterate_labels(folder, COLUMNS):
        for row in table.to_pylist():
            found = _detections(row, folder) if row["status"] == "ok" else detections([])
            yield Prediction(
                name=row["uri"],
                box=_best_box(found),
                status=row["status"],
                width=row["width"],
                height=row["height"],
                detections=found,
            )


def _detections(row: dict[str, Any], folder: Location) -> Detections:
    boxes = row["boxes"] or []
    for name in ("scores", "labels"):
        values = row[name]
        if values and len(values) != len(boxes):
            raise DataError(
                f"{folder}: {row['uri']} has {len(boxes)} boxes, but {len(values)} {name}"
            )
        if not all(_is_number(value) and math.isfinite(value) for value in values or ()):
            raise DataError(f"{folder}: the {name} of {row['uri']} must be finite, got {values}")
    faults = [fault for box in boxes if (fault := _fault(box))]
    if faults:
        raise DataError(f"{folder}: the box of {row['uri']} {faults[0]}")
    return detections(boxes, row["scores"], row["labels"])


def _best_box(found: Detections) -> tuple[float, float, float, float] | None:
    if not len(found):
        return None
    # argmax() takes the first of equals.
    x0, y0, x1, y1 = found.boxes_D4[int(found.scores_D.argmax())].tolist()
    return (x0, y0, x1, y1)


def _from_json(content: Any, place: Location) -> Iterator[Prediction]:
    if not isinstance(content, dict) or "annotations" in content:
        found = "a COCO file" if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"--labels {place} must be a pseudo-label table (folder) or a JSON file "
            f"{{file name: [x0, y0, x1, y1]}}, got {found}"
        )
    faults = [(name, fault) for name, box in content.items() if (fault := _fault(box))]
    if faults:
        name, fault = faults[0]
        raise DataError(
            f"{place}: {len(faults)} of {len(content)} boxes are impossible; the first: "
            f"{name!r} {fault}. Leave images without a box out: they count as misses"
        )
    return (
        Prediction(name, (box[0], box[1], box[2], box[3]), detections=detections([box]))
        for name, box in content.items()
    )


def _fault(box: Any) -> str:
    """What is wrong with a box, as the end of a sentence; empty where nothing is."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"must be [x0, y0, x1, y1], got {str(box)[:80]}"
    if not all(map(math.isfinite, box)):
        return f"must be finite, got {box}"
    if box[2] <= box[0] or box[3] <= box[1]:
        return f"must have x0 < x1 and y0 < y1, got {box}"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
