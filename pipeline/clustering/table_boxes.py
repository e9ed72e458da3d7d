"""The boxes of a pseudo-label table: cut out of their images, seen as vectors, labelled anew.

Boxes are numbered in the table's order, over the images of status ok that can still be read. What
cannot be read any more, or is not the file that was labelled, keeps its row, with the status that
labelling would give it. One block of encoded files and one decoded image are in memory at a time.

A crop is what LOST cuts out: the box with rounded corners, its shorter side brought to a fixed
length, nothing of it cut off. Crops differ in size, so those that share a grid of patches go
through the network together; few wait at any time, however many there are in all.

Shape letters:  B crops   H, W rows and columns of pixels   D channels   N boxes in all
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import InterpolationMode, normalize, resize

from pipeline.config.settings import Normalization
from pipeline.data.images import DecodedImage
from pipeline.data.pixels import facts_of, unread
from pipeline.data.pseudo_labels import SCHEMA, iterate_labels
from pipeline.data.sources import ReadFault, fetch_bytes
from pipeline.errors import DataError
from pipeline.labelling.run import with_all_columns
from pipeline.models.dino_vit import ClassTokens
from pipeline.models.features import NORMALIZATIONS, in_precision
from pipeline.storage import Location

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

    normalize: Normalization = "imagenet"
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


Decoder = Callable[[bytes], DecodedImage]
Row = dict[str, Any]

_BLOCK = 64
_COLUMNS = ("uri", "status", "width", "height", "content_sha256", "boxes")
# What only an image with a box has.
_OF_BOXES = (
    *("boxes", "scores", "labels", "contrast", "agreement", "masks"),
    *("seed_xy", "seed_degree", "area_fraction", "touches_border"),
)


@dataclass(frozen=True)
class FoundBox:
    """Where a numbered box lies."""

    uri: str
    crop: Pixels | None
    """None where the image has gone since it was read first."""


class TableBoxes:
    """The boxes of one table."""

    def __init__(self, labels: Location, decode: Decoder) -> None:
        """Count the images and boxes.

        Args:
            labels: A finished table.
            decode: From an image's bytes to upright pixels, or the reason why there are none.

        Raises:
            DataError: the table cannot be read, or a box is not finite.
        """
        self._labels, self._decode = labels, decode
        self.num_images = self.num_boxes = 0
        self.failures: dict[int, Row] = {}
        """By the number of its row: what differs in the row of an image that could not be read."""
        for block in self._blocks():
            self.num_images += len(block)
            for row in block.values():
                _require_finite(row, labels)
                self.num_boxes += len(row["boxes"])

    def crops(self, on_block: Callable[[int, int], None]) -> Iterator[Pixels]:
        """All crops, in order; afterwards ``failures`` is known and numbers are settled.

        Args:
            on_block: Told how many images have been read, and how many of them were bad.
        """
        self.failures = {}
        for block in self._blocks():
            before = len(self.failures)
            files = fetch_bytes([row["uri"] for row in block.values()])
            for (number, row), data in zip(block.items(), files, strict=True):
                image, found = self._image(row, data)
                if image.pixels_HW3 is None:
                    self.failures[number] = facts_of(image, found)
                else:
                    yield from (cut(image.pixels_HW3, box) for box in _boxes_in(row, image))
            on_block(len(block), len(self.failures) - before)

    def find(self, numbers: Collection[int]) -> dict[int, FoundBox]:
        """The boxes with these numbers, cut out once more."""
        found: dict[int, FoundBox] = {}
        first = 0
        for block in self._blocks():
            for number, row in block.items():
                if number in self.failures:
                    continue
                places = range(len(row["boxes"]))
                wanted = [place for place in places if first + place in numbers]
                if wanted:
                    (data,) = fetch_bytes([row["uri"]])
                    image, _ = self._image(row, data)
                    for place in wanted:
                        crop = None
                        if image.pixels_HW3 is not None:
                            crop = cut(image.pixels_HW3, _boxes_in(row, image)[place]).copy()
                        found[first + place] = FoundBox(row["uri"], crop)
                first += len(places)
        return found

    def labelled(self, labels_N: NDArray[np.int64]) -> Iterator[pa.Table]:
        """The whole table with these labels, and with the rows of what failed."""
        first = offset = 0
        for table in iterate_labels(self._labels):
            rows = table.select(["status", "boxes", "labels"]).to_pylist()
            labels: list[Any] = []
            for number, row in enumerate(rows, start=offset):
                if row["status"] != "ok" or number in self.failures:
                    labels.append(row["labels"])
                    continue
                last = first + len(row["boxes"] or ())
                labels.append(labels_N[first:last].tolist())
                first = last
            place = table.schema.get_field_index("labels")
            column = pa.array(labels, SCHEMA.field("labels").type)
            changed = table.set_column(place, SCHEMA.field("labels"), column)
            yield self._with_failures(with_all_columns(changed), offset)
            offset += len(rows)

    def _with_failures(self, table: pa.Table, offset: int) -> pa.Table:
        mine = [n - offset for n in self.failures if offset <= n < offset + table.num_rows]
        if not mine:
            return table
        nothing = dict.fromkeys(_OF_BOXES)
        old = table.take(pa.array(mine)).to_pylist()
        new = [row | nothing | self.failures[n + offset] for n, row in zip(mine, old, strict=True)]
        failed = pa.array(np.isin(np.arange(table.num_rows), mine))
        kept = table.filter(pc.invert(failed))
        return pa.concat_tables([kept, pa.Table.from_pylist(new, schema=SCHEMA)])

    def _blocks(self) -> Iterator[dict[int, Row]]:
        """The rows of images with boxes, by their number in the table, some at a time."""
        offset = 0
        for table in iterate_labels(self._labels, _COLUMNS):
            for first in range(0, table.num_rows, _BLOCK):
                rows = table.slice(first, _BLOCK).to_pylist()
                yield {
                    offset + first + index: row
                    for index, row in enumerate(rows)
                    if row["status"] == "ok" and row["boxes"]
                }
            offset += table.num_rows

    def _image(self, row: Row, data: bytes | ReadFault) -> tuple[DecodedImage, bytes | None]:
        """The image that was labelled, or why there is none; and its bytes."""
        if isinstance(data, ReadFault):
            return unread(data), None
        image = self._decode(data)
        same = row["content_sha256"] in (None, hashlib.sha256(data).hexdigest())
        if image.status == "ok" and not (same and _same_size(row, image)):
            # The box would lie on a picture that it was not found in.
            reason = "another file than the one that was labelled"
            image = replace(image, pixels_HW3=None, status="error_read", error=reason)
        return image, data


def _same_size(row: Row, image: DecodedImage) -> bool:
    known = (row["width"], row["height"])
    return known == (image.width, image.height) or None in known


def _boxes_in(row: Row, image: DecodedImage) -> NDArray[np.float64]:
    """``(N, 4)`` boxes in pixels of the decoded image, which may be smaller than the original."""
    boxes_N4 = np.array(row["boxes"], np.float64)
    if image.pixels_HW3 is None or not image.width:
        return boxes_N4
    scaled_N4: NDArray[np.float64] = boxes_N4 * (image.pixels_HW3.shape[1] / image.width)
    return scaled_N4


def _require_finite(row: Row, labels: Location) -> None:
    if not np.isfinite(np.array(row["boxes"], np.float64)).all():
        raise DataError(
            f"boxes must be finite, {row['uri']} in {labels} has another; label the images again"
        )
