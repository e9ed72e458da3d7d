"""Images without labels, as the loaders of training read them: folders, lists, tables, archives.

What a text names is what ``label_images.py`` would label (lake.py); a tar archive of images is read
into memory besides. Every image has label 0, so that another image of the collection takes the
place of one that cannot be read.

To keep images in memory otherwise: ``preload``.

Shape letters:  N images   H rows   W columns   3 red, green, blue
"""

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.data.labelled_folders import archive_members, is_archive
from pipeline.data.labelled_images import (
    EncodedImages,
    LabelledImages,
    PackedBytes,
    decode_rgb,
    printable,
)
from pipeline.data.lake import Collection
from pipeline.data.sources import ReadFault, fetch_bytes
from pipeline.errors import DataError

# Enough of them to know the usual shape, at the cost of a blink.
_NUM_MEASURED = 16


class LocatedImages:
    """Images by their URIs, read one at a time."""

    def __init__(self, uris: Sequence[str]) -> None:
        self.targets = np.zeros(len(uris), np.int64)
        self._uris = PackedBytes(os.fsencode(uri) for uri in uris)

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        uri = os.fsdecode(self._uris[index])
        (data,) = fetch_bytes([uri])
        if isinstance(data, ReadFault):
            raise DataError(f"cannot read {printable(uri)}: {data.reason}")
        return decode_rgb(data, printable(uri))

    def name(self, index: int) -> str:
        return self._uris[index].decode("utf-8", "backslashreplace")


class Joined:
    """Several collections as one, one after the other."""

    def __init__(self, parts: Sequence[LabelledImages]) -> None:
        self.targets = np.concatenate([part.targets for part in parts])
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return len(self.targets)

    def _find(self, index: int) -> tuple[LabelledImages, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def image(self, index: int) -> Image.Image:
        images, inner = self._find(index)
        return images.image(inner)

    def name(self, index: int) -> str:
        images, inner = self._find(index)
        return images.name(inner)


class Preloaded:
    """Images decoded once and kept, their shorter side ``side``; faults are raised every time."""

    def __init__(self, images: LabelledImages, side: int) -> None:
        self.targets = images.targets
        self._names = PackedBytes(images.name(index).encode() for index in range(len(images)))
        self._size_N2 = np.zeros((len(images), 2), np.int64)
        self._faults: dict[int, str] = {}
        self._pixels = PackedBytes(
            self._shrunk(images, index, side) for index in range(len(images))
        )

    def _shrunk(self, images: LabelledImages, index: int, side: int) -> bytes:
        try:
            image = shrink(images.image(index), side)
        except DataError as fault:
            self._faults[index] = str(fault)
            return b""
        self._size_N2[index] = image.height, image.width
        return image.tobytes()

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        if index in self._faults:
            raise DataError(self._faults[index])
        height, width = self._size_N2[index].tolist()
        return Image.frombytes("RGB", (width, height), self._pixels[index])

    def name(self, index: int) -> str:
        return self._names[index].decode()


def read_unlabelled(texts: Sequence[str]) -> LabelledImages:
    """The images that the texts name, in a fixed order.

    Args:
        texts: Folders, globs, lists, tables (as ``label_images.py`` takes them) or tar archives.

    Raises:
        ConfigError: a text is no path or URI we read.
        DataError: it names no image, or cannot be read.
        StorageError: a store cannot be listed.
    """
    parts = [_read_archive(text) if is_archive(text) else _read_lake(text) for text in texts]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _read_archive(path: str) -> EncodedImages:
    members = dict(archive_members(path, Counter()))
    if not members:
        raise DataError(f"{path} must hold images, got none")
    names = sorted(members)
    targets = np.zeros(len(names), np.int64)
    return EncodedImages(path, names, (members[name] for name in names), targets)


def _read_lake(text: str) -> LocatedImages:
    uris = [uri for chunk in Collection(text).chunks() for uri in chunk.column("uri").to_pylist()]
    # A walk's order is the disk's.
    return LocatedImages(sorted(uris))


def preload(images: LabelledImages, side: int, *, limit_mib: int) -> LabelledImages:
    """The images decoded and shrunk now, if that takes no more memory; else as they are."""
    sizes = [size for index in _spread(len(images)) if (size := _size_of(images, index, side))]
    if not sizes:
        return images
    expected = float(np.mean([height * width * 3 for height, width in sizes])) * len(images)
    return Preloaded(images, side) if expected <= limit_mib * 2**20 else images


def shrink(image: Image.Image, side: int) -> Image.Image:
    """The image with its shorter side brought to ``side``, larger or smaller."""
    factor = side / min(image.size)
    size = (max(side, round(image.width * factor)), max(side, round(image.height * factor)))
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _spread(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, _NUM_MEASURED)).astype(np.int64))


def _size_of(images: LabelledImages, index: int, side: int) -> tuple[int, int] | None:
    try:
        image = images.image(int(index))
    except DataError:
        # It is named when it is trained on; here any other one serves.
        return None
    factor = side / min(image.size)
    return round(image.height * factor), round(image.width * factor)


def random_square(image: Image.Image, *, side: int) -> Tensor:
    """``(3, side, side)`` uint8: a square of the image somewhere along its longer side.

    A `Transform` for the loaders, which seed it per image.
    """
    image = shrink(image, side)
    room = (image.width - side, image.height - side)
    return _square(image, side, [int(torch.randint(most + 1, ())) for most in room])


def middle_square(image: Image.Image, *, side: int) -> Tensor:
    """``(3, side, side)`` uint8: the square in the image's middle."""
    image = shrink(image, side)
    return _square(image, side, [(image.width - side) // 2, (image.height - side) // 2])


def _square(image: Image.Image, side: int, corner: Sequence[int]) -> Tensor:
    x0, y0 = corner
    pixels_HW3 = np.asarray(image.crop((x0, y0, x0 + side, y0 + side)))
    return torch.from_numpy(pixels_HW3.copy()).permute(2, 0, 1).contiguous()
