"""The VOC metric against hand-made cases and the devkit's rules written as a slow loop."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from pipeline.boxes import as_boxes
from pipeline.evaluation.class_matching import ClassObjects, voc_average_precision
from tests.evaluation.annotated import IMAGES

LEFT, RIGHT, FAR = [0, 0, 40, 40], [50, 50, 90, 90], [0, 60, 30, 90]


def ap(images: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> float:
    """Of images as (objects with their flag, boxes with their score)."""
    return voc_average_precision(
        [as_boxes([box for box, _ in boxes]) for _, boxes in images],
        [np.array([score for _, score in boxes], dtype=np.float64) for _, boxes in images],
        [
            ClassObjects(
                as_boxes([box for box, _ in objects]),
                np.array([hard for _, hard in objects], dtype=bool),
            )
            for objects, _ in images
        ],
    )


@pytest.mark.parametrize(
    ("objects", "boxes", "expected"),
    [
        ([(LEFT, 0)], [(LEFT, 0.9)], 1),
        ([(LEFT, 0)], [(FAR, 0.9), (LEFT, 0.1)], 1 / 2),
        ([(LEFT, 0), (RIGHT, 0)], [(LEFT, 0.9)], 1 / 2),
        # True, false (again the same), true: half of the recall at 1, half at 2/3.
        ([(LEFT, 0), (RIGHT, 0)], [(LEFT, 0.9), (LEFT, 0.8), (RIGHT, 0.7)], 5 / 6),
        # Any number of boxes on a difficult object are nobody's business.
        ([(LEFT, 0), (RIGHT, 1)], [(RIGHT, 0.9), (RIGHT, 0.8), (LEFT, 0.7)], 1),
        # Exactly one half is not enough, a little more is.
        ([(LEFT, 0)], [([0, 0, 40, 20], 0.9)], 0),
        ([(LEFT, 0)], [([0, 0, 40, 21], 0.9)], 1),
        ([(LEFT, 0)], [], 0),
    ],
)
def test_hand_made_images(objects: Any, boxes: Any, expected: float) -> None:
    assert ap([(objects, boxes)]) == pytest.approx(expected)


def test_box_does_not_turn_to_its_second_best_object() -> None:
    # Both boxes overlap the wide object best; COCO would give the second one the narrow object.
    objects = [([0, 0, 40, 40], 0), ([0, 0, 40, 25], 0)]
    boxes = [([0, 0, 40, 38], 0.9), ([0, 0, 40, 34], 0.8)]
    assert ap([(objects, boxes)]) == pytest.approx(1 / 2)


def test_without_an_object_to_find_there_is_no_number() -> None:
    assert np.isnan(ap([([], [(LEFT, 0.9)])]))
    assert np.isnan(ap([([(LEFT, 1)], [(LEFT, 0.9)])]))


def test_other_numbers_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        voc_average_precision([as_boxes([LEFT])], [np.ones(1)], [])


def slow_voc_ap(images: Sequence[Any]) -> float:
    """The devkit: pixels from 1, inclusive ends, +1 on every side; boxes one at a time."""

    def inclusive(box: Sequence[float]) -> list[float]:
        return [box[0] + 1, box[1] + 1, box[2], box[3]]

    def overlap(a: Sequence[float], b: Sequence[float]) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0]) + 1
        height = min(a[3], b[3]) - max(a[1], b[1]) + 1
        if width <= 0 or height <= 0:
            return 0.0
        areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
        return width * height / (sum(areas) - width * height)

    num_objects = sum(not hard for objects, _ in images for _, hard in objects)
    if not num_objects:
        return float("nan")
    ranked = [(-s, n, box) for n, (_, boxes) in enumerate(images) for box, s in boxes]
    ranked.sort(key=lambda one: one[0])
    taken: set[tuple[int, int]] = set()
    true = false = 0
    points = []
    for _, number, box in ranked:
        objects = images[number][0]
        overlaps = [overlap(inclusive(box), inclusive(b)) for b, _ in objects]
        best = max(range(len(objects)), key=overlaps.__getitem__, default=None)
        if best is None or not overlaps[best] > 0.5:
            false += 1
        elif objects[best][1]:
            continue
        elif (number, best) in taken:
            false += 1
        else:
            taken.add((number, best))
            true += 1
        points.append((true / num_objects, true / (true + false)))
    # The area under the envelope, one step of recall at a time.
    steps = [k / num_objects for k in range(1, true + 1)]
    return sum(max(p for r, p in points if r >= step) for step in steps) / num_objects


@given(IMAGES)
@settings(max_examples=200, deadline=None)
def test_all_boxes_at_once_equal_the_devkits_loop(drawn: Any) -> None:
    assert ap(drawn) == pytest.approx(slow_voc_ap(drawn), abs=1e-9, nan_ok=True)
