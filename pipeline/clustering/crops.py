"""Boxes of an image -> crops as a network sees them -> one unit vector each.

The crop is what LOST cuts out: the box with rounded corners, its shorter side brought to a fixed
length, nothing of it cut off. Crops differ in size, so those that share a grid of patches go
through the network together; few wait at any time, however many there are in all.

Shape letters:  B crops   H, W rows and columns of pixels   D channels   N crops in all
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import InterpolationMode, normalize, resize

from pipeline.models.dino_vit import ClassTokens
from pipeline.models.features import NORMALIZATIONS, in_precision

Pixels = NDArray[np.uint8]

BATCH_SIZES = {"cpu": 4, "cuda": 64}
LONGEST = 4
"""The longer side is at most this often the shorter one's length: a box of 10 x 1000 pixels would
else be 25,000 patches."""

_MOST_WAITING = 256


@dataclass(frozen=True)
class CropOptions:
    """How crops are seen."""

    side: int = 256
    """Pixels of the shorter side."""

    normalize: str = "imagenet"
    """A name of ``NORMALIZATIONS``."""

    antialias: bool = True
    """Smooth what is made smaller, as Pillow does; LOST's torchvision did not."""


def cut(pixels_HW3: Pixels, box: ArrayLike) -> Pixels:
    """The pixels in a box with rounded corners, a view; at least one of them, inside the image."""
    height, width = pixels_HW3.shape[:2]
    corners = np.asarray(box, np.float64).round()
    x0, y0 = (int(c) for c in np.clip(corners[:2], 0, (width - 1, height - 1)))
    x1, y1 = (int(c) for c in np.clip(corners[2:], (x0 + 1, y0 + 1), (width, height)))
    return pixels_HW3[y0:y1, x0:x1]


def crop_size(height: int, width: int, *, side: int, patch_size: int) -> tuple[int, int]:
    """``(rows, columns)`` of pixels to which a crop is brought, at least a patch each."""
    short, long = sorted((height, width))
    # As torchvision: the longer side is rounded down.
    longer, shorter = side * long // short, side
    if longer > LONGEST * side:
        longer = LONGEST * side
        shorter = max(patch_size, round(longer * short / long))
    return (shorter, longer) if height <= width else (longer, shorter)


def seen(crop_HW3: Pixels, options: CropOptions, patch_size: int) -> Tensor:
    """The crop as the network sees it: ``(3, H, W)`` float32, whole patches only.

    What lies beyond the last whole patch at the right and the bottom is left out, as the network's
    convolution would leave it out.
    """
    pixels_3HW = torch.from_numpy(np.array(crop_HW3)).permute(2, 0, 1).float() / 255
    height, width = crop_HW3.shape[:2]
    size = crop_size(height, width, side=options.side, patch_size=patch_size)
    resized_3HW = resize(
        pixels_3HW, list(size), InterpolationMode.BICUBIC, antialias=options.antialias
    )
    mean, std = NORMALIZATIONS[options.normalize]
    rows, columns = (length // patch_size * patch_size for length in size)
    normalised_3HW: Tensor = normalize(resized_3HW[:, :rows, :columns], list(mean), list(std))
    return normalised_3HW


def crop_vectors(
    crops: Iterable[Pixels],
    network: ClassTokens,
    options: CropOptions,
    *,
    device: str,
    batch_size: int,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Class tokens of unit length: numbers of crops ``(B,)`` and vectors ``(B, D)``, as they come.

    Every crop's number, from 0 in the order of ``crops``, comes once. At most 256 crops wait for
    others of their grid.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)
    num_waiting = 0
    for number, crop in enumerate(crops):
        image_3HW = seen(crop, options, network.patch_size)
        group = waiting[tuple(image_3HW.shape)]
        group.append((number, image_3HW))
        num_waiting += 1
        if len(group) == batch_size:
            num_waiting -= len(group)
            yield _vectors(waiting.pop(tuple(image_3HW.shape)), network, device)
        elif num_waiting == _MOST_WAITING:
            yield from (_vectors(one, network, device) for one in waiting.values())
            waiting.clear()
            num_waiting = 0
    yield from (_vectors(one, network, device) for one in waiting.values())


@torch.inference_mode()
def _vectors(
    group: list[tuple[int, Tensor]], network: ClassTokens, device: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    images_B3HW = torch.stack([image_3HW for _, image_3HW in group]).to(device)
    with in_precision("fp32", device):
        vectors_BD = functional.normalize(network(images_B3HW), dim=1)
    numbers_B = np.array([number for number, _ in group])
    return numbers_B, vectors_BD.cpu().numpy()
