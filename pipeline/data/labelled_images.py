"""Images with one class each: what every reader of classification data hands on, and how.

Loader processes are forked or receive a pickle, so nothing here keeps a Python object per image:
names and encoded files lie in one buffer each, which a fork shares and a pickle copies at once.
``cached`` keeps images decoded, where decoding an epoch's files costs as much as training: only
sets of one common size that fit a limit (CIFAR, SVHN); others stay as they are.

To read data from another kind of place: a class like `FileImages`, and a reader beside
``labelled_folders.py`` that returns `Parts`.

Shape letters:  N images   H rows   W columns   3 red, green, blue
"""

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data import image_headers
from pipeline.data.images import mute_pillow, to_rgb
from pipeline.errors import DataError, one_line

Role = Literal["train", "validation", "test"]
ROLES: Final[dict[str, Role]] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
"""What publishers call their splits, and what they are."""

MAX_PIXELS: Final = 178_956_970
"""Pillow's own limit (0.5 GB of RGB), which also stops decompression bombs."""

_WHITE: Final = (255, 255, 255)


class LabelledImages(Protocol):
    """Images and their classes; cheap to pickle and to share between loader processes."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """``(N,)``, indices into the data set's ``classes``."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Image ``index`` as RGB, upright by its EXIF tag, at its full size.

        Raises:
            DataError: it cannot be read or decoded; the message names it.
        """

    def name(self, index: int) -> str:
        """What to call image ``index`` in a message: always printable, the same on any machine."""


@dataclass(frozen=True)
class Parts:
    """A data set as its publisher divided it."""

    classes: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages | None = None
    test: LabelledImages | None = None
    notes: tuple[str, ...] = ()
    """What a user should know of the reading, such as files that were left out."""


class PackedBytes:
    """Many byte strings in one buffer, by position."""

    def __init__(self, strings: Iterable[bytes]) -> None:
        buffer, ends = bytearray(), array("q")
        for string in strings:
            buffer += string
            ends.append(len(buffer))
        self._buffer = np.frombuffer(buffer, np.uint8)
        self._ends_N = np.frombuffer(ends, np.int64) if ends else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._ends_N)

    def __getitem__(self, index: int) -> bytes:
        start = self._ends_N[index - 1] if index else 0
        return self._buffer[start : self._ends_N[index]].tobytes()


class FileImages:
    """Images that are files below a folder; their names are ``paths`` relative to it."""

    def __init__(self, root: str, paths: Iterable[str], targets: NDArray[np.int64]) -> None:
        self.targets = targets
        self._root = root
        self._paths = PackedBytes(os.fsencode(path) for path in paths)

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        path = os.path.join(self._root, os.fsdecode(self._paths[index]))
        try:
            data = Path(path).read_bytes()
        except OSError as fault:
            raise DataError(f"cannot read {printable(path)}: {one_line(fault)}") from fault
        return decode_rgb(data, printable(path))

    def name(self, index: int) -> str:
        return self._paths[index].decode("utf-8", "backslashreplace")


class EncodedImages:
    """Image files held in memory; ``names`` are those of an archive called ``source``."""

    def __init__(
        self, source: str, names: Iterable[str], files: Iterable[bytes], targets: NDArray[np.int64]
    ) -> None:
        self.targets = targets
        self._source = source
        self._names = PackedBytes(os.fsencode(name) for name in names)
        self._files = PackedBytes(files)

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        return decode_rgb(self._files[index], f"{self.name(index)} in {self._source}")

    def name(self, index: int) -> str:
        return self._names[index].decode("utf-8", "backslashreplace")


class ArrayImages:
    """Decoded images of one size, ``(N, H, W, 3)`` uint8; they are called ``prefix/00017``."""

    def __init__(
        self, pixels_NHW3: NDArray[np.uint8], targets: NDArray[np.int64], prefix: str
    ) -> None:
        self.targets = targets
        self._pixels_NHW3 = np.ascontiguousarray(pixels_NHW3)
        self._prefix = prefix

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels_NHW3[index])

    def name(self, index: int) -> str:
        return f"{self._prefix}/{index:05d}"


class Selection:
    """Some images of ``images``, in the order of ``chosen``; they keep their names."""

    def __init__(self, images: LabelledImages, chosen: NDArray[np.int64]) -> None:
        self.targets = images.targets[chosen]
        self._images = images
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def image(self, index: int) -> Image.Image:
        return self._images.image(int(self._chosen[index]))

    def name(self, index: int) -> str:
        return self._images.name(int(self._chosen[index]))


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """``data`` as an RGB image, upright, transparent parts over white.

    Pixels are those of ``images.decode_image``; training decodes every image in every epoch and
    needs neither its statuses nor its scaling, which cost as much again as the decoding.

    Raises:
        DataError: ``name`` is empty, damaged, too large, or no picture.
    """
    mute_pillow()
    try:
        if not data:
            raise ValueError("the file is empty")
        canvas = image_headers.peek_canvas(data)
        _check_size(canvas.width or 0, canvas.height or 0)
        opened = image_headers.open_image(data)
        _check_size(opened.width, opened.height)
        opened.load()
        image: Image.Image = opened
        if (image_headers.read_orientation(opened) or 1) > 1:
            image = ImageOps.exif_transpose(opened)
        return to_rgb(image, _WHITE)
    # A decoder given damaged bytes may raise anything.
    except Exception as fault:
        raise DataError(
            f"{name} cannot be decoded ({one_line(fault)}): repair the file or remove it"
        ) from fault


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, at most {MAX_PIXELS:,} are unpacked")


def printable(path: str) -> str:
    """``path`` for a message, whatever bytes a disk may have in it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class _Decoded:
    """Images in memory. One that could not be decoded raises its DataError again, every time."""

    def __init__(
        self, images: LabelledImages, pixels_NHW3: NDArray[np.uint8], faults: dict[int, str]
    ) -> None:
        self.targets = images.targets
        # The names without the images: those may hold all files in memory.
        self._names = PackedBytes(images.name(index).encode() for index in range(len(images)))
        self._pixels_NHW3 = pixels_NHW3
        self._faults = faults

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        if index in self._faults:
            raise DataError(self._faults[index])
        return Image.fromarray(self._pixels_NHW3[index])

    def name(self, index: int) -> str:
        return self._names[index].decode()


def cached(images: LabelledImages, *, limit_mib: int = 1024) -> LabelledImages:
    """The images, decoded now; the same object where they differ in size or need more than that.

    An image that cannot be decoded does not end it: asking for it raises its DataError.
    """
    pixels_NHW3: NDArray[np.uint8] | None = None
    faults: dict[int, str] = {}
    for index in range(len(images)):
        try:
            pixels_HW3 = np.asarray(images.image(index))
        except DataError as fault:
            faults[index] = str(fault)
            continue
        if pixels_NHW3 is None:
            if pixels_HW3.nbytes * len(images) > limit_mib * 2**20:
                return images
            pixels_NHW3 = np.zeros((len(images), *pixels_HW3.shape), np.uint8)
        if pixels_HW3.shape != pixels_NHW3.shape[1:]:
            return images
        pixels_NHW3[index] = pixels_HW3
    return images if pixels_NHW3 is None else _Decoded(images, pixels_NHW3, faults)
