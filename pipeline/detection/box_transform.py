"""An image and its boxes at the size at which a detector sees them.

As Detectron2's ``ResizeShortestEdge`` and ``RandomFlip``: the short side is drawn from a list, the
long side is at most ``max_side``, sides are rounded half up, pixels are Pillow's bilinear.

To augment otherwise: a callable like `BoxTransform`, which must pickle.

Shape letters:  N boxes   H, W rows and columns in pixels
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.boxes import clip, rescale
from pipeline.errors import ConfigError

SHORT_SIDES = tuple(range(480, 801, 32))


@dataclass(frozen=True, kw_only=True)
class BoxTransform:
    """What is drawn for each image; one short side and no flip draw nothing."""

    short_sides: tuple[int, ...] = SHORT_SIDES
    """Pixels, each as likely as the others."""

    max_side: int = 1333
    flip: float = 0.5
    """Probability of a horizontal flip, in [0, 1]."""

    def __post_init__(self) -> None:
        if not self.short_sides or min(self.short_sides) < 1:
            raise ConfigError(f"short_sides must be one or more sides >= 1, got {self.short_sides}")
        if self.max_side < 1:
            raise ConfigError(f"max_side must be at least 1, got {self.max_side}")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip must be in [0, 1], got {self.flip}")

    def __call__(
        self, image: Image.Image, boxes_N4: NDArray[np.float32], rng: random.Random
    ) -> tuple[Tensor, NDArray[np.float32]]:
        """``(3, H, W)`` uint8 and the boxes in its pixels."""
        # Only `random` is promised to stay the same in later versions of Python. Both numbers are
        # drawn always, so that one option does not change what another one draws.
        side = self.short_sides[int(rng.random() * len(self.short_sides))]
        flipped = rng.random() < self.flip
        size = resized_size(image.width, image.height, short_side=side, max_side=self.max_side)
        # Cut, because 54 * (29 / 54) is a little more than 29.
        scaled_N4 = clip(rescale(boxes_N4, size[0] / image.width, size[1] / image.height), *size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        if flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            scaled_N4[:, [0, 2]] = size[0] - scaled_N4[:, [2, 0]]
        image_3HW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return image_3HW, scaled_N4.astype(np.float32)


def fixed_size(short_side: int = 800, *, max_side: int = 1333) -> BoxTransform:
    """What a detector sees in a test: nothing is drawn."""
    return BoxTransform(short_sides=(short_side,), max_side=max_side, flip=0)


def resized_size(width: int, height: int, *, short_side: int, max_side: int) -> tuple[int, int]:
    """Width and height in proportion: the shorter ``short_side``, unless the longer exceeds
    ``max_side``; then that.
    """
    scale = short_side / min(width, height)
    # The short side is exact, whatever the product is rounded to.
    wanted = (scale * width, float(short_side)) if height < width else (short_side, scale * height)
    if max(wanted) > max_side:
        shrink = max_side / max(wanted)
        wanted = wanted[0] * shrink, wanted[1] * shrink
    new_width, new_height = (max(1, int(side + 0.5)) for side in wanted)
    return new_width, new_height
