"""The connected part of a mask that holds the seed, and the box around it.

Patches touch along edges only (4-connectivity): scipy's default structure, which LOST uses.

Shape letters:  B images   H, W grid rows and columns
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
    return fill_from_seed(mask_BHW, seed_B) if mask_BHW.is_cuda else label_once(mask_BHW, seed_B)


def label_once(mask_BHW: Tensor, seed_B: Tensor) -> Tensor:
    """``seed_component`` by labelling all components at once, on the CPU."""
    label_BHW, _ = ndimage.label(mask_BHW.cpu().numpy(), structure=_WITHIN_IMAGE)
    rows_B, columns_B = np.divmod(seed_B.cpu().numpy(), mask_BHW.shape[2])
    label_B = label_BHW[np.arange(len(label_BHW)), rows_B, columns_B]
    component_BHW = (label_BHW == label_B[:, None, None]) & (label_BHW > 0)
    return torch.from_numpy(component_BHW).to(mask_BHW.device)


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
