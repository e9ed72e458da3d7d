"""Clusters against classes: which cluster is which, and how well it then detects that class.

Unsupervised labels have no names, so every cluster's boxes are measured against every class's
objects by the VOC metric, and the Hungarian method gives each class the cluster that makes the mean
AP50 highest (LOST, BMVC 2021, section 4.3). The matching is made on the very images that are
measured, as published. With more clusters than classes the rest go unused; with fewer, the classes
that go without one count as 0.

The metric is the VOC devkit's average precision (Everingham et al., IJCV 2010), of one class at a
time. Boxes go by falling score. Each looks for the object it overlaps best: with IoU > 0.5,
strictly, it is true if it is the first to come to that object, and false if it is a later one; a
difficult object is nobody's business, however many boxes lie on it. The area under the envelope of
precision over recall is taken at all its points, not at eleven. It differs from COCO's in these:
COCO lets a box take its second best object, counts an IoU of exactly one half, and sums over 101
recalls. The devkit counts pixels from 1 and adds one to every side, as its last pixel is inclusive.
Here boxes are 0-based with exclusive ends (data/ground_truth.py turns ``xmin`` into ``xmin - 1``),
so the side of ``[xmin - 1, xmax]`` has that one in it: the same IoU, without adding it twice.

Shape letters:  K classes   C clusters   D boxes of all images   P objects of all images
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pipeline.boxes import Boxes, as_boxes, pairwise_iou
from pipeline.data.ground_truth import GroundTruth
from pipeline.errors import DataError
from pipeline.evaluation.predictions import Detections

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

THRESHOLD = 0.5


@dataclass(frozen=True, eq=False)
class ClassObjects:
    """One class's objects in one image: ``(N, 4)`` boxes, and which of them are difficult."""

    boxes_N4: Boxes
    difficult_N: Bools


@dataclass(frozen=True, eq=False)
class Claims:
    """Which object each box goes for, whatever its score.

    Attributes:
        object_D: number of the object among all images'; -1 for a box that overlaps none enough.
        difficult_D: that object is difficult.
        num_objects: those that are not difficult.
    """

    object_D: Ints
    difficult_D: Bools
    num_objects: int


def claims(
    boxes: Sequence[Boxes], objects: Sequence[ClassObjects], threshold: float = THRESHOLD
) -> Claims:
    """Look up every box's object; both have an entry per image, and D runs over them in order."""
    object_parts: list[Ints] = [np.zeros(0, dtype=np.int64)]
    difficult_parts: list[Bools] = [np.zeros(0, dtype=bool)]
    before = num_objects = 0
    for boxes_D4, one in zip(boxes, objects, strict=True):
        object_D = np.full(len(boxes_D4), -1, dtype=np.int64)
        difficult_D = np.zeros(len(boxes_D4), dtype=bool)
        if len(boxes_D4) and len(one.boxes_N4):
            iou_DN = pairwise_iou(boxes_D4, one.boxes_N4)
            best_D = iou_DN.argmax(axis=1)
            enough_D = iou_DN.max(axis=1) > threshold
            object_D[enough_D] = before + best_D[enough_D]
            difficult_D = enough_D & one.difficult_N[best_D]
        object_parts.append(object_D)
        difficult_parts.append(difficult_D)
        before += len(one.boxes_N4)
        num_objects += int((~one.difficult_N).sum())
    return Claims(np.concatenate(object_parts), np.concatenate(difficult_parts), num_objects)


def claimed_average_precision(claimed: Claims, scores_D: Floats, chosen_D: Bools) -> float:
    """Average precision of the boxes ``chosen_D``, as a fraction; NaN without an object to find.

    Equal scores keep the order of the boxes.
    """
    if not claimed.num_objects:
        return float("nan")
    order_D = np.flatnonzero(chosen_D & ~claimed.difficult_D)
    order_D = order_D[np.argsort(-scores_D[order_D], kind="stable")]
    object_D = claimed.object_D[order_D]
    _, first = np.unique(object_D, return_index=True)
    true_D = np.zeros(len(order_D), dtype=bool)
    true_D[first] = True
    true_D &= object_D >= 0
    # What stands between two true boxes lowers the precision of the next one only.
    at_P = np.flatnonzero(true_D)
    precision_P = np.arange(1, len(at_P) + 1) / (at_P + 1)
    envelope_P = np.maximum.accumulate(precision_P[::-1])[::-1]
    return float(envelope_P.sum() / claimed.num_objects)


def voc_average_precision(
    boxes: Sequence[Boxes], scores: Sequence[Floats], objects: Sequence[ClassObjects]
) -> float:
    """Average precision at IoU > 0.5 of one class, as a fraction; NaN without an object to find.

    Args:
        boxes: ``(D, 4)`` for each image.
        scores: ``(D,)`` for each image.
        objects: of the class, for each image.

    Raises:
        ValueError: not the same number of images.
    """
    scores_D = np.concatenate([np.zeros(0), *scores])
    return claimed_average_precision(
        claims(boxes, objects), scores_D, np.ones(len(scores_D), dtype=bool)
    )


@dataclass(frozen=True, eq=False)
class ClassMatching:
    """The result. Fractions in [0, 1].

    Attributes:
        classes: names of those with an object that is not difficult, sorted.
        clusters: the labels that occur, sorted.
        ap50_KC: every cluster measured as every class.
        cluster_of: by class; None for a class that no cluster is left for.
    """

    classes: tuple[str, ...]
    clusters: tuple[int, ...]
    ap50_KC: NDArray[np.float64]
    cluster_of: dict[str, int | None]

    @property
    def ap50_of(self) -> dict[str, float]:
        """By class, of its own cluster; 0 without one."""
        column = {cluster: index for index, cluster in enumerate(self.clusters)}
        return {
            name: 0.0 if cluster is None else float(self.ap50_KC[row, column[cluster]])
            for row, (name, cluster) in enumerate(self.cluster_of.items())
        }

    @property
    def mean_ap50(self) -> float:
        """Over all classes."""
        return float(np.mean(list(self.ap50_of.values())))


def match_classes(truths: Sequence[GroundTruth], found: Sequence[Detections]) -> ClassMatching:
    """Measure every cluster as every class, and choose.

    Raises:
        DataError: the ground truth has no classes, or no object that is not difficult.
    """
    _refuse_classless(truths)
    easy = [truth.without_difficult() for truth in truths]
    classes = tuple(sorted({name for truth in easy for name in truth.classes_N}))
    if not classes:
        raise DataError("the ground truth has no object that is not difficult: nothing to match")
    scores_D = np.concatenate([np.zeros(0), *(one.scores_D for one in found)])
    label_D = np.concatenate([np.zeros(0, np.int64), *(one.labels_D for one in found)])
    clusters = tuple(np.unique(label_D).tolist())
    ap50_KC = np.zeros((len(classes), len(clusters)))
    boxes = [one.boxes_D4 for one in found]
    for row, name in enumerate(classes):
        claimed = claims(boxes, [_objects(truth, name) for truth in truths])
        for column, cluster in enumerate(clusters):
            ap50_KC[row, column] = claimed_average_precision(claimed, scores_D, label_D == cluster)
    return ClassMatching(classes, clusters, ap50_KC, _best(classes, clusters, ap50_KC))


def _refuse_classless(truths: Sequence[GroundTruth]) -> None:
    bare = [truth for truth in truths if len(truth.classes_N) != len(truth.boxes_N4)]
    if bare:
        raise DataError(
            f"--class-aware: objects of {len(bare)} images have no class in the ground truth, for "
            f"example those of {bare[0].file_name}; measure without classes, or give annotations "
            "with them"
        )


def _objects(truth: GroundTruth, name: str) -> ClassObjects:
    member_N = np.array([one == name for one in truth.classes_N], dtype=bool)
    return ClassObjects(as_boxes(truth.boxes_N4[member_N]), truth.difficult_N[member_N])


def _best(
    classes: tuple[str, ...], clusters: tuple[int, ...], ap50_KC: NDArray[np.float64]
) -> dict[str, int | None]:
    rows, columns = linear_sum_assignment(-ap50_KC)
    chosen = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return {
        name: clusters[chosen[row]] if row in chosen else None for row, name in enumerate(classes)
    }
