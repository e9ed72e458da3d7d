"""From patches to pixels: an object's mask fitted to the edges of its image by a guided filter.

He et al., "Guided Image Filtering", PAMI 2013: around each pixel the mask is taken for a linear
function of the image's colour, so an edge of the filtered mask falls where the image has one. The
function's coefficients come from a reduced image (He and Sun, "Fast Guided Filter", 2015), the
mask from the image itself. Not the map of objects but the mask is filtered: it gives better edges
(docs/log.md).

Shape letters:  H, W rows and columns of patches   h, w of pixels   R, C of cells   K parts
"""

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
    coarse_hw = _as_squares(mask_HW, stride)[:height, :width]
    if not coarse_hw.any() or coarse_hw.all():
        return coarse_hw
    rows, columns = mask_HW.shape
    # The last patches' part beyond the image looks like its edge.
    beyond = ((0, rows * stride - height), (0, columns * stride - width), (0, 0))
    whole = (columns * stride, rows * stride)
    reduced = (columns * CELLS_PER_PATCH, rows * CELLS_PER_PATCH)
    picture = Image.fromarray(np.pad(pixels_hw3, beyond, mode="edge"))
    slope_RC3, offset_RC = _colour_fits(
        _resized(Image.fromarray(mask_HW.astype(np.float32)), reduced),
        _unit(picture.resize(reduced, Image.Resampling.BOX)),
        radius=round(radius * CELLS_PER_PATCH),
        epsilon=epsilon,
    )
    fitted_hw = _resized(Image.fromarray(offset_RC), whole)
    for channel, values in enumerate(picture.split()):
        slope_RC = np.ascontiguousarray(slope_RC3[..., channel])
        fitted_hw += _resized(Image.fromarray(slope_RC), whole) * _unit(values)
    near_HW = ndimage.binary_dilation(mask_HW, _NEAR)
    inside_hw = ((fitted_hw > 0.5) & _as_squares(near_HW, stride))[:height, :width]
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


def _as_squares(mask_HW: Mask, stride: int) -> Mask:
    return mask_HW.repeat(stride, axis=0).repeat(stride, axis=1)


def _resized(values: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """To ``size`` (width, height), bilinear between the centres."""
    return np.array(values.resize(size, Image.Resampling.BILINEAR), dtype=np.float32)


def _unit(picture: Image.Image) -> NDArray[np.float32]:
    """Bytes as numbers from 0 to 1."""
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def _largest_part_on(coarse_hw: Mask, inside_hw: Mask) -> Mask:
    """The connected part of ``inside_hw`` that has most pixels of ``coarse_hw``; empty if none."""
    label_hw, _ = ndimage.label(inside_hw)
    overlap_K = np.bincount(label_hw[coarse_hw], minlength=1)
    overlap_K[0] = 0
    largest_hw: Mask = inside_hw & (label_hw == overlap_K.argmax())
    return largest_hw
