"""Objects of a map against loops that are slow and plainly right."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from pipeline.localization.components import label_by_flood, label_by_scipy
from pipeline.localization.objects import (
    LEVELS,
    contrast,
    largest_object,
    objects_at_levels,
    steadiness,
)

Map = NDArray[np.float32]
Box = tuple[int, int, int, int]


@st.composite
def maps(draw: st.DrawFn) -> Tensor:
    """Steps of a tenth: equal sums and touching levels are common."""
    batch, height, width = (draw(st.integers(1, most)) for most in (3, 6, 7))
    count = batch * height * width
    values = draw(st.lists(st.integers(-3, 6), min_size=count, max_size=count))
    return (torch.tensor(values, dtype=torch.float32) / 10).reshape(batch, height, width)


def parts(map_HW: Map, level: float) -> list[NDArray[np.bool_]]:
    """The connected parts above a level, in the order of their first patches."""
    label_HW, count = ndimage.label(map_HW > np.float32(level))
    return [label_HW == number for number in range(1, count + 1)]


def box_of(part_HW: NDArray[np.bool_]) -> Box:
    rows, columns = np.nonzero(part_HW)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(left: Box, right: Box) -> float:
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    both = max(width, 0) * max(height, 0)
    return both / (area(left) + area(right) - both)


def slow_largest(map_HW: Map) -> NDArray[np.bool_]:
    found = parts(map_HW, 0.0)
    if not found:
        return np.zeros(map_HW.shape, bool)
    return max(found, key=lambda part: map_HW[part].sum(dtype=np.float64))


@settings(max_examples=150, deadline=None)
@given(maps())
def test_the_largest_object_has_the_largest_sum(map_BHW: Tensor) -> None:
    found_BHW = largest_object(map_BHW).numpy()
    for map_HW, found_HW in zip(map_BHW.numpy(), found_BHW, strict=True):
        slow_HW = slow_largest(map_HW)
        # Of equal sums the first; the slow loop's may differ by rounding alone.
        sums = [map_HW[one].sum(dtype=np.float64) for one in (found_HW, slow_HW)]
        assert sums[0] == pytest.approx(sums[1], abs=1e-9)
        if slow_HW.any():
            assert any((found_HW == part).all() for part in parts(map_HW, 0.0))


def slow_objects(map_HW: Map, most: int, nms_iou: float) -> list[tuple[Box, float]]:
    """Score: sum over the part by its box's area, times the root of its patches; greedy NMS."""
    found = [
        (
            box_of(part),
            map_HW[part].sum(dtype=np.float64) / area(box_of(part)) * math.sqrt(part.sum()),
        )
        for level in LEVELS
        for part in parts(map_HW, level)
        if part.sum() >= 2
    ]
    kept: list[tuple[Box, float]] = []
    for box, score in sorted(found, key=lambda one: -one[1]):
        if all(iou(box, other) <= nms_iou for other, _ in kept):
            kept.append((box, score))
    return kept[:most]


@settings(max_examples=150, deadline=None)
# No quotient of small areas but one half, which single precision holds exactly.
@given(maps(), st.sampled_from([1, 3, 10]), st.sampled_from([0.31, 0.5, 0.71]))
def test_objects_at_levels_are_those_of_the_slow_loop(
    map_BHW: Tensor, most: int, nms_iou: float
) -> None:
    # No two scores alike, or the order of equal ones would decide.
    map_BHW = map_BHW + torch.rand(map_BHW.shape, generator=torch.Generator().manual_seed(0)) * 0.01
    found = objects_at_levels(map_BHW, max_objects=most, nms_iou=nms_iou)
    for image, map_HW in enumerate(map_BHW.numpy()):
        mine = found.where(found.image_K == image)
        slow = slow_objects(map_HW, most, nms_iou)
        assert [tuple(box) for box in mine.boxes_K4.tolist()] == [box for box, _ in slow]
        assert mine.score_K.tolist() == pytest.approx([score for _, score in slow], rel=1e-5)
        for box, mask_HW in zip(mine.boxes_K4.tolist(), mine.mask_KHW.numpy(), strict=True):
            assert box_of(mask_HW) == tuple(box)


@settings(max_examples=50, deadline=None)
@given(maps())
def test_alone_is_as_in_a_batch(map_BHW: Tensor) -> None:
    together = objects_at_levels(map_BHW, max_objects=5, nms_iou=0.5)
    for image, map_HW in enumerate(map_BHW):
        alone = objects_at_levels(map_HW[None], max_objects=5, nms_iou=0.5)
        mine = together.where(together.image_K == image)
        assert torch.equal(alone.boxes_K4, mine.boxes_K4)
        assert torch.equal(alone.score_K, mine.score_K)
        assert torch.equal(largest_object(map_HW[None])[0], largest_object(map_BHW)[image])


def test_of_an_image_the_best_come_first() -> None:
    map_BHW = torch.zeros(1, 8, 8)
    map_BHW[0, :2, :2] = 0.2
    map_BHW[0, 5:8, 5:8] = 0.4
    found = objects_at_levels(map_BHW, max_objects=10, nms_iou=0.5)
    assert found.boxes_K4.tolist() == [[5, 5, 8, 8], [0, 0, 2, 2]]


def test_a_single_patch_is_no_object_among_many_but_may_be_the_only_one() -> None:
    map_BHW = torch.full((1, 3, 3), -1.0)
    map_BHW[0, 1, 1] = 0.4
    assert len(objects_at_levels(map_BHW, max_objects=5, nms_iou=0.5).score_K) == 0
    assert largest_object(map_BHW).sum() == 1


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 3, 3)])
def test_maps_without_an_object_have_none(shape: tuple[int, ...]) -> None:
    map_BHW = torch.full(shape, -0.5)
    assert len(objects_at_levels(map_BHW, max_objects=5, nms_iou=0.5).score_K) == 0
    assert not largest_object(map_BHW).any()


def slow_contrast(map_HW: Map, box: Box) -> float:
    """The mean inside minus the mean of a ring of a quarter of the sides, a patch at least."""
    x0, y0, x1, y1 = box
    reach_x, reach_y = math.ceil((x1 - x0) / 4), math.ceil((y1 - y0) / 4)
    inside = np.zeros(map_HW.shape, bool)
    inside[y0:y1, x0:x1] = True
    ring = np.zeros(map_HW.shape, bool)
    ring[max(0, y0 - reach_y) : y1 + reach_y, max(0, x0 - reach_x) : x1 + reach_x] = True
    ring &= ~inside
    return float(map_HW[inside].mean()) - (float(map_HW[ring].mean()) if ring.any() else 0.0)


@settings(max_examples=60, deadline=None)
@given(maps())
def test_contrast_is_the_mean_inside_minus_the_mean_of_the_ring(map_BHW: Tensor) -> None:
    _, height, width = map_BHW.shape
    for x0, y0 in itertools.product(range(width), range(height)):
        box = (x0, y0, min(width, x0 + 3), min(height, y0 + 2))
        found_K = contrast(map_BHW, torch.tensor([0]), torch.tensor([box]))
        assert found_K.item() == pytest.approx(slow_contrast(map_BHW[0].numpy(), box), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(maps())
def test_steadiness_is_the_mean_iou_with_the_boxes_of_moved_levels(map_BHW: Tensor) -> None:
    # Away from the steps of a tenth, where rounding decides what is above.
    map_BHW = map_BHW + 0.003
    boxes = []
    for map_HW in map_BHW.numpy():
        part = slow_largest(map_HW)
        boxes.append(box_of(part) if part.any() else (0, 0, 0, 0))
    found_B = steadiness(map_BHW, torch.tensor(boxes), 0.05)
    for map_HW, box, found in zip(map_BHW, boxes, found_B.tolist(), strict=True):
        ious = []
        for step in (-0.05, 0.05):
            moved = largest_object((map_HW + step)[None])[0].numpy()
            ious.append(iou(box, box_of(moved)) if moved.any() and area(box) else 0.0)
        assert found == pytest.approx(sum(ious) / 2, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(maps())
def test_flooding_numbers_the_same_parts_as_scipy(map_BHW: Tensor) -> None:
    mask_MHW = map_BHW > 0
    flooded: Any = label_by_flood(mask_MHW)
    labelled: Any = label_by_scipy(mask_MHW)
    assert torch.equal(flooded, labelled)
