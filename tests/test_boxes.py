"""The xyxy maths, against hand-made cases and properties that hold for every box."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.boxes import (
    Boxes,
    aligned_iou,
    area,
    as_boxes,
    clip,
    pairwise_iou,
    rescale,
    xywh_to_xyxy,
    xyxy_to_xywh,
)

COORDINATE = st.integers(-64, 64).map(lambda value: value / 4)


def any_boxes(max_count: int = 6) -> st.SearchStrategy[Boxes]:
    """Boxes on a grid of quarters, inverted and empty ones included: their sums are exact."""
    shape = st.integers(0, max_count).map(lambda count: (count, 4))
    return hnp.arrays(np.float64, shape, elements=COORDINATE)


def slow_iou(left: Any, right: Any) -> float:
    """Counts the quarter-pixel cells that two boxes share."""

    def cells(box: Any) -> set[tuple[int, int]]:
        x0, y0, x1, y1 = (int(4 * value) for value in box)
        return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}

    one, other = cells(left), cells(right)
    return len(one & other) / len(one | other) if one | other else 0.0


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([0, 0, 10, 10], [0, 0, 10, 10], 1),
        ([0, 0, 10, 10], [0, 0, 10, 5], 0.5),
        ([0, 0, 10, 10], [5, 5, 15, 15], 25 / 175),
        ([0, 0, 10, 10], [10, 0, 20, 10], 0),
        ([0, 0, 10, 10], [20, 20, 30, 30], 0),
        ([0, 0, 10, 10], [2, 2, 4, 4], 0.04),
        ([3, 3, 3, 3], [3, 3, 3, 3], 0),
        ([10, 10, 0, 0], [0, 0, 10, 10], 0),
    ],
)
def test_iou_of_hand_made_boxes(left: list[int], right: list[int], expected: float) -> None:
    assert pairwise_iou([left], [right]).tolist() == [[expected]]
    assert aligned_iou([left], [right]).tolist() == [expected]


def test_iou_between_no_boxes_has_the_shape_of_nothing() -> None:
    assert pairwise_iou([], [[0, 0, 1, 1], [0, 0, 2, 2]]).shape == (0, 2)
    assert pairwise_iou([[0, 0, 1, 1]], []).shape == (1, 0)
    assert aligned_iou([], []).shape == (0,)


@given(any_boxes(4), any_boxes(4))
def test_pairwise_iou_counts_shared_cells(left_N4: Boxes, right_M4: Boxes) -> None:
    expected = [[slow_iou(left, right) for right in right_M4] for left in left_N4]
    np.testing.assert_allclose(
        pairwise_iou(left_N4, right_M4),
        np.reshape(expected, (len(left_N4), len(right_M4))),
        rtol=1e-12,
    )


@given(hnp.arrays(np.float64, (2, 5, 4), elements=st.floats(-1e6, 1e6)))
def test_iou_is_symmetric_and_never_leaves_zero_to_one(boxes_254: Any) -> None:
    left, right = boxes_254
    iou = pairwise_iou(left, right)
    assert ((iou >= 0) & (iou <= 1)).all()
    np.testing.assert_array_equal(iou, pairwise_iou(right, left).T)
    np.testing.assert_array_equal(np.diagonal(iou), aligned_iou(left, right))


@given(any_boxes())
def test_a_box_with_area_has_iou_one_with_itself_alone(boxes_N4: Boxes) -> None:
    np.testing.assert_array_equal(aligned_iou(boxes_N4, boxes_N4), area(boxes_N4) > 0)


@given(any_boxes(), st.integers(1, 8), st.integers(1, 8))
def test_rescaling_multiplies_areas_and_keeps_iou(boxes_N4: Boxes, x: int, y: int) -> None:
    scaled = rescale(boxes_N4, x, y)
    np.testing.assert_array_equal(area(scaled), area(boxes_N4) * x * y)
    np.testing.assert_array_equal(pairwise_iou(scaled, scaled), pairwise_iou(boxes_N4, boxes_N4))


def test_rescale_stretches_each_axis_by_its_own_factor() -> None:
    assert rescale([[1, 2, 3, 4]], 2, 10).tolist() == [[2, 20, 6, 40]]


def test_clip_cuts_at_the_image_on_all_sides() -> None:
    boxes = clip([[-5, -6, 200, 300], [10, 20, 30, 40]], width=100, height=50)
    assert boxes.tolist() == [[0, 0, 100, 50], [10, 20, 30, 40]]


@given(any_boxes(), st.integers(1, 20), st.integers(1, 20))
def test_clipping_stays_inside_and_happens_once(boxes_N4: Boxes, width: int, height: int) -> None:
    clipped = clip(boxes_N4, width, height)
    assert (clipped >= 0).all()
    assert (clipped <= [width, height, width, height]).all()
    assert (area(clipped) <= area(boxes_N4)).all()
    np.testing.assert_array_equal(clip(clipped, width, height), clipped)


@given(any_boxes())
def test_xywh_and_back_is_the_same_box(boxes_N4: Boxes) -> None:
    np.testing.assert_array_equal(xywh_to_xyxy(xyxy_to_xywh(boxes_N4)), boxes_N4)


def test_conversions_leave_their_input_alone() -> None:
    boxes = as_boxes([[1, 2, 3, 4]])
    assert xywh_to_xyxy(boxes).tolist() == [[1, 2, 4, 6]]
    assert xyxy_to_xywh(boxes).tolist() == [[1, 2, 2, 2]]
    assert boxes.tolist() == [[1, 2, 3, 4]]


def test_no_boxes_are_an_array_without_rows() -> None:
    assert as_boxes([]).shape == (0, 4)
    assert area([]).shape == (0,)
