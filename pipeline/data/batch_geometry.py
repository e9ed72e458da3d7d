"""Cropping, resizing, flipping and blurring of a whole batch as products with two matrices.

Each is linear and separable: new rows are sums of rows, new columns sums of columns. So every image
gets a matrix for its rows and one for its columns, and two batched products do the whole batch on
any device, whatever was drawn for each image. Another separable step: a function that returns such
matrices, for ``mix_rows_and_columns``.

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
