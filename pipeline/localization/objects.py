"""A map of objects -> boxes: the largest object, or all that stand out at some level.

A map has a value per patch, above 0 on objects, the higher the surer (head.py). One box: around the
component above 0 with the largest sum. Many: around the components above each of ``LEVELS``, since
two objects that touch at one level are apart at a higher one; where boxes overlap the best stays.

Shape letters:  B images   H, W grid rows and columns   L levels   M masks   K objects
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from pipeline.localization.components import label_components, tight_boxes

LEVELS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
MIN_PATCHES = 2
"""Of one object among many; the largest object may have a single patch."""

# How far the ring around a box reaches, as a share of the box's sides.
_RING = 0.25


@dataclass(frozen=True, eq=False)
class Objects:
    """What was found in the images of a batch: image by image, the best first.

    Attributes:
        image_K: int64, which image of the batch.
        boxes_K4: int64 ``x0 y0 x1 y1`` in patches, x1 and y1 exclusive.
        score_K: float32, higher is surer.
        mask_KHW: bool, the patches.
    """

    image_K: Tensor
    boxes_K4: Tensor
    score_K: Tensor
    mask_KHW: Tensor

    def where(self, kept_K: Tensor) -> "Objects":
        """Those that are True in ``kept_K``."""
        return Objects(
            self.image_K[kept_K],
            self.boxes_K4[kept_K],
            self.score_K[kept_K],
            self.mask_KHW[kept_K],
        )


def largest_object(z_BHW: Tensor) -> Tensor:
    """Of each map the component above 0 with the largest sum, the first of equals.

    Returns:
        ``(B, H, W)`` bool, empty where nothing is above 0.
    """
    found = _components(z_BHW > 0, z_BHW)
    is_largest_K = torch.zeros(len(found.map_K) + 1, dtype=torch.bool, device=z_BHW.device)
    is_largest_K[1 + _best_of_each(found.map_K, found.sum_K, most=1)] = True
    return is_largest_K[found.label_MHW]


def objects_at_levels(z_BHW: Tensor, *, max_objects: int, nms_iou: float) -> Objects:
    """The components of at least ``MIN_PATCHES`` above any of ``LEVELS``.

    Their score is the map's sum over the component by the area of its box, times the root of the
    number of its patches: high for what is sure, fills its box and is no speck.

    Args:
        z_BHW: maps of objects.
        max_objects: of an image, the best.
        nms_iou: of two boxes whose IoU is higher the worse is dropped.
    """
    levels_L = torch.tensor(LEVELS, device=z_BHW.device)
    above_BLHW = z_BHW[:, None] > levels_L[:, None, None]
    values_BLHW = z_BHW[:, None].expand_as(above_BLHW)
    found = _components(above_BLHW.flatten(0, 1), values_BLHW.flatten(0, 1))
    score_K = (found.sum_K / _area(found.boxes_K4) * found.size_K.double().sqrt()).float()
    image_K = found.map_K // len(LEVELS)
    big_K = (found.size_K >= MIN_PATCHES).nonzero()[:, 0]
    boxes_K4 = found.boxes_K4[big_K].float()
    best_K = big_K[batched_nms(boxes_K4, score_K[big_K], image_K[big_K], nms_iou)]
    best_K = best_K[_best_of_each(image_K[best_K], score_K[best_K], most=max_objects)]
    return Objects(
        image_K=image_K[best_K],
        boxes_K4=found.boxes_K4[best_K],
        score_K=score_K[best_K],
        mask_KHW=found.label_MHW[found.map_K[best_K]] == (best_K + 1)[:, None, None],
    )


def contrast(z_BHW: Tensor, image_K: Tensor, boxes_K4: Tensor) -> Tensor:
    """How much boxes stand out: the map's mean inside minus its mean in a ring around, ``(K,)``.

    The ring reaches a quarter of the box's sides beyond its edges, a patch at least, as far as
    there is image. Of a box that fills the image it is the mean inside; of an empty box 0.
    """
    _, height, width = z_BHW.shape
    reach_K4 = ((boxes_K4[:, 2:] - boxes_K4[:, :2]) * _RING).ceil().long().repeat(1, 2)
    outer_K4 = boxes_K4 + reach_K4 * torch.tensor([-1, -1, 1, 1], device=z_BHW.device)
    limits_4 = torch.tensor([width, height, width, height], device=z_BHW.device)
    outer_K4 = torch.minimum(outer_K4.clamp(min=0), limits_4)
    inside_K, area_K = _sums_over(z_BHW, image_K, boxes_K4), _area(boxes_K4)
    ring_K = _sums_over(z_BHW, image_K, outer_K4) - inside_K
    ring_area_K = _area(outer_K4) - area_K
    found_K = inside_K / area_K.clamp(min=1) - ring_K / ring_area_K.clamp(min=1)
    return found_K.float()


def steadiness(z_BHW: Tensor, boxes_B4: Tensor, nudge: float) -> Tensor:
    """Mean IoU of the boxes with the largest objects' at a level ``nudge`` higher and lower."""
    moved = [tight_boxes(largest_object(z_BHW + step)) for step in (-nudge, nudge)]
    return torch.stack([_iou(boxes_B4, one) for one in moved]).mean(dim=0)


@dataclass(frozen=True, eq=False)
class _Components:
    """The connected parts of M masks, in the order of their first patches.

    Attributes:
        map_K: which mask each is a part of.
        label_MHW: its number from 1 on; 0 outside.
        size_K: its patches.
        sum_K: float64, the sum of the values over it.
        boxes_K4: int64, the tight box.
    """

    map_K: Tensor
    label_MHW: Tensor
    size_K: Tensor
    sum_K: Tensor
    boxes_K4: Tensor


def _components(mask_MHW: Tensor, values_MHW: Tensor) -> _Components:
    label_MHW = label_components(mask_MHW)
    at_map, at_row, at_column = mask_MHW.nonzero(as_tuple=True)
    number_P = label_MHW[at_map, at_row, at_column] - 1
    count = int(label_MHW.max()) if label_MHW.numel() else 0

    def reduced(source_P: Tensor, how: str) -> Tensor:
        empty_K = torch.zeros(count, dtype=source_P.dtype, device=source_P.device)
        return empty_K.scatter_reduce_(0, number_P, source_P, how, include_self=False)

    corners = [
        reduced(at_column, "amin"),
        reduced(at_row, "amin"),
        reduced(at_column, "amax") + 1,
        reduced(at_row, "amax") + 1,
    ]
    return _Components(
        map_K=reduced(at_map, "amin"),
        label_MHW=label_MHW,
        size_K=reduced(torch.ones_like(at_map), "sum"),
        sum_K=reduced(values_MHW[at_map, at_row, at_column].double(), "sum"),
        boxes_K4=torch.stack(corners, dim=1),
    )


def _best_of_each(group_K: Tensor, value_K: Tensor, *, most: int) -> Tensor:
    """Which have the ``most`` highest values of their group; of equal ones the first.

    They come by group, the highest value first.
    """
    order_K = value_K.argsort(descending=True, stable=True)
    order_K = order_K[group_K[order_K].argsort(stable=True)]
    group_K = group_K[order_K]
    place_K = torch.arange(len(order_K), device=group_K.device)
    place_K -= torch.searchsorted(group_K, group_K)
    return order_K[place_K < most]


def _sums_over(z_BHW: Tensor, image_K: Tensor, boxes_K4: Tensor) -> Tensor:
    """Of each image over each box, from one integral image; float64."""
    integral_BHW = torch.nn.functional.pad(z_BHW.double(), (1, 0, 1, 0)).cumsum(1).cumsum(2)
    x0, y0, x1, y1 = boxes_K4.unbind(dim=1)
    return (
        integral_BHW[image_K, y1, x1]
        - integral_BHW[image_K, y0, x1]
        - integral_BHW[image_K, y1, x0]
        + integral_BHW[image_K, y0, x0]
    )


def _area(boxes_K4: Tensor) -> Tensor:
    return (boxes_K4[:, 2:] - boxes_K4[:, :2]).prod(dim=1)


def _iou(left_K4: Tensor, right_K4: Tensor) -> Tensor:
    """Of boxes in pairs, fp32; 0 where both are empty."""
    low_K2 = torch.maximum(left_K4[:, :2], right_K4[:, :2])
    high_K2 = torch.minimum(left_K4[:, 2:], right_K4[:, 2:])
    both_K = (high_K2 - low_K2).clamp(min=0).prod(dim=1)
    either_K = _area(left_K4) + _area(right_K4) - both_K
    return both_K / either_K.clamp(min=1)
