"""The boxes under test, and which annotated image each label belongs to.

Boxes are read from a pseudo-label table, or a JSON file ``{file name: [x0, y0, x1, y1]}``. Labels
are known by URI, annotations by a file name or its last part, so names are compared part by part
from the end. A Parquet of images gives URIs such as ``photos.parquet#17/name.jpg``: the ``#17``
ends a part, so nothing special is needed. To add a way of naming: give it a rank in ``_Names``.

Shape letters:  D boxes of one image
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import Boxes, as_boxes
from pipeline.data.ground_truth import GroundTruth, read_json
from pipeline.data.pseudo_labels import iterate_labels, read_manifest
from pipeline.errors import DataError
from pipeline.storage import Location

EVIDENCE = ("contrast", "agreement")
"""Columns of what scores rest on; a table may lack them, or have nulls there."""

COLUMNS = ("uri", "width", "height", "status", "boxes", "scores", "labels", *EVIDENCE)


@dataclass(frozen=True, eq=False)
class Detections:
    """All boxes of one image, in the order of the table.

    Attributes:
        boxes_D4: xyxy in pixels.
        scores_D: 1 where the table has none.
        labels_D: 1 where the table has none.
        evidence: what the scores rest on, by the names of ``EVIDENCE``: a float per box. What the
            table does not say of this image is absent.
    """

    boxes_D4: Boxes
    scores_D: NDArray[np.float64]
    labels_D: NDArray[np.int64]
    evidence: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.boxes_D4)


def detections(
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float] | None = None,
    labels: Sequence[int] | None = None,
    evidence: Mapping[str, Sequence[float]] | None = None,
) -> Detections:
    """Boxes of one image; without scores or labels these are 1."""
    boxes_D4 = as_boxes(boxes)
    ones = [1] * len(boxes_D4)
    return Detections(
        boxes_D4,
        np.array(scores or ones, dtype=np.float64),
        np.array(labels or ones, dtype=np.int64),
        {name: np.array(values, dtype=np.float64) for name, values in (evidence or {}).items()},
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
    for name in ("scores", "labels", *EVIDENCE):
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
    evidence = {name: row[name] for name in EVIDENCE if row[name]}
    return detections(boxes, row["scores"], row["labels"], evidence)


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


@dataclass(frozen=True)
class Matching:
    """The join.

    Attributes:
        predictions: one per annotated image, in the order given; None where there is no label.
        num_unmatched: labels whose image is not annotated.
    """

    predictions: list[Prediction | None]
    num_unmatched: int


@dataclass
class _Claim:
    """The label that has the best right to an image so far, and one with just the same right."""

    rank: int
    prediction: Prediction
    rival: str | None = None


def match(predictions: Iterable[Prediction], truths: Sequence[GroundTruth]) -> Matching:
    """Give every annotated image its label.

    A label belongs to the image whose file name is the longest suffix of the label's name, compared
    by whole parts: ``/data/val/1.jpg`` is ``val/1.jpg`` rather than ``1.jpg``. What finds nothing
    is tried without the extension, then by the annotation's other names, and last the other way
    round (the annotation has more folders than the label). An image goes to the label that found it
    earliest in this order.

    Raises:
        DataError: two labels have the same right to an image, or no label finds any.
    """
    names = _Names(truths)
    claims: dict[int, _Claim] = {}
    num_labels, example = 0, ""
    for prediction in predictions:
        num_labels += 1
        example = example or prediction.name
        found = names.find(prediction.name)
        if found is not None:
            _stake(claims, found, prediction)
    if not claims:
        raise DataError(_nothing_matches(example, truths))
    _refuse_rivals(claims, truths)
    held = [claims.get(index) for index in range(len(truths))]
    return Matching(
        [None if claim is None else claim.prediction for claim in held], num_labels - len(claims)
    )


def _stake(claims: dict[int, _Claim], found: tuple[int, int], prediction: Prediction) -> None:
    index, rank = found
    holder = claims.get(index)
    if holder is None or rank < holder.rank:
        claims[index] = _Claim(rank, prediction)
    elif rank == holder.rank:
        holder.rival = holder.rival or prediction.name


def _refuse_rivals(claims: dict[int, _Claim], truths: Sequence[GroundTruth]) -> None:
    rivals = [(index, claim) for index, claim in claims.items() if claim.rival is not None]
    if rivals:
        index, claim = rivals[0]
        raise DataError(
            f"{len(rivals)} annotated images have several labels; the first: "
            f"{truths[index].file_name} has {claim.prediction.name} and {claim.rival}. Put the "
            "folders that tell them apart into the ground truth's file names, or label fewer images"
        )


def _nothing_matches(example: str, truths: Sequence[GroundTruth]) -> str:
    if not example or not truths:
        return f"{'the ground truth' if example else '--labels'} holds no image"
    return (
        "no label belongs to an annotated image: labels are named like "
        f"{example}, the ground truth like {truths[0].file_name}"
    )


class _Names:
    """Names of annotated images -> their index, one table per rank."""

    def __init__(self, truths: Sequence[GroundTruth]) -> None:
        names = [_parts(truth.file_name) for truth in truths]
        aliases = [[_parts(alias) for alias in truth.aliases] for truth in truths]
        self._exact = _table([[name] for name in names])
        if len(self._exact) < len(truths):
            twice, _ = Counter(names).most_common(1)[0]
            raise DataError(f"the ground truth lists the image {'/'.join(twice)} twice")
        self._stems = _table([[name, _without_extension(name)] for name in names])
        self._aliases = _table([[*others, *map(_without_extension, others)] for others in aliases])
        self._shorter = _table([[name[i:] for i in range(1, len(name))] for name in names])
        # Longer suffixes of a label's name cannot be in any table.
        self._depth = max((len(name) for name in chain(names, *aliases)), default=0)

    def find(self, name: str) -> tuple[int, int] | None:
        """Index of the image that goes by this name and the rank at which it was found."""
        whole = _parts(name)
        tail = whole[-self._depth :]
        suffixes = [tail[i:] for i in range(len(tail))]
        stems = [_without_extension(suffix) for suffix in suffixes]
        tries = (
            (self._exact, suffixes),
            (self._stems, stems),
            (self._aliases, [*suffixes, *stems]),
            (self._shorter, [whole]),
        )
        hits = (
            (index, rank)
            for rank, (table, keys) in enumerate(tries)
            for key in keys
            if (index := table.get(key)) is not None
        )
        return next(hits, None)


def _table(keys_by_image: Iterable[Iterable[tuple[str, ...]]]) -> dict[tuple[str, ...], int | None]:
    """Every key with its image's index; None for a key that several images share."""
    table: dict[tuple[str, ...], int | None] = {}
    for index, keys in enumerate(keys_by_image):
        for key in set(keys):
            table[key] = None if key in table else index
    return table


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _without_extension(parts: tuple[str, ...]) -> tuple[str, ...]:
    return (*parts[:-1], PurePosixPath(parts[-1]).stem) if parts else parts
