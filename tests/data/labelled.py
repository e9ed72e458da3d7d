"""Small labelled data sets on a disk, and what came out of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.data.labelled_images import LabelledImages
from tests.data.pictures import Pixels, encode


def flat(value: int, height: int = 6, width: int = 8) -> Pixels:
    """A picture of one colour, by which it is recognised again."""
    return np.full((height, width, 3), value, np.uint8)


def plant_classes(root: Path, counts: Mapping[str, int], ending: str = "png") -> Path:
    """``{"train/cat": 3}`` -> three images in root/train/cat, each of a grey of its own."""
    value = 0
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            value = (value + 1) % 256
            data = encode(flat(value), "PNG")
            (root / folder / f"{index}.{ending}").write_bytes(data)
    return root


def names(images: LabelledImages | None) -> list[str]:
    """The names of all images."""
    assert images is not None
    return [images.name(index) for index in range(len(images))]


def greys(images: LabelledImages | None) -> list[int]:
    """The top left red value of all images."""
    assert images is not None
    return [int(np.asarray(images.image(index))[0, 0, 0]) for index in range(len(images))]
