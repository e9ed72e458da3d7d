"""One box per image against its objects: CorLoc with its interval, baselines and groups.

To add a number: its arithmetic beside ``corloc``, a field of ``Score`` or ``Evaluation``, and its
line in report.py.

Shape letters:  N images   M methods compared   R resamples
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import Boxes, as_boxes
from pipeline.data.ground_truth import GroundTruth, read_ground_truth
from pipeline.errors import DataError
from pipeline.evaluation.all_boxes import (
    DetectionEvaluation,
    DetectionOptions,
    measure_all_boxes,
)
from pipeline.evaluation.corloc import (
    THRESHOLD,
    Floats,
    best_ious,
    central_boxes,
    corloc,
    interval_95,
    resampled_rates,
)
from pipeline.evaluation.predictions import Prediction, describe_labels, match, read_predictions
from pipeline.storage import Location

# Side fractions of the boxes that need no method at all.
BASELINES = {"full_image": 1.0, "central_70": 0.7}
THRESHOLDS = (0.3, 0.5, 0.7)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """How well one box per image does. Fractions in [0, 1].

    Attributes:
        hits: images whose box has IoU >= 0.5 with an object.
        interval: 95 % bootstrap interval of ``hits / num_images``.
        mean_best_iou: over the images; 0 for an image without a box.
        at: CorLoc at each of ``THRESHOLDS``.
        lead: CorLoc of the labels minus this one's; 0 for the labels themselves.
        lead_interval: 95 % interval of ``lead``, from the same resamples (paired).
    """

    hits: int
    interval: Interval
    mean_best_iou: float
    at: dict[float, float]
    lead: float
    lead_interval: Interval


@dataclass(frozen=True)
class Group:
    """CorLoc on a part of the images."""

    hits: int
    num_images: int


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what.

    Attributes:
        labels: score of the boxes under test.
        baselines: by name; empty where the size of some image is unknown.
        groups: the images with one counted object, and those with several.
        num_images: annotated images with a counted object: the denominator.
        num_missing: of these, images without a label; they count as misses.
        num_unmatched: labels whose image is not annotated; they are ignored.
        num_without_objects: annotated images without a counted object; they are left out.
        num_difficult: objects marked difficult, counted or not.
        num_size_unknown: images of unknown size, for which there is no baseline.
        num_size_differs: images whose label and annotation disagree on their size.
        statuses: of the counted images' labels.
        provenance: where labels and ground truth come from.
        detection: all boxes against all objects; None where it was not asked for.
    """

    labels: Score
    baselines: dict[str, Score]
    groups: dict[str, Group]
    num_images: int
    num_missing: int
    num_unmatched: int
    num_without_objects: int
    num_difficult: int
    num_size_unknown: int
    num_size_differs: int
    statuses: dict[str, int]
    provenance: dict[str, Any]
    detection: DetectionEvaluation | None = None


def measure_labels(
    labels: str,
    ground_truth: str,
    *,
    ignore_difficult: bool,
    num_resamples: int,
    seed: int,
    detection: DetectionOptions | None = None,
) -> Evaluation:
    """Measure the labels against the ground truth: CorLoc, and with ``detection`` also AP.

    Images without a counted object (with ``ignore_difficult``: all of them difficult) leave the
    denominator, as in LOST's evaluation. VOC07 trainval has none such: 5011 images either way.

    Raises:
        DataError: a file is missing, damaged or of the wrong kind, or names do not match.
        ConfigError: a URI has a scheme that is not read.
    """
    place = Location.parse(labels)
    everything = read_ground_truth(Location.parse(ground_truth))
    matching = match(read_predictions(place), everything)
    counted = [image.without_difficult() if ignore_difficult else image for image in everything]
    pairs = [
        (truth, label)
        for truth, label in zip(counted, matching.predictions, strict=True)
        if len(truth.boxes_N4)
    ]
    if not pairs:
        raise DataError(f"{ground_truth} holds no object to be found in its {len(counted)} images")
    truths = [truth for truth, _ in pairs]
    found = [label for _, label in pairs]
    sizes_N2, num_size_differs = _sizes(truths, found)
    ious = _best_ious(truths, found, sizes_N2)
    scores = _scores(ious, num_resamples=num_resamples, seed=seed)
    return Evaluation(
        labels=scores.pop("labels"),
        baselines=scores,
        groups=_groups(ious["labels"], truths),
        num_images=len(pairs),
        num_missing=found.count(None),
        num_unmatched=matching.num_unmatched,
        num_without_objects=len(counted) - len(pairs),
        num_difficult=sum(int(image.difficult_N.sum()) for image in everything),
        num_size_unknown=int(np.isnan(sizes_N2).any(axis=1).sum()),
        num_size_differs=num_size_differs,
        statuses=dict(Counter(label.status for label in found if label is not None)),
        provenance={
            "labels": describe_labels(place),
            "ground_truth": ground_truth,
            "ignore_difficult": ignore_difficult,
            "num_resamples": num_resamples,
            "seed": seed,
        },
        detection=None
        if detection is None
        else measure_all_boxes(
            everything, matching.predictions, detection, num_resamples=num_resamples, seed=seed
        ),
    )


def _best_ious(
    truths: Sequence[GroundTruth], found: Sequence[Prediction | None], sizes_N2: Floats
) -> dict[str, Floats]:
    """Best IoU per image for the labels, and for the baselines where all sizes are known."""
    objects = [truth.boxes_N4 for truth in truths]
    contenders = {"labels": _label_boxes(found)}
    if not np.isnan(sizes_N2).any():
        for name, side_fraction in BASELINES.items():
            contenders[name] = central_boxes(sizes_N2, side_fraction)
    return {name: best_ious(boxes_N4, objects) for name, boxes_N4 in contenders.items()}


def _label_boxes(found: Sequence[Prediction | None]) -> Boxes:
    """``(N, 4)``; all zeros, which overlaps nothing, where there is no box."""
    return as_boxes([(label and label.box) or (0, 0, 0, 0) for label in found])


def _sizes(truths: Sequence[GroundTruth], found: Sequence[Prediction | None]) -> tuple[Floats, int]:
    """``(N, 2)`` width and height, NaN where unknown, and how often the two sources disagree.

    The annotation's word is taken first: it is the frame in which the objects were drawn.
    """
    sizes: list[tuple[float, float]] = []
    differs = 0
    for truth, label in zip(truths, found, strict=True):
        annotated = (truth.width, truth.height)
        measured = (label.width, label.height) if label else (None, None)
        known = [size for size in (annotated, measured) if None not in size]
        differs += len(set(known)) > 1
        width, height = known[0] if known else (None, None)
        sizes.append((width or np.nan, height or np.nan))
    return np.array(sizes, dtype=np.float64), differs


def _scores(ious: dict[str, Floats], *, num_resamples: int, seed: int) -> dict[str, Score]:
    hits_MN: NDArray[np.bool_] = np.stack([iou_N >= THRESHOLD for iou_N in ious.values()])
    rates_RM = resampled_rates(
        hits_MN, num_resamples=num_resamples, rng=np.random.default_rng(seed)
    )
    lead_RM = rates_RM[:, :1] - rates_RM
    return {
        name: Score(
            hits=int(hits_MN[column].sum()),
            interval=interval_95(rates_RM[:, column]),
            mean_best_iou=float(iou_N.mean()),
            at={threshold: corloc(iou_N, threshold) for threshold in THRESHOLDS},
            lead=float(hits_MN[0].mean() - hits_MN[column].mean()),
            lead_interval=interval_95(lead_RM[:, column]),
        )
        for column, (name, iou_N) in enumerate(ious.items())
    }


def _groups(best_iou_N: Floats, truths: Sequence[GroundTruth]) -> dict[str, Group]:
    single_N = np.array([len(truth.boxes_N4) == 1 for truth in truths])
    hit_N = best_iou_N >= THRESHOLD
    return {
        name: Group(hits=int((hit_N & member_N).sum()), num_images=int(member_N.sum()))
        for name, member_N in (("single_object", single_N), ("multi_object", ~single_N))
    }
