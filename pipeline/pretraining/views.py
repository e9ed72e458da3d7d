"""Many random views of each image, made on the device for a whole batch: DINO's augmentation.

Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, section 3.1
and appendix; multi-crop is from Caron et al., "Unsupervised learning of visual features by
contrasting cluster assignments" (SwAV), NeurIPS 2020. Two global views and some smaller local ones
are cropped from each image, then varied in colour, blurred and solarised.

``draw_views`` draws all random numbers of a batch, ``make_views`` draws none. So workers that draw
for the whole batch and make their own ``rows`` of it see what one worker alone would have seen.
Where crops lie is torchvision's rule of ``RandomResizedCrop``: share of the area uniform, ratio of
the sides log-uniform, up to ten tries for a box that lies inside the image, else the largest
central box of a legal ratio. Here all ten are drawn, whether they are needed or not, so that the
draws of one crop do not depend on another's.

To add a step: its numbers to ``CropsConfig``, its draws to ``Views`` and ``draw_views``, its
function to ``batch_images.py``, its turn in ``_make``.

Shape letters:  B images   V views of an image, the global ones first   T tries   H, W rows and
                columns in pixels   S side of a view   4 (x0, y0, width, height) or the four
                adjustments
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipeline.config.pretraining import CropsConfig
from pipeline.pretraining.batch_images import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur_matrix,
    mirrored,
    mix_rows_and_columns,
    resampling_matrix,
    solarize,
    to_gray,
)

_TRIES = 10


def draw_boxes(
    num_images: int,
    scale_V2: Tensor,
    *,
    size: tuple[int, int],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Boxes in whole pixels: ``(B, V, 4)`` int64 on the CPU, left, top, width, height.

    Args:
        num_images: B.
        scale_V2: least and largest share of the image's area, per crop.
        size: height and width of the images in pixels.
        ratio: least and largest width divided by height.
        generator: of the CPU.
    """
    height, width = size
    tries = (num_images, len(scale_V2), _TRIES)
    # float64: rounding must never make a share of 1, or the last place, larger than the image.
    share_BVT, place_BVT, left_BVT, top_BVT = torch.rand(
        (4, *tries), generator=generator, dtype=torch.float64
    )
    least_V1, largest_V1 = scale_V2.double()[:, :1], scale_V2.double()[:, 1:]
    area_BVT = (least_V1 + (largest_V1 - least_V1) * share_BVT) * (height * width)
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    ratio_BVT = torch.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * place_BVT)
    width_BVT = (area_BVT * ratio_BVT).sqrt().round()
    height_BVT = (area_BVT / ratio_BVT).sqrt().round()
    fits_BVT = (width_BVT >= 1) & (width_BVT <= width) & (height_BVT >= 1) & (height_BVT <= height)
    x0_BVT = (left_BVT * (width - width_BVT + 1)).floor()
    y0_BVT = (top_BVT * (height - height_BVT + 1)).floor()
    box_BVT4 = torch.stack([x0_BVT, y0_BVT, width_BVT, height_BVT], dim=-1).long()
    # argmax finds the first of several.
    first_BV = fits_BVT.to(torch.uint8).argmax(dim=2)
    box_BV4 = box_BVT4.gather(2, first_BV[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    return torch.where(fits_BVT.any(dim=2)[..., None], box_BV4, _central_box(size, ratio))


def _central_box(size: tuple[int, int], ratio: tuple[float, float]) -> Tensor:
    """The largest box in the middle whose ratio is legal: ``(4,)``."""
    height, width = size
    box_width = min(width, max(1, round(height * ratio[1])))
    box_height = min(height, max(1, round(width / ratio[0])))
    return torch.tensor(
        [(width - box_width) // 2, (height - box_height) // 2, box_width, box_height]
    )


NUM_GLOBAL = 2

_ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)

# A Gaussian holds all but 0.006 % of its weight within four standard deviations.
_BLUR_REACH = 4


@dataclass(frozen=True, kw_only=True)
class Views:
    """All that was drawn for the views of a batch; tensors on the CPU, images first."""

    size: tuple[int, int]
    """Height and width in pixels of the images that it was drawn for."""

    box_BV4: Tensor
    flip_BV: Tensor
    jitter_BV: Tensor

    factor_BV4: Tensor
    """Of brightness, contrast and saturation, and the turn of the hue."""

    order_BV4: Tensor
    """Which adjustment is made first, second, third and last; each image has its own order."""

    gray_BV: Tensor
    blur_BV: Tensor

    sigma_BV: Tensor
    """Of the blur, in pixels of the view; drawn for views without one, too."""

    solarize_BV: Tensor

    def __len__(self) -> int:
        return len(self.box_BV4)

    def rows(self, first: int, count: int) -> Self:
        """The draws of ``count`` images from number ``first`` on, as views into these.

        Raises:
            ValueError: there are no such images.
        """
        if not 0 <= first <= first + count <= len(self):
            raise ValueError(f"rows must lie in [0, {len(self)}), got {count} from {first} on")
        return self._each(lambda drawn: drawn[first : first + count])

    def flat(self, first: int, last: int) -> Self:
        """The draws of views ``first`` to ``last - 1``, all images of one view after the other;
        the tensors lose their axis V.
        """
        return self._each(lambda drawn: drawn[:, first:last].transpose(0, 1).flatten(0, 1))

    def _each(self, take: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: take(value) for name, value in values.items() if name != "size"}
        return type(self)(size=self.size, **tensors)


def draw_views(
    num_images: int,
    size: tuple[int, int],
    config: CropsConfig,
    generator: torch.Generator,
) -> Views:
    """Every random number of all views of a batch.

    Args:
        num_images: of the whole batch, whichever part of it is made here.
        size: height and width of the images in pixels.
        config: how often and how far views may differ.
        generator: of the CPU, so that the numbers do not depend on the device.
    """
    num_views = NUM_GLOBAL + config.num_local
    scales = [config.global_scale] * NUM_GLOBAL + [config.local_scale] * config.num_local
    shape = (num_images, num_views)

    def coins(probability: float | Tensor) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    def per_view(probability: tuple[float, float, float]) -> Tensor:
        first, second, local = probability
        return torch.tensor([first, second, *[local] * config.num_local])

    def uniform(low: Tensor | float, high: Tensor | float, *last: int) -> Tensor:
        return low + (high - low) * torch.rand((*shape, *last), generator=generator)

    reach = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue])
    usual = torch.tensor([1.0, 1.0, 1.0, 0.0])
    lowest = torch.cat([(usual - reach)[:3].clamp(min=0), -reach[3:]])
    return Views(
        size=size,
        box_BV4=draw_boxes(
            num_images, torch.tensor(scales), size=size, ratio=config.ratio, generator=generator
        ),
        flip_BV=coins(config.hflip),
        jitter_BV=coins(config.jitter_prob),
        factor_BV4=uniform(lowest, usual + reach, 4),
        order_BV4=torch.rand((*shape, 4), generator=generator).argsort(dim=2),
        gray_BV=coins(config.gray_prob),
        blur_BV=coins(per_view(config.blur_prob)),
        sigma_BV=uniform(*config.blur_sigma),
        solarize_BV=coins(per_view(config.solarize_prob)),
    )


@torch.no_grad()
def make_views(
    images_B3HW: Tensor, views: Views, config: CropsConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """Two global and ``num_local`` local views, ``(B, 3, S, S)`` float32 on the images' device.

    Normalised by ``mean`` and ``std``. What an image becomes does not depend on the others.

    Args:
        images_B3HW: uint8, or float in [0, 255].
        views: what ``draw_views`` drew for these images.
        config: what they were drawn with.

    Raises:
        ValueError: the views were drawn for other images.
    """
    expected = (len(views), 3, *views.size)
    if images_B3HW.shape != expected or views.flip_BV.shape[1] != NUM_GLOBAL + config.num_local:
        raise ValueError(
            f"images must be {expected} with {views.flip_BV.shape[1]} views as drawn, "
            f"got {tuple(images_B3HW.shape)} with {NUM_GLOBAL + config.num_local}"
        )
    with torch.autocast(images_B3HW.device.type, enabled=False):
        images_B3HW = images_B3HW.float() / 255
        last = NUM_GLOBAL + config.num_local
        global_VB3SS = _make(images_B3HW, views.flat(0, NUM_GLOBAL), config.global_size, config)
        if last == NUM_GLOBAL:
            return [*global_VB3SS], []
        local_VB3SS = _make(images_B3HW, views.flat(NUM_GLOBAL, last), config.local_size, config)
    return [*global_VB3SS], [*local_VB3SS]


def _make(images_B3HW: Tensor, view: Views, size: int, config: CropsConfig) -> Tensor:
    """Several views of every image in one go: a GPU's time goes into the number of operations.

    Returns:
        ``(V, B, 3, S, S)``; ``view`` is flat.
    """
    made_B3SS = _crop(images_B3HW, view, size)
    for turn in range(4):
        for number, adjust in enumerate(_ADJUSTMENTS):
            due_B = view.jitter_BV & (view.order_BV4[:, turn] == number)
            _change_some(made_B3SS, due_B, adjust, view.factor_BV4[:, number])
    _change_some(made_B3SS, view.gray_BV, to_gray)
    radius = math.ceil(_BLUR_REACH * config.blur_sigma[1])
    _change_some(
        made_B3SS, view.blur_BV, lambda some, sigma: _blur(some, sigma, radius), view.sigma_BV
    )
    _change_some(made_B3SS, view.solarize_BV, solarize)
    mean, std = (made_B3SS.new_tensor(rgb)[:, None, None] for rgb in (config.mean, config.std))
    made_B3SS.sub_(mean).div_(std)
    return made_B3SS.reshape(-1, len(images_B3HW), 3, size, size)


def _crop(images_B3HW: Tensor, view: Views, size: int) -> Tensor:
    """Cropped, resized and mirrored: ``(V * B, 3, S, S)``; bicubic overshoots: cut to [0, 1]."""
    height, width = view.size
    device = images_B3HW.device
    # Copies from ordinary memory may be queued: the numbers are taken before the call returns.
    x0_B, y0_B, width_B, height_B = view.box_BV4.to(device, non_blocking=True).unbind(1)
    rows_BSH = resampling_matrix(y0_B, height_B, height, size)
    columns_BSW = resampling_matrix(x0_B, width_B, width, size)
    columns_BSW = mirrored(columns_BSW, view.flip_BV.to(device, non_blocking=True))
    # The same images meet the matrices of each of their views.
    num_images = len(images_B3HW)
    rows_VBSH = rows_BSH.reshape(-1, num_images, *rows_BSH.shape[1:])
    columns_VBSW = columns_BSW.reshape(-1, num_images, *columns_BSW.shape[1:])
    made_VB3SS = torch.matmul(rows_VBSH[:, :, None] @ images_B3HW, columns_VBSW[:, :, None].mT)
    return made_VB3SS.clamp_(0, 1).flatten(0, 1)


def _blur(images_B3SS: Tensor, sigma_B: Tensor, radius: int) -> Tensor:
    matrix_BSS = blur_matrix(sigma_B, images_B3SS.shape[-1], radius)
    return mix_rows_and_columns(images_B3SS, matrix_BSS, matrix_BSS)


def _change_some(
    images_B3SS: Tensor, some_B: Tensor, change: Callable[..., Tensor], *numbers_B: Tensor
) -> None:
    """Put ``change(images, *numbers)`` in the place of the images that ``some_B`` selects.

    The selection is known on the CPU: no work is done for the others, and a GPU is not waited for.
    """
    (chosen,) = some_B.nonzero(as_tuple=True)
    if not len(chosen):
        return
    there = chosen.to(images_B3SS.device, non_blocking=True)
    numbers = [drawn_B[chosen].to(images_B3SS.device, non_blocking=True) for drawn_B in numbers_B]
    images_B3SS.index_copy_(0, there, change(images_B3SS.index_select(0, there), *numbers))
