"""Images decoded once and kept: worth it where decoding an epoch's files costs as much as training.

Only sets of one common size that fit a limit are kept (CIFAR, SVHN); others stay as they are.

Shape letters:  N images   H rows   W columns   3 red, green, blue
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.labelled_images import LabelledImages, PackedBytes
from pipeline.errors import DataError


class _Decoded:
    """Images in memory. One that could not be decoded raises its DataError again, every time."""

    def __init__(
        self, images: LabelledImages, pixels_NHW3: NDArray[np.uint8], faults: dict[int, str]
    ) -> None:
        self.labels = images.labels
        # The names without the images: those may hold all files in memory.
        self._names = PackedBytes(images.name(index).encode() for index in range(len(images)))
        self._pixels_NHW3 = pixels_NHW3
        self._faults = faults

    def __len__(self) -> int:
        return len(self.labels)

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
