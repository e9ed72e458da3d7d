"""From patches to pixels: an object's mask fitted to the edges of its image by a guided filter.

He et al., "Guided Image Filtering", PAMI 2013: around each pixel the map of objects is taken for a
linear function of the image's grey, so an edge of the filtered map falls where the image has one.

Shape letters:  H, W rows and columns of patches   h, w of pixels
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Mask = NDArray[np.bool_]
Floats = NDArray[np.floating]

RADIUS = 1.0
"""Of the filter's windows, in patches."""

EPSILON = 1e-3
"""Variance of a grey from 0 to 1 below which a window counts as flat."""

_NEAR = np.ones((3, 3), dtype=bool)


def refine_mask(
    mask_HW: Mask, map_HW: Floats | None, pixels_hw3: NDArray[np.uint8], stride: int
) -> Mask:
    """``(h, w)``: the object's mask at the resolution of the image.

    It stays within a patch of ``mask_HW``, and in one piece where that is; of other objects it
    takes nothing.

    Args:
        mask_HW: the object's patches.
        map_HW: what they are a component of at some level; None cuts the mask itself at one half.
        pixels_hw3: the image; the last patches may hang over it.
        stride: pixels per patch.
    """
    size = pixels_hw3.shape[:2]
    coarse_hw = _each_a_square(mask_HW, stride, size)
    if not coarse_hw.any():
        return coarse_hw
    values_HW = mask_HW.astype(np.float32) if map_HW is None else map_HW.astype(np.float32)
    near_HW = ndimage.binary_dilation(mask_HW, _NEAR)
    level = _level(values_HW, mask_HW, near_HW & ~mask_HW)
    # Nothing beyond the reach of two windows matters to what may become the object.
    reach = round(2 * RADIUS) + 1
    rows, columns = _around(near_HW, 0, reach), _around(near_HW, 1, reach)
    part = (
        slice(rows.start * stride, rows.stop * stride),
        slice(columns.start * stride, columns.stop * stride),
    )
    grey_hw = _grey(pixels_hw3[part])
    smooth_hw = _between_centres(values_HW[rows, columns], stride, grey_hw.shape)
    fitted_hw = guided_filter(smooth_hw, grey_hw, radius=round(RADIUS * stride), epsilon=EPSILON)
    inside_hw = fitted_hw > level
    inside_hw &= _each_a_square(near_HW[rows, columns], stride, grey_hw.shape)
    fine_hw = np.zeros(size, dtype=bool)
    fine_hw[part] = _largest_part_on(inside_hw, coarse_hw[part])
    return fine_hw if fine_hw.any() else coarse_hw


def guided_filter(values_hw: Floats, grey_hw: Floats, *, radius: int, epsilon: float) -> Floats:
    """``values_hw`` smoothed but for where ``grey_hw`` has edges (He et al., algorithm 1).

    Args:
        values_hw: what is filtered.
        grey_hw: the guide, 0 to 1.
        radius: of the square windows, in pixels.
        epsilon: variance of the guide below which a window is smoothed.
    """

    def mean(array_hw: Floats) -> Floats:
        found: Floats = ndimage.uniform_filter(array_hw, 2 * radius + 1, mode="nearest")
        return found

    grey_mean_hw, values_mean_hw = mean(grey_hw), mean(values_hw)
    variance_hw = mean(grey_hw * grey_hw) - grey_mean_hw * grey_mean_hw
    covariance_hw = mean(grey_hw * values_hw) - grey_mean_hw * values_mean_hw
    slope_hw = covariance_hw / (variance_hw + np.float32(epsilon))
    offset_hw = values_mean_hw - slope_hw * grey_mean_hw
    return mean(slope_hw) * grey_hw + mean(offset_hw)


def _level(values_HW: Floats, mask_HW: Mask, around_HW: Mask) -> float:
    """Between the lowest value of the mask and the highest beside it, whatever it was cut at."""
    if not around_HW.any():
        return float(values_HW[mask_HW].min()) / 2
    return float(values_HW[mask_HW].min() + values_HW[around_HW].max()) / 2


def _around(mask_HW: Mask, axis: int, reach: int) -> slice:
    """Along an axis from ``reach`` before the mask to as far behind it."""
    hits = np.flatnonzero(mask_HW.any(axis=1 - axis))
    return slice(max(0, int(hits[0]) - reach), int(hits[-1]) + 1 + reach)


def _grey(pixels_hw3: NDArray[np.uint8]) -> Floats:
    """From 0 to 1."""
    grey_hw = np.asarray(Image.fromarray(pixels_hw3).convert("L"), dtype=np.float32)
    return grey_hw / np.float32(255)


def _each_a_square(mask_HW: Mask, stride: int, size: tuple[int, ...]) -> Mask:
    """Patches as pixels of an image of this size."""
    return mask_HW.repeat(stride, axis=0).repeat(stride, axis=1)[: size[0], : size[1]]


def _between_centres(values_HW: Floats, stride: int, size: tuple[int, ...]) -> Floats:
    """Values at patches' centres as values of pixels, bilinear between them."""
    large = (values_HW.shape[1] * stride, values_HW.shape[0] * stride)
    picture = Image.fromarray(values_HW).resize(large, Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=np.float32)[: size[0], : size[1]]


def _largest_part_on(inside_hw: Mask, coarse_hw: Mask) -> Mask:
    """The connected part of ``inside_hw`` that has most pixels of ``coarse_hw``; empty if none."""
    label_hw, _ = ndimage.label(inside_hw)
    overlap_K = np.bincount(label_hw[coarse_hw], minlength=1)
    overlap_K[0] = 0
    largest: Mask = (label_hw == overlap_K.argmax()) & inside_hw
    return largest
