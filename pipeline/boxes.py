"""xyxy maths: boxes are ``[x0, y0, x1, y1]`` in pixels, 0-based, x1 and y1 exclusive.

Shape letters:  N, M boxes
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Boxes = NDArray[np.float64]


def as_boxes(boxes: ArrayLike) -> Boxes:
    """``boxes`` as an ``(N, 4)`` float64 array; an empty list becomes ``(0, 4)``."""
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def area(boxes_N4: ArrayLike) -> NDArray[np.float64]:
    """``(N,)`` areas; a box with a negative side has none."""
    return _area(as_boxes(boxes_N4))


def pairwise_iou(left_N4: ArrayLike, right_M4: ArrayLike) -> NDArray[np.float64]:
    """``(N, M)`` intersection over union in [0, 1]; 0 where both boxes are empty."""
    left, right = as_boxes(left_N4), as_boxes(right_M4)
    return _iou(left[:, None], right[None, :])


def aligned_iou(left_N4: ArrayLike, right_N4: ArrayLike) -> NDArray[np.float64]:
    """``(N,)`` intersection over union of each box with the one at the same index."""
    return _iou(as_boxes(left_N4), as_boxes(right_N4))


def clip(boxes_N4: ArrayLike, width: float, height: float) -> Boxes:
    """The parts of the boxes inside a ``width`` x ``height`` image."""
    clipped: Boxes = as_boxes(boxes_N4).clip(min=0, max=np.array([width, height, width, height]))
    return clipped


def rescale(boxes_N4: ArrayLike, scale_x: float, scale_y: float) -> Boxes:
    """The boxes after the image is stretched by the two factors."""
    scaled: Boxes = as_boxes(boxes_N4) * np.array([scale_x, scale_y, scale_x, scale_y])
    return scaled


def xywh_to_xyxy(boxes_N4: ArrayLike) -> Boxes:
    """COCO's ``[x, y, width, height]`` as ``[x0, y0, x1, y1]``."""
    boxes = as_boxes(boxes_N4).copy()
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def xyxy_to_xywh(boxes_N4: ArrayLike) -> Boxes:
    """``[x0, y0, x1, y1]`` as COCO's ``[x, y, width, height]``."""
    boxes = as_boxes(boxes_N4).copy()
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _area(boxes: Boxes) -> NDArray[np.float64]:
    """Areas over any leading axes: ``(..., 4)`` -> ``(...)``."""
    sides: NDArray[np.float64] = (boxes[..., 2:] - boxes[..., :2]).clip(min=0)
    return sides[..., 0] * sides[..., 1]


def _iou(left: Boxes, right: Boxes) -> NDArray[np.float64]:
    """Intersection over union of ``(..., 4)`` arrays that broadcast."""
    low = np.maximum(left[..., :2], right[..., :2])
    high = np.minimum(left[..., 2:], right[..., 2:])
    overlap = _area(np.concatenate([low, high], axis=-1))
    union = _area(left) + _area(right) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
