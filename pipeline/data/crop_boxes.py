"""Where random resized crops lie: boxes for many crops at once.

The rule is torchvision's ``RandomResizedCrop``: share of the area uniform, ratio of the sides
log-uniform, up to ten tries for a box that lies inside the image, else the largest central box of
a legal ratio. Here all ten are drawn, whether they are needed or not, so that the draws of one crop
do not depend on another's. Another rule: a function that returns ``box_BV4``.

Shape letters:  B images   V crops of an image   T tries   4 (x0, y0, width, height)
"""

import math

import torch
from torch import Tensor

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
