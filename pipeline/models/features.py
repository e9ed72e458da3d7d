"""What every backbone promises: a batch of normalised images in, one feature vector per patch out.

With it stands what labellers share of a forward pass: its precision, and a batch too big for the
memory. To add a backbone: subclass ``FeatureExtractor`` in a file of its own (it may import torch
alone), and give ``backbones.build_backbone`` a name for it.

Shape letters:  B images   H, W rows and columns (pixels of images, patches of tokens)   D channels
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config.settings import Precision

NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and deviation of the input per name of ``backbone.normalize``."""


@dataclass(frozen=True)
class PatchFeatures:
    """A feature vector per patch: ``tokens_BHWD`` float32, rows first; ``stride`` pixels each."""

    tokens_BHWD: Tensor
    stride: int


class FeatureExtractor(nn.Module):
    """A network that gives patch features; images are padded to multiples of ``patch_size``."""

    patch_size: int

    def forward(self, images_B3HW: Tensor) -> PatchFeatures:
        """The features of normalised images, sides multiples of ``patch_size``, all on one grid.

        Raises:
            ValueError: the sides are not multiples of ``patch_size``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def patch_grid(self, images_B3HW: Tensor) -> tuple[int, int]:
        """``(rows, columns)`` of patches in the images.

        Raises:
            ValueError: the sides are not multiples of ``patch_size``.
        """
        height, width = images_B3HW.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image sides must be multiples of {self.patch_size}, got {height} x {width}; "
                "pad with normalize_and_pad"
            )
        return height // self.patch_size, width // self.patch_size


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """``(height, width)`` rounded up to multiples of ``multiple``."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def normalize_and_pad(
    images: Sequence[NDArray[np.uint8]],
    *,
    multiple: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """``(B, 3, H, W)`` float32 of ``(h, w, 3)`` uint8 images, ready for a backbone.

    Values are ``(pixel / 255 - mean) / std``; what is missing to a multiple is filled at the right
    and the bottom with zeros AFTER that, so the padding has the mean colour (as LOST pads).

    Raises:
        ValueError: there is no image, one is not ``(h, w, 3)`` uint8, or they do not share one
            padded size (a batch's common border would change attention and degrees).
    """
    height, width = _common_padded_size(images, multiple)
    mean_311 = torch.tensor(mean, dtype=torch.float32)[:, None, None]
    std_311 = torch.tensor(std, dtype=torch.float32)[:, None, None]
    batch_B3HW = torch.zeros(len(images), 3, height, width)
    for slot_3HW, image in zip(batch_B3HW, images, strict=True):
        # In place, image by image: the passes stay in cache (three times faster than per batch).
        pixels_3HW = slot_3HW[:, : image.shape[0], : image.shape[1]]
        pixels_3HW.copy_(torch.from_numpy(_writeable(image)).permute(2, 0, 1))
        pixels_3HW.div_(255).sub_(mean_311).div_(std_311)
    return batch_B3HW


def _common_padded_size(images: Sequence[NDArray[np.uint8]], multiple: int) -> tuple[int, int]:
    """The one padded size of all images."""
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"images must be (h, w, 3) uint8, got {image.shape} {image.dtype}")
    sizes = {padded_size(image.shape[0], image.shape[1], multiple) for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images of a batch must share one padded size, got {sorted(sizes)}")
    return sizes.pop()


def _writeable(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image itself, or a copy where torch cannot wrap it (Arrow's buffers are read-only)."""
    wrappable = image.flags.writeable and min(image.strides) >= 0
    return image if wrappable else image.copy()


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@contextmanager
def in_precision(precision: Precision, device: str) -> Iterator[None]:
    """Autocast, and ``fp32`` that means it.

    On a GPU convolutions would silently round to TF32: noise of 1e-3 moves one box in forty.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    kind = device.partition(":")[0]
    with (
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        torch.autocast(kind, dtype=dtype, enabled=precision != "fp32"),
    ):
        yield


def as_fits(
    work: Callable[[Sequence[_Item]], list[_Result]],
    items: Sequence[_Item],
    *,
    refuse: Callable[[_Item], _Result],
    device: str,
) -> list[_Result]:
    """What ``work`` makes of the items; the batch is halved while memory runs out.

    Args:
        work: one result for each item.
        items: the batch.
        refuse: the result of an item that alone is too big.
        device: whose memory it is.
    """
    try:
        return work(items)
    except (MemoryError, RuntimeError) as fault:
        if not _is_out_of_memory(fault):
            raise
    # Here the failed batch's tensors are gone with the exception that held them.
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    if len(items) == 1:
        return [refuse(items[0])]
    half = len(items) // 2
    first = as_fits(work, items[:half], refuse=refuse, device=device)
    return first + as_fits(work, items[half:], refuse=refuse, device=device)


def _is_out_of_memory(fault: BaseException) -> bool:
    """Whether memory ran out; on the CPU torch says so in a plain RuntimeError."""
    if isinstance(fault, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "not enough memory" in str(fault) or "allocate memory" in str(fault)
