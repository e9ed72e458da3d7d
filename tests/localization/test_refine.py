"""A refined mask follows the edges of its image and stays the same object."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.localization.refine import Mask, refine_mask
from pipeline.scenes.scenes import make_scene

STRIDE = 16


def squares(mask_HW: Mask, stride: int, size: tuple[int, ...]) -> Mask:
    return mask_HW.repeat(stride, axis=0).repeat(stride, axis=1)[: size[0], : size[1]]


def iou(one: Mask, other: Mask) -> float:
    return float((one & other).sum() / (one | other).sum())


def in_patches(true_hw: Mask, stride: int) -> Mask:
    """Those of whose part in the image at least half is the object's; the last may hang over."""
    grid = [-(-side // stride) for side in true_hw.shape]
    padded = np.full((grid[0] * stride, grid[1] * stride), np.nan)
    padded[: true_hw.shape[0], : true_hw.shape[1]] = true_hw
    shares = np.nanmean(padded.reshape(grid[0], stride, grid[1], stride), axis=(1, 3))
    return np.asarray(shares >= 0.5)


def disc(height: int, width: int, centre: tuple[float, float], radius: float) -> Mask:
    y, x = np.mgrid[:height, :width] + 0.5
    return np.asarray(np.hypot(y - centre[0], x - centre[1]) < radius)


def painted(true_hw: Mask, noise: float = 12.0) -> NDArray[np.uint8]:
    """The object's colour is not that of the ground, though its brightness is."""
    rng = np.random.default_rng(0)
    colours = np.where(true_hw[..., None], (200, 80, 80), (60, 120, 180))
    return (colours + rng.normal(0, noise, colours.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(160, 224), (150, 211), (145, 209)])
@pytest.mark.parametrize("stride", [16, 14, 8])
def test_a_known_edge_is_found_again(size: tuple[int, int], stride: int) -> None:
    true_hw = disc(*size, (70, 90), 45)
    mask_HW = in_patches(true_hw, stride)
    fine_hw = refine_mask(mask_HW, painted(true_hw), stride)
    assert fine_hw.dtype == bool
    assert fine_hw.shape == size
    assert iou(squares(mask_HW, stride, size), true_hw) < 0.95
    assert iou(fine_hw, true_hw) > 0.98


def test_an_object_at_the_images_edge_is_refined_up_to_it() -> None:
    size = (150, 211)
    true_hw = disc(*size, (150, 211), 60)
    fine_hw = refine_mask(in_patches(true_hw, STRIDE), painted(true_hw), STRIDE)
    assert iou(fine_hw, true_hw) > 0.98
    assert fine_hw[-1, -1]


def test_scenes_masks_come_nearer_to_the_exact_ones() -> None:
    gains = []
    for seed in range(8):
        scene = make_scene(seed, width=250, height=187)
        true_hw = scene.masks_NHW[0]
        mask_HW = in_patches(true_hw, 8)
        fine_hw = refine_mask(mask_HW, scene.pixels_HW3, 8)
        gains.append(iou(fine_hw, true_hw) - iou(squares(mask_HW, 8, true_hw.shape), true_hw))
    assert min(gains) > -0.02
    assert np.mean(gains) > 0.05


def test_of_two_objects_of_one_colour_the_other_is_left_alone() -> None:
    size = (160, 224)
    own_hw, other_hw = disc(*size, (80, 60), 34), disc(*size, (80, 170), 34)
    mask_HW = in_patches(own_hw, STRIDE)
    fine_hw = refine_mask(mask_HW, painted(own_hw | other_hw), STRIDE)
    assert not (fine_hw & other_hw).any()
    assert iou(fine_hw, own_hw) > 0.97


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_and_everything_stay_what_they_are(whole: bool) -> None:
    mask_HW = np.full((10, 14), whole)
    pixels_hw3 = painted(disc(150, 211, (70, 90), 45))
    assert np.array_equal(refine_mask(mask_HW, pixels_hw3, STRIDE), np.full((150, 211), whole))


def test_where_nothing_would_be_left_the_patches_stay() -> None:
    # Thinner than the windows that smooth a ground without edges.
    mask_HW = np.zeros((10, 14), dtype=bool)
    mask_HW[4, 4] = True
    grey_hw3 = np.full((150, 211, 3), 90, dtype=np.uint8)
    fine_hw = refine_mask(mask_HW, grey_hw3, STRIDE)
    assert np.array_equal(fine_hw, squares(mask_HW, STRIDE, (150, 211)))


def test_the_image_may_be_one_that_cannot_be_written_to() -> None:
    true_hw = disc(150, 211, (70, 90), 45)
    pixels_hw3 = painted(true_hw)
    pixels_hw3.flags.writeable = False
    before = pixels_hw3.copy()
    refine_mask(in_patches(true_hw, STRIDE), pixels_hw3, STRIDE)
    assert np.array_equal(pixels_hw3, before)


@given(
    mask_HW=arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)),
    beyond=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    seed=st.integers(0, 9),
)
def test_whatever_the_mask_it_stays_one_part_within_a_patch_of_it(
    mask_HW: Mask, beyond: tuple[int, int], seed: int
) -> None:
    size = (mask_HW.shape[0] * 8 - beyond[0], mask_HW.shape[1] * 8 - beyond[1])
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    coarse_hw = squares(mask_HW, 8, size)
    fine_hw = refine_mask(mask_HW, noise, 8)
    near_HW = ndimage.binary_dilation(mask_HW, np.ones((3, 3), dtype=bool))
    assert not (fine_hw & ~squares(near_HW, 8, size)).any()
    assert fine_hw.any() == coarse_hw.any()
    if fine_hw.any() and not np.array_equal(fine_hw, coarse_hw):
        assert ndimage.label(fine_hw)[1] == 1
        assert (fine_hw & coarse_hw).any()
