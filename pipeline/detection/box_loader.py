"""Batches of images with boxes for one worker, and how a loader process makes one.

Each image is read, held against the size its boxes were made for, and augmented under its own key,
so neither loader processes nor workers change a number. Images of a batch differ in size: they
travel in one flat array, because every tensor that crosses processes costs an open file. Loader
processes, pinned memory, warnings of unreadable files and the limit on them are those of
``data/loader.py``; the table is ``box_table.py``, the order ``box_sampler.py``.

An image and its boxes are brought to the size at which a detector sees them as by Detectron2's
``ResizeShortestEdge`` and ``RandomFlip``: the short side is drawn from a list, the long side is at
most ``max_side``, sides are rounded half up, pixels are Pillow's bilinear. To augment otherwise: a
callable like `BoxTransform`, which must pickle.

Shape letters:  B images   N boxes of an image   M boxes of a batch   H, W rows and columns
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.boxes import clip, rescale
from pipeline.config.detection import BoxDataConfig
from pipeline.config.settings import LoaderConfig
from pipeline.data.labelled_images import decode_rgb, printable
from pipeline.data.loader import EpochLoader, Fault, SharedSamples
from pipeline.data.seeding import key_of
from pipeline.data.sources import ReadFault, fetch_bytes
from pipeline.detection.box_sampler import BoxKey, BucketBatchSampler
from pipeline.detection.box_table import BoxTable
from pipeline.errors import DataError


@dataclass(frozen=True)
class SeenSize:
    """How large a detector sees the images that it is asked about, pixels."""

    short_side: int
    max_side: int
    """Of the longer side, at most."""

    def of(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in proportion: the shorter ``short_side``, unless the longer exceeds
        ``max_side``; then that.
        """
        return resized_size(width, height, short_side=self.short_side, max_side=self.max_side)

    def pixels_of(self, image: Image.Image) -> Tensor:
        """``(3, H, W)`` uint8."""
        return _pixels(_resized(image, self.of(*image.size)))


class BoxTransform:
    """What is drawn for each image that is trained on: how large it is, and whether mirrored."""

    def __init__(self, config: BoxDataConfig) -> None:
        self.config = config

    def __call__(
        self, image: Image.Image, boxes_N4: NDArray[np.float32], rng: random.Random
    ) -> tuple[Tensor, NDArray[np.float32]]:
        """``(3, H, W)`` uint8 and the boxes in its pixels."""
        # Only `random` is promised to stay the same in later versions of Python. Both numbers are
        # drawn always, so that one option does not change what another one draws.
        side = self.config.short_sides[int(rng.random() * len(self.config.short_sides))]
        flipped = rng.random() < self.config.flip
        size = SeenSize(side, self.config.max_side).of(*image.size)
        # Cut, because 54 * (29 / 54) is a little more than 29.
        scaled_N4 = clip(rescale(boxes_N4, size[0] / image.width, size[1] / image.height), *size)
        image = _resized(image, size)
        if flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            scaled_N4[:, [0, 2]] = size[0] - scaled_N4[:, [2, 0]]
        return _pixels(image), scaled_N4.astype(np.float32)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


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


# A store that is gone would otherwise be asked for every image of the table.
_MOST_IN_A_ROW: Final = 100


class BoxSample(NamedTuple):
    """One image as a detector trains on it."""

    image_3HW: Tensor
    """uint8, RGB."""

    boxes_N4: Tensor
    """float32, xyxy in pixels of ``image_3HW``."""

    labels_N: Tensor
    """int64, at least 1."""

    scores_N: Tensor
    """float32."""

    key: int
    """In [0, 2 ** 63): seeds whatever else is random about this image in this step."""

    image_id: str
    original_width: int
    original_height: int
    name: str
    """Its URI, for people."""


class Facts(NamedTuple):
    """What a sample has beside its pixels and boxes."""

    height: int
    width: int
    num_boxes: int
    key: int
    image_id: str
    original_width: int
    original_height: int
    name: str


class BoxBatch(NamedTuple):
    """One worker's share of a global batch; look at ``samples``."""

    pixels: Tensor
    """uint8, the images one after the other."""

    boxes_M4: Tensor
    labels_M: Tensor
    scores_M: Tensor
    facts_B: list[Facts]
    num_global: int
    """Images of all workers in this step."""

    num_replaced: int
    """Images that could not be read: another stands in their place."""

    first: int = 0
    """Where in the global batch this share begins."""

    @property
    def samples(self) -> list[BoxSample]:
        """The images with their boxes, as views into the batch."""
        found, pixel, box = [], 0, 0
        for facts in self.facts_B:
            end, boxes = pixel + 3 * facts.height * facts.width, slice(box, box + facts.num_boxes)
            found.append(
                BoxSample(
                    self.pixels[pixel:end].view(3, facts.height, facts.width),
                    self.boxes_M4[boxes],
                    self.labels_M[boxes],
                    self.scores_M[boxes],
                    *facts[3:],
                )
            )
            pixel, box = end, box + facts.num_boxes
        return found

    @property
    def num_images(self) -> int:
        return len(self.facts_B)


def pack_samples(samples: Sequence[BoxSample]) -> BoxBatch:
    """The samples as a batch of their own."""
    return BoxBatch(
        pixels=torch.cat(
            [torch.empty(0, dtype=torch.uint8), *(s.image_3HW.flatten() for s in samples)]
        ),
        boxes_M4=torch.cat([torch.empty(0, 4), *(s.boxes_N4 for s in samples)]),
        labels_M=torch.cat([torch.empty(0, dtype=torch.int64), *(s.labels_N for s in samples)]),
        scores_M=torch.cat([torch.empty(0), *(s.scores_N for s in samples)]),
        facts_B=[
            Facts(s.image_3HW.shape[1], s.image_3HW.shape[2], len(s.boxes_N4), *s[4:])
            for s in samples
        ],
        num_global=len(samples),
        num_replaced=0,
    )


class BoxesLoaded(NamedTuple):
    """What a loader process sends."""

    batch: BoxBatch
    faults: Sequence[Fault]


class BoxSamples(SharedSamples[BoxTable]):
    """Of images with boxes."""

    def __init__(
        self, table: BoxTable, transform: BoxTransform, sampler: BucketBatchSampler
    ) -> None:
        super().__init__(table, sampler, "the next image of its orientation takes its place")
        self._transform = transform

    def __getitems__(self, keys: list[BoxKey]) -> BoxesLoaded | DataError:
        try:
            return self._load(keys)
        except DataError as fault:
            # Raised in a loader process, torch would put its traceback into the message.
            return fault

    def _load(self, keys: list[BoxKey]) -> BoxesLoaded:
        samples: list[BoxSample] = []
        faults: list[Fault] = []
        num_replaced = 0
        # Together, because a store answers many requests in the time of one.
        files = fetch_bytes([self._images.uri(index) for _, _, index in keys])
        for (step, place, wanted), data in zip(keys, files, strict=True):
            index, found = wanted, read_image(self._images, wanted, data)
            if isinstance(found, Fault):
                faults.append(found)
                num_replaced += 1
                index, found = self._stand_in(wanted, faults)
            key = key_of("box sample", self._seed, step, place) >> 1
            samples.append(self._sample(index, found, key))
        batch = pack_samples(samples)._replace(
            num_global=self._num_global or len(samples),
            num_replaced=num_replaced,
            first=self._first,
        )
        return BoxesLoaded(batch, faults)

    def _sample(self, index: int, image: Image.Image, key: int) -> BoxSample:
        table, mine = self._images, self._images.rows(index)
        image_3HW, boxes_N4 = self._transform(image, table.boxes_M4[mine], random.Random(key))
        return BoxSample(
            image_3HW=image_3HW,
            boxes_N4=torch.from_numpy(boxes_N4),
            labels_N=torch.from_numpy(table.labels_M[mine].copy()),
            scores_N=torch.from_numpy(table.scores_M[mine].copy()),
            key=key,
            image_id=table.image_id(index),
            original_width=int(table.width_N[index]),
            original_height=int(table.height_N[index]),
            name=printable(table.uri(index)),
        )

    def _stand_in(self, wanted: int, faults: list[Fault]) -> tuple[int, Image.Image]:
        """The next readable image of the same orientation, wrapping around; notes the others.

        Raises:
            DataError: there is none, or not soon.
        """
        wide_N, tried = self._images.is_wide_N, 1
        for offset in range(1, len(wide_N)):
            index = (wanted + offset) % len(wide_N)
            if wide_N[index] != wide_N[wanted]:
                continue
            if tried == _MOST_IN_A_ROW:
                break
            (data,) = fetch_bytes([self._images.uri(index)])
            found = read_image(self._images, index, data)
            if not isinstance(found, Fault):
                return index, found
            faults.append(found)
            tried += 1
        raise DataError(
            f"at least one image of {tried} in a row must be readable, none is "
            f"({faults[-1].complaint}); mend the files or label the images again"
        )


def read_image(table: BoxTable, index: int, data: bytes | ReadFault) -> Image.Image | Fault:
    """Image ``index`` from the bytes at its URI; a fault where there are none that can be decoded.

    Raises:
        DataError: it is not as large as the table says, so its boxes belong to another file.
    """
    name = printable(table.uri(index))
    if isinstance(data, ReadFault):
        return Fault(name, f"cannot read {name}: {data.reason}")
    try:
        image = decode_rgb(data, name)
    except DataError as fault:
        return Fault(name, str(fault))
    expected = int(table.width_N[index]), int(table.height_N[index])
    if image.size != expected:
        raise DataError(
            f"{name} must be {expected[0]}x{expected[1]} pixels as in the table of boxes, got "
            f"{image.width}x{image.height}: the table was made of another file; label the images "
            "again"
        )
    return image


class BoxLoader(EpochLoader[BoxBatch]):
    """An epoch of batches per iteration; unreadable files are warned of once each, with name.

    Iterating raises DataError where too many images cannot be read, or one is not the file that
    the boxes were made of.
    """


def train_box_loader(
    table: BoxTable,
    transform: BoxTransform,
    *,
    sampler: BucketBatchSampler,
    config: LoaderConfig,
    device_type: str = "cpu",
) -> BoxLoader:
    """The worker's batches of an epoch, in the order of ``sampler``.

    An image that cannot be read is replaced by the next one of its orientation, under its own key.
    """
    return BoxLoader(
        BoxSamples(table, transform, sampler),
        sampler,
        num_samples=len(sampler) * sampler.num_local,
        config=config,
        device_type=device_type,
    )
