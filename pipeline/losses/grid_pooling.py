"""Smaller grids for the loss alone: the classifier never sees them.

Backbones that end at 14 x 14 are pooled to 7 x 7 before relative localization. The paper says 2 x 2
averages; the released code takes overlapping 3 x 3 ones. To add a kind: a function, a case in
``pool_grid`` and in ``pooled_shape``, and its name in ``Pooling``.

Shape letters:  B images   C channels   H, W grid rows and columns
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Pooling = Literal["none", "mean_2x2", "overlap_3x3"]


def pool_grid(features_BCHW: Tensor, kind: Pooling) -> Tensor:
    """The features on the grid of ``pooled_shape``: ``(B, C, h, w)``.

    Raises:
        ValueError: as ``pooled_shape``.
    """
    pooled_shape(features_BCHW.shape[-2], features_BCHW.shape[-1], kind)
    match kind:
        case "none":
            return features_BCHW
        case "mean_2x2":
            return mean_2x2(features_BCHW)
        case "overlap_3x3":
            return overlap_3x3(features_BCHW)


def mean_2x2(features_BCHW: Tensor) -> Tensor:
    """Means of 2 x 2 blocks, as the paper has it."""
    return F.avg_pool2d(features_BCHW, kernel_size=2)


def overlap_3x3(features_BCHW: Tensor) -> Tensor:
    """Means of the 3 x 3 neighbourhood of every second cell, as the released code has it.

    Cells beyond the border do not count: a corner is the mean of four cells, not of nine.
    """
    return F.avg_pool2d(features_BCHW, kernel_size=3, stride=2, padding=1, count_include_pad=False)


def pooled_shape(height: int, width: int, kind: Pooling) -> tuple[int, int]:
    """``(rows, columns)`` after pooling.

    Raises:
        ValueError: there is no such kind, or mean_2x2 meets an odd side and would drop cells.
    """
    match kind:
        case "none":
            return height, width
        case "mean_2x2":
            if height % 2 or width % 2:
                raise ValueError(
                    f"mean_2x2 pooling needs even sides, got {height} x {width}: use overlap_3x3 "
                    "or none, or an image_size with an even grid"
                )
            return height // 2, width // 2
        case "overlap_3x3":
            return (height + 1) // 2, (width + 1) // 2
    raise ValueError(f"pooling must be none, mean_2x2 or overlap_3x3, got {kind!r}")
