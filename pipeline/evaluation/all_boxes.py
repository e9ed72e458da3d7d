"""All boxes of the images against all objects -> every number but CorLoc, and what it stands on.

To add a number: a field of ``DetectionEvaluation``, its arithmetic beside the others in this room,
its line in report.py.

Shape letters:  N images
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.config.labelling import Difficult, Scores
from pipeline.data.ground_truth import GroundTruth
from pipeline.evaluation.average_precision import (
    MAX_BOXES,
    AveragePrecision,
    RecallGroup,
    ap50_interval,
    average_precision,
    equally_sure,
    recall_by_num_objects,
)
from pipeline.evaluation.class_matching import ClassMatching, match_classes
from pipeline.evaluation.predictions import Detections, Prediction, detections
from pipeline.evaluation.scored_boxes import ScoreQuality, measure_scores, scored_boxes

KNOWN_SETS = {
    5011: ("VOC2007 trainval", 12_608),
    4952: ("VOC2007 test", 12_032),
    11_540: ("VOC2012 trainval", 27_450),
}
"""By the number of images: the set, and its objects that are not difficult."""

MOST_RESAMPLES = 2000
"""For AP50 and AUROC: each goes over all boxes, and more would not move the first decimal."""

BOX_GROUPS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 9), (10, 19), (20, 49), (50, None))


@dataclass(frozen=True)
class DetectionOptions:
    """What is measured.

    Attributes:
        difficult: what becomes of objects marked difficult.
        scores: the table's, or 1 for every box.
        class_aware: match clusters with classes also where all labels are 1.
    """

    difficult: Difficult = "drop"
    scores: Scores = "table"
    class_aware: bool = False


@dataclass(frozen=True)
class BoxCounts:
    """How many boxes an image has, over all annotated images."""

    total: int
    mean: float
    median: float
    most: int
    num_over_limit: int
    groups: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class DetectionEvaluation:
    """What was measured, and on what.

    Attributes:
        options: the rules.
        precision: COCO's numbers, class-agnostic.
        interval: 95 % bootstrap interval of AP50 over images; None without an object.
        num_resamples: behind it.
        recall: by the number of objects in an image.
        box_counts: boxes per image.
        classes: clusters matched with classes; None where that was not measured.
        quality: what the scores are worth; None where all are 1, or were taken as that.
        warnings: what the reader has to know to trust the numbers.
        hashes: of what was read, by ``labels`` and ``ground_truth``; the format plays no part.
        truths: the annotated images.
        found: their boxes as measured, in the same order.
        names: where these boxes' images were read; None for an image without a label.
    """

    options: DetectionOptions
    precision: AveragePrecision
    interval: tuple[float, float] | None
    num_resamples: int
    recall: dict[str, RecallGroup]
    box_counts: BoxCounts
    classes: ClassMatching | None
    quality: ScoreQuality | None
    warnings: tuple[str, ...]
    hashes: dict[str, str]
    truths: tuple[GroundTruth, ...]
    found: tuple[Detections, ...]
    names: tuple[str | None, ...]


def measure_all_boxes(
    truths: Sequence[GroundTruth],
    predictions: Sequence[Prediction | None],
    options: DetectionOptions,
    *,
    num_resamples: int,
    seed: int,
) -> DetectionEvaluation:
    """Measure the boxes of every annotated image; ``predictions`` stand in the images' order.

    Raises:
        DataError: classes are to be matched, and the ground truth has none.
    """
    told = [detections([]) if one is None else one.detections for one in predictions]
    found = equally_sure(told) if options.scores == "equal" else told
    precision = average_precision(truths, found, difficult=options.difficult)
    num_resamples = min(num_resamples, MOST_RESAMPLES)
    labelled = any((one.labels_D > 1).any() for one in found)
    return DetectionEvaluation(
        options=options,
        precision=precision,
        interval=ap50_interval(precision.matches, num_resamples=num_resamples, seed=seed),
        num_resamples=num_resamples,
        recall=recall_by_num_objects(precision.matches),
        box_counts=count_boxes(found),
        classes=match_classes(truths, found) if labelled or options.class_aware else None,
        quality=measure_scores(scored_boxes(truths, found), num_resamples=num_resamples, seed=seed),
        warnings=tuple(_warnings(truths)),
        hashes={"labels": _hash_of_boxes(truths, told), "ground_truth": hash_of_truth(truths)},
        truths=tuple(truths),
        found=tuple(found),
        names=tuple(None if one is None else one.name for one in predictions),
    )


def count_boxes(found: Sequence[Detections]) -> BoxCounts:
    """How many boxes the images have; groups that no image is in are absent."""
    num_N = np.array([len(one) for one in found], dtype=np.int64)
    groups: Counter[str] = Counter()
    for low, high in BOX_GROUPS:
        name = f"{low}+" if high is None else f"{low}" if low == high else f"{low}-{high}"
        groups[name] = int(((num_N >= low) & (num_N <= (np.inf if high is None else high))).sum())
    return BoxCounts(
        total=int(num_N.sum()),
        mean=float(num_N.mean()),
        median=float(np.median(num_N)),
        most=int(num_N.max()),
        num_over_limit=int((num_N > MAX_BOXES).sum()),
        groups={name: number for name, number in groups.items() if number},
    )


def coco_results(evaluation: DetectionEvaluation) -> list[dict[str, Any]]:
    """COCO's results format, for any other tool: one entry per box, unrounded.

    ``image_id`` is the annotation file's; images of a file without ids are numbered from 1. The
    category is 1, and the cluster's label where clusters were matched with classes.
    """
    entries: list[dict[str, Any]] = []
    for image_id, one in zip(image_ids(evaluation.truths), evaluation.found, strict=True):
        labels_D = one.labels_D if evaluation.classes else np.ones(len(one), dtype=np.int64)
        boxes = zip(one.boxes_D4.tolist(), one.scores_D.tolist(), labels_D.tolist(), strict=True)
        entries += [
            {
                "image_id": image_id,
                "category_id": label,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for (x0, y0, x1, y1), score, label in boxes
        ]
    return entries


def image_ids(truths: Sequence[GroundTruth]) -> list[int | str]:
    """The file's own where every image has one of its own, else the places, from 1."""
    own = [truth.image_id for truth in truths if truth.image_id is not None]
    if len(set(own)) == len(truths):
        return own
    return list(range(1, len(truths) + 1))


def _warnings(truths: Sequence[GroundTruth]) -> list[str]:
    name, expected = KNOWN_SETS.get(len(truths), ("", 0))
    easy = sum(int((~truth.difficult_N).sum()) for truth in truths)
    if not name or easy == expected:
        return []
    return [
        f"{len(truths):,} images are {name}'s number, but its {expected:,} objects that are not "
        f"difficult are {easy:,} here: numbers of AP cannot be compared with published ones"
    ]


def _hash_of_boxes(truths: Sequence[GroundTruth], found: Sequence[Detections]) -> str:
    digest = hashlib.sha256()
    for truth, one in zip(truths, found, strict=True):
        digest.update(f"{truth.file_name}\0{len(one)}\0".encode(errors="surrogatepass"))
        for values in (one.boxes_D4, one.scores_D, one.labels_D):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def hash_of_truth(truths: Sequence[GroundTruth]) -> str:
    """The sha256 of what annotations say; their format plays no part."""
    digest = hashlib.sha256()
    for truth in truths:
        names = "\0".join((truth.file_name, *truth.classes_N, str(len(truth.boxes_N4))))
        digest.update(names.encode(errors="surrogatepass"))
        for values in (truth.boxes_N4, truth.difficult_N, truth.crowds_M4):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
