"""The connected parts of a mask, that which holds the seed, and the box around it.

Patches touch along edges only (4-connectivity): scipy's default structure, which LOST uses.

Shape letters:  B images   M masks   H, W grid rows and columns
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

# Nothing connects across the first axis: the images of a batch stay apart.
_WITHIN_IMAGE = np.zeros((3, 3, 3), dtype=bool)
_WITHIN_IMAGE[1] = ndimage.generate_binary_structure(2, 1)

# Flood-fill steps between two looks at whether anything still grows; a look stalls the GPU.
_STEPS_PER_LOOK = 8


def seed_component(mask_BHW: Tensor, seed_B: Tensor) -> Tensor:
    """The part of each mask connected to its seed: ``(B, H, W)`` bool, empty if the seed is off it.

    One call for the whole batch: a labelling by SciPy on the CPU, a flood fill where the mask
    lives on another device and copying would stall it.
    """
    if mask_BHW.is_cuda:
        return fill_from_seed(mask_BHW, seed_B)
    label_BHW = label_by_scipy(mask_BHW)
    label_B = label_BHW.flatten(1).gather(1, seed_B[:, None])[:, 0]
    return mask_BHW & (label_BHW == label_B[:, None, None])


def label_components(mask_MHW: Tensor) -> Tensor:
    """The connected parts of all masks, numbered from 1 in the order of their first patches.

    Returns:
        ``(M, H, W)`` int64, 0 outside.
    """
    return label_by_flood(mask_MHW) if mask_MHW.is_cuda else label_by_scipy(mask_MHW)


def label_by_scipy(mask_MHW: Tensor) -> Tensor:
    """``label_components`` on the CPU, in one call."""
    label_MHW, _ = ndimage.label(mask_MHW.cpu().numpy(), structure=_WITHIN_IMAGE)
    return torch.from_numpy(label_MHW.astype(np.int64)).to(mask_MHW.device)


def label_by_flood(mask_MHW: Tensor) -> Tensor:
    """``label_components`` on any device: the number of each part's first patch floods it."""
    patch_MHW = torch.arange(1, mask_MHW.numel() + 1, device=mask_MHW.device)
    outside = mask_MHW.numel() + 1
    patch_MHW = patch_MHW.reshape(mask_MHW.shape).masked_fill(~mask_MHW, outside)
    while True:
        before_MHW = patch_MHW
        for _ in range(_STEPS_PER_LOOK):
            patch_MHW = _least_of_neighbours(patch_MHW).masked_fill(~mask_MHW, outside)
        if torch.equal(before_MHW, patch_MHW):
            break
    label_MHW: Tensor
    _, label_MHW = torch.unique(patch_MHW.masked_fill(~mask_MHW, 0), return_inverse=True)
    # Without a patch outside there is no 0 to begin with.
    return label_MHW + int(bool(mask_MHW.all()))


def fill_from_seed(mask_BHW: Tensor, seed_B: Tensor) -> Tensor:
    """``seed_component`` by growing the seed inside the mask, on any device."""
    reached_BHW = torch.zeros_like(mask_BHW)
    reached_BHW.flatten(1).scatter_(1, seed_B[:, None], True)
    reached_BHW &= mask_BHW
    while True:
        before_BHW = reached_BHW
        for _ in range(_STEPS_PER_LOOK):
            reached_BHW = _with_neighbours(reached_BHW) & mask_BHW
        if torch.equal(before_BHW, reached_BHW):
            return reached_BHW


def _with_neighbours(mask_BHW: Tensor) -> Tensor:
    grown_BHW = mask_BHW.clone()
    grown_BHW[:, 1:] |= mask_BHW[:, :-1]
    grown_BHW[:, :-1] |= mask_BHW[:, 1:]
    grown_BHW[:, :, 1:] |= mask_BHW[:, :, :-1]
    grown_BHW[:, :, :-1] |= mask_BHW[:, :, 1:]
    return grown_BHW


def _least_of_neighbours(number_MHW: Tensor) -> Tensor:
    least_MHW = number_MHW.clone()
    for here, there in (
        (least_MHW[:, 1:], number_MHW[:, :-1]),
        (least_MHW[:, :-1], number_MHW[:, 1:]),
        (least_MHW[:, :, 1:], number_MHW[:, :, :-1]),
        (least_MHW[:, :, :-1], number_MHW[:, :, 1:]),
    ):
        torch.minimum(here, there, out=here)
    return least_MHW


def tight_boxes(mask_BHW: Tensor) -> Tensor:
    """The smallest box around each mask: ``(B, 4)`` int64 ``x0 y0 x1 y1`` in patches, exclusive.

    An empty mask gives zeros.
    """
    top_B, bottom_B = _extent(mask_BHW.any(dim=2))
    left_B, right_B = _extent(mask_BHW.any(dim=1))
    boxes_B4 = torch.stack([left_B, top_B, right_B, bottom_B], dim=1)
    return boxes_B4 * mask_BHW.flatten(1).any(dim=1)[:, None]


def _extent(hit_BL: Tensor) -> tuple[Tensor, Tensor]:
    """First hit and one past the last hit along a side of length L."""
    first_B = hit_BL.int().argmax(dim=1)
    last_B = hit_BL.shape[1] - hit_BL.int().flip(1).argmax(dim=1)
    return first_B, last_B
