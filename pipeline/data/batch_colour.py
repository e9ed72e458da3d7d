"""Changes of colour of a whole batch, each image by a factor of its own; torchvision's definitions.

Another change: a function of images and a factor per image; who may apply it at random stands in
``pipeline/data/multi_crop.py``.

Images are ``(B, 3, H, W)`` float in [0, 1], red, green, blue, and come back as such, newly made.

Shape letters:  B images   H, W rows and columns in pixels
"""

import torch
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)


def adjust_brightness(images_B3HW: Tensor, factor_B: Tensor) -> Tensor:
    """Every value times the factor, at most 1."""
    return (images_B3HW * factor_B[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images_B3HW: Tensor, factor_B: Tensor) -> Tensor:
    """Factor 0 gives the image's mean grey everywhere, 1 the image, more leads further away."""
    return _blend(images_B3HW, _luma(images_B3HW).mean(dim=(1, 2, 3), keepdim=True), factor_B)


def adjust_saturation(images_B3HW: Tensor, factor_B: Tensor) -> Tensor:
    """Factor 0 gives each pixel's grey, 1 the image, more leads further away."""
    return _blend(images_B3HW, _luma(images_B3HW), factor_B)


def adjust_hue(images_B3HW: Tensor, turn_B: Tensor) -> Tensor:
    """Hues turned by a share of the colour circle in [-0.5, 0.5]; value and saturation stay."""
    red, green, blue = images_B3HW.unbind(1)
    highest = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    chroma = highest - lowest
    # Of a grey pixel the hue is 0 / tiny = 0, and comes out multiplied by its chroma, 0.
    divisor = chroma.clamp(min=torch.finfo(chroma.dtype).tiny)
    # In sixths of the circle: red at 0, green at 2, blue at 4.
    hue = torch.where(
        highest == red,
        (green - blue) / divisor,
        torch.where(highest == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue += 6 * turn_B[:, None, None]
    hue -= 6 * (hue / 6).floor()
    shares = ((hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs())
    return torch.stack([lowest + chroma * share.clamp_(0, 1) for share in shares], dim=1)


def to_gray(images_B3HW: Tensor) -> Tensor:
    """Each pixel's grey in all three channels."""
    return _luma(images_B3HW).expand_as(images_B3HW)


def solarize(images_B3HW: Tensor) -> Tensor:
    """Values from 0.5 on inverted: the brighter half becomes dark."""
    return torch.where(images_B3HW >= 0.5, 1 - images_B3HW, images_B3HW)


def _luma(images_B3HW: Tensor) -> Tensor:
    """``(B, 1, H, W)``."""
    red, green, blue = (images_B3HW[:, channel, None] for channel in range(3))
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def _blend(images_B3HW: Tensor, other: Tensor, factor_B: Tensor) -> Tensor:
    return torch.lerp(other, images_B3HW, factor_B[:, None, None, None]).clamp_(0, 1)
