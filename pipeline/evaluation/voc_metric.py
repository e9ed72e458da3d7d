"""The VOC devkit's average precision (Everingham et al., IJCV 2010), of one class at a time.

Boxes go by falling score. Each looks for the object it overlaps best: with IoU > 0.5, strictly, it
is true if it is the first to come to that object, and false if it is a later one; a difficult
object is nobody's business, however many boxes lie on it. The area under the envelope of precision
over recall is taken at all its points, not at eleven. It differs from COCO's in these: COCO lets a
box take its second best object, counts an IoU of exactly one half, and sums over 101 recalls.

The devkit counts pixels from 1 and adds one to every side, as its last pixel is inclusive. Here
boxes are 0-based with exclusive ends (``voc.py`` turns ``xmin`` into ``xmin - 1``), so the side of
``[xmin - 1, xmax]`` has that one in it: the same IoU, without adding it twice.

Shape letters:  D boxes of all images   P objects of all images
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import Boxes, pairwise_iou

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
