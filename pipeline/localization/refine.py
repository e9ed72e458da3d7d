"""From patches to pixels: an object's mask fitted to the edges of its image by a guided filter.

He et al., "Guided Image Filtering", PAMI 2013: around each pixel the mask is taken for a linear
function of the image's colour, so an edge of the filtered mask falls where the image has one. The
function's coefficients come from a reduced image (He and Sun, "Fast Guided Filter", 2015), the
mask from the image itself. Not the map of objects but the mask is filtered: it gives better edges
(docs/log.md).

Shape letters:  H, W rows and columns of patches   h, w of pixels   R, C of cells   K parts
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Mask = NDArray[np.bool_]
Floats = NDArray[np.floating]

# Chosen on one collection of scenes, reported on another: benchmarks/masks.py, docs/log.md.
CELLS_PER_PATCH = 2
"""Of each side: so far the image is reduced."""

RADIUS = 2.0
"""Of the square windows, in patches."""

EPSILON = 1e-4
"""Variance of a colour channel from 0 to 1 below which a window counts as flat."""

_NEAR = np.ones((3, 3), dtype=bool)


def refine_mask(
    mask_HW: Mask,
    pixels_hw3: NDArray[np.uint8],
    stride: int,
    *,
    radius: float = RADIUS,
    epsilon: float = EPSILON,
) -> Mask:
    """``(h, w)``: the object's mask at the resolution of the image.

    It is the same object: one connected part that shares pixels with ``mask_HW`` and stays within a
    patch of it. Where nothing of it would be left, it is ``mask_HW`` itself, each patch a square.

    Args:
        mask_HW: the object's patches; may be empty.
        pixels_hw3: the image; the last patches may hang over it.
        stride: pixels per patch.
        radius: of the filter's windows, in patches.
        epsilon: variance of the image below which a window is smoothed.
    """
    height, width = pixels_hw3.shape[:2]
    coarse_hw = _as_squares(mask_HW, stride, (height, width))
    if not coarse_hw.any() or coarse_hw.all():
        return coarse_hw
    rows, columns = mask_HW.shape
    # The last patches' part beyond the image looks like its edge.
    beyond = ((0, rows * stride - height), (0, columns * stride - width), (0, 0))
    picture = Image.fromarray(np.pad(pixels_hw3, beyond, mode="edge"))
    cells = (columns * CELLS_PER_PATCH, rows * CELLS_PER_PATCH)
    # What of the cells the image covers; the others are no part of any window.
    seen = (width / stride * CELLS_PER_PATCH, height / stride * CELLS_PER_PATCH)
    inside = np.s_[: math.ceil(seen[1]), : math.ceil(seen[0])]
    slope_RC3, offset_RC = _colour_fits(
        _resized(mask_HW, cells, mask_HW.shape[::-1])[inside],
        _unit(picture.resize(cells, Image.Resampling.BOX))[inside],
        radius=round(radius * CELLS_PER_PATCH),
        epsilon=epsilon,
    )
    colour_hw3 = _unit(pixels_hw3)
    fitted_hw = _resized(offset_RC, (width, height), seen)
    for channel in range(3):
        slope_hw = _resized(slope_RC3[..., channel], (width, height), seen)
        fitted_hw += slope_hw * colour_hw3[..., channel]
    near_HW = ndimage.binary_dilation(mask_HW, _NEAR)
    inside_hw = (fitted_hw > 0.5) & _as_squares(near_HW, stride, (height, width))
    fine_hw = _largest_part_on(coarse_hw, inside_hw)
    return fine_hw if fine_hw.any() else coarse_hw


def _colour_fits(
    values_RC: Floats, colours_RC3: Floats, *, radius: int, epsilon: float
) -> tuple[Floats, Floats]:
    """Slopes ``(R, C, 3)`` and offsets ``(R, C)`` that make the values of colours around a cell.

    Args:
        values_RC: what is fitted.
        colours_RC3: from 0 to 1.
        radius: of the windows, in cells.
        epsilon: keeps slopes small where the colours hardly vary.
    """

    def mean(array_RC: Floats) -> Floats:
        # Over the cells alone, whatever else the array has.
        size = (2 * radius + 1, 2 * radius + 1) + (1,) * (array_RC.ndim - 2)
        found: Floats = ndimage.uniform_filter(array_RC, size, mode="nearest")
        return found

    colour_RC3, value_RC = mean(colours_RC3), mean(values_RC)
    covariance_RC3 = mean(colours_RC3 * values_RC[..., None]) - colour_RC3 * value_RC[..., None]
    variance_RC33 = mean(colours_RC3[..., :, None] * colours_RC3[..., None, :])
    variance_RC33 = variance_RC33 - colour_RC3[..., :, None] * colour_RC3[..., None, :]
    regular_RC33 = variance_RC33 + epsilon * np.eye(3, dtype=np.float32)
    slope_RC3 = np.linalg.solve(regular_RC33, covariance_RC3[..., None])[..., 0]
    offset_RC = value_RC - (slope_RC3 * colour_RC3).sum(axis=-1)
    return mean(slope_RC3), mean(offset_RC)


def _as_squares(mask_HW: Mask, stride: int, size: tuple[int, int]) -> Mask:
    """Patches as pixels of an image of ``size`` (height, width)."""
    return mask_HW.repeat(stride, axis=0).repeat(stride, axis=1)[: size[0], : size[1]]


def _resized(
    values_RC: NDArray[Any], size: tuple[int, int], part: tuple[float, float]
) -> NDArray[np.float32]:
    """The first ``part`` of the values as ``size`` of them (both width, height), bilinear."""
    picture = Image.fromarray(np.ascontiguousarray(values_RC, dtype=np.float32))
    return np.array(picture.resize(size, Image.Resampling.BILINEAR, box=(0, 0, *part)))


def _unit(pixels: Any) -> NDArray[np.float32]:
    """Bytes as numbers from 0 to 1."""
    return np.asarray(pixels, dtype=np.float32) / np.float32(255)


def _largest_part_on(coarse_hw: Mask, inside_hw: Mask) -> Mask:
    """The connected part of ``inside_hw`` that has most pixels of ``coarse_hw``; empty if none."""
    label_hw, _ = ndimage.label(inside_hw)
    overlap_K = np.bincount(label_hw[coarse_hw], minlength=1)
    overlap_K[0] = 0
    largest_hw: Mask = inside_hw & (label_hw == overlap_K.argmax())
    return largest_hw
