"""Crops, sizes, flips, blur and colours of a whole batch, each image by its own draw.

All but colours are linear and separable: new rows are sums of rows, new columns sums of columns. So
every image gets a matrix for its rows and one for its columns, and two batched products do the
whole batch on any device, whatever was drawn for each image. Another separable step: a function
that returns such matrices, for ``mix_rows_and_columns``.

Colour changes take images ``(B, 3, H, W)`` float in [0, 1], red, green, blue, and a factor per
image, by torchvision's definitions, and give new ones. Who may apply which at random stands in
views.py.

Shape letters:  B images   H, W rows and columns in pixels   N pixels along a side before
                S pixels along the same side after   T distances of two pixels
"""

import torch
from torch import Tensor

_CUBIC = -0.5  # Keys' parameter, as in Pillow and in torch where it antialiases


def mix_rows_and_columns(images_B3HW: Tensor, rows_BSH: Tensor, columns_BSW: Tensor) -> Tensor:
    """Images whose rows and columns are the given sums of the old ones: ``(B, 3, S, S)``."""
    return rows_BSH[:, None] @ images_B3HW @ columns_BSW[:, None].mT


def resampling_matrix(start_B: Tensor, length_B: Tensor, num_pixels: int, size: int) -> Tensor:
    """What brings ``length`` pixels, from ``start``, to ``size`` pixels: ``(B, S, N)`` float32.

    Bicubic; where it makes smaller, the kernel is as wide as an output pixel (antialiasing). As in
    torch and Pillow pixels outside the crop have no part in it: the weights of a row, of which the
    crop's border cuts some off, add up to 1.

    Args:
        start_B: the crop's first pixel, an integer.
        length_B: the crop's extent in pixels, a positive integer.
        num_pixels: of the side before (N).
        size: of the side after (S).
    """
    pixels = torch.arange(num_pixels, device=start_B.device)
    in_crop_BN = pixels - start_B[:, None]
    inside_BN = (in_crop_BN >= 0) & (in_crop_BN < length_B[:, None])
    stride_B = length_B.float() / size
    centre_BS = (torch.arange(size, device=start_B.device) + 0.5) * stride_B[:, None]
    offset_BSN = (in_crop_BN[:, None] + 0.5) - centre_BS[..., None]
    weight_BSN = _cubic(offset_BSN / stride_B.clamp(min=1)[:, None, None]) * inside_BN[:, None]
    return weight_BSN / weight_BSN.sum(dim=2, keepdim=True)


def _cubic(offset: Tensor) -> Tensor:
    """Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 15."""
    x = offset.abs().clamp(max=2)
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _CUBIC
    return torch.where(x < 1, near, far)


def mirrored(matrix_BSN: Tensor, flip_B: Tensor) -> Tensor:
    """The same matrices, with the new pixels in reverse order where ``flip`` is True."""
    return torch.where(flip_B[:, None, None], matrix_BSN.flip(1), matrix_BSN)


def blur_matrix(sigma_B: Tensor, size: int, radius: int) -> Tensor:
    """A Gaussian blur along a side: ``(B, S, S)`` float32.

    Beyond the border the image goes on mirrored at the centre of its last pixel (torch's
    "reflect"). A radius that reached further than one mirroring is cut to the side.

    Args:
        sigma_B: standard deviation in pixels, positive.
        size: of the side (S).
        radius: distance in pixels up to which pixels count; the weights within it add up to 1.
    """
    radius = min(radius, size - 1)
    distance_T = torch.arange(radius + 2, device=sigma_B.device)
    weight_BT = torch.exp(-0.5 * (distance_T / sigma_B[:, None]) ** 2)
    weight_BT = weight_BT / (2 * weight_BT[:, :-1].sum(dim=1, keepdim=True) - 1)
    # The last distance stands for all that are out of reach.
    weight_BT[:, -1] = 0
    pixel = torch.arange(size, device=sigma_B.device)
    direct_SS = (pixel[:, None] - pixel).abs()
    before_SS = (pixel[:, None] + pixel).masked_fill(pixel == 0, size)
    last = size - 1
    after_SS = (2 * last - pixel[:, None] - pixel).masked_fill(pixel == last, size)
    seen_as = torch.stack([direct_SS, before_SS, after_SS]).clamp(max=radius + 1)
    return weight_BT[:, seen_as].sum(dim=1)


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
