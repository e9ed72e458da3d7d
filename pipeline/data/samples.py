"""A batch, and how a loader process makes one: read, augment under the image's own key, stack.

Shape letters:  B images   H, W rows and columns in pixels   K classes
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pipeline.data.labelled_images import LabelledImages
from pipeline.data.replacements import Fault, Read
from pipeline.data.seeding import seeded
from pipeline.data.sharding import Key, ShardedBatchSampler
from pipeline.data.shared_memory import Packed, pack, unpack
from pipeline.errors import DataError

Transform = Callable[[Image.Image], Tensor]
"""An RGB image of any size in, a float32 ``(3, H, W)`` tensor out; must pickle."""


class Batch(NamedTuple):
    """One rank's slice of a global batch."""

    images_B3HW: Tensor
    """float32, normalised."""

    labels_B: Tensor
    """int64."""

    num_global: int
    """Images of all ranks in this step: a loss weighted by B / num_global and summed over ranks and
    micro-batches is the mean over the global batch, however uneven the slices."""

    num_replaced: int
    """Images that could not be read: another stands in their place, or in evaluation none."""

    @property
    def num_images(self) -> int:
        return len(self.labels_B)

    first: int = 0
    """Where in the global batch this slice begins; 0 in evaluation."""


def micro_batches(batch: Batch, num: int) -> Iterator[Batch]:
    """The batch in ``num`` parts, as even as possible; fewer where it has fewer images.

    Labels may also be soft, ``(B, K)``: mix first and split then, and accumulating over parts
    changes nothing. ``num_replaced`` stands in the first part, so that the sum is right.
    """
    num = min(num, len(batch.labels_B))
    parts = zip(batch.images_B3HW.tensor_split(num), batch.labels_B.tensor_split(num), strict=True)
    first, num_replaced = batch.first, batch.num_replaced
    for images_B3HW, labels_B in parts:
        yield Batch(images_B3HW, labels_B, batch.num_global, num_replaced, first)
        first, num_replaced = first + len(labels_B), 0


class Loaded(NamedTuple):
    """What a loader process sends."""

    batch: Batch
    faults: Sequence[Fault]


class Samples(Dataset[Loaded | DataError]):
    """Whole batches by their keys: torch's loader asks for all of a batch at once where it can."""

    def __init__(
        self,
        images: LabelledImages,
        transform: Transform,
        *,
        read: Read,
        sampler: ShardedBatchSampler | None = None,
    ) -> None:
        self._images = images
        self._packed: Packed | None = None
        self._transform = transform
        self._read = read
        self._seed = sampler.seed if sampler else 0
        self._num_global = sampler.num_global if sampler else None
        self._first = sampler.first if sampler else 0
        self.instead = (
            "the next image of its class takes its place" if sampler else "it is left out"
        )

    def share(self) -> None:
        """From now on a pickle of this carries the images in shared memory."""
        self._packed = pack(self._images)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._images = unpack(state["_packed"])

    def __getitems__(self, keys: list[Key]) -> Loaded | DataError:
        pixels: list[Tensor] = []
        labels: list[int] = []
        faults: list[Fault] = []
        num_replaced = 0
        for epoch, index in keys:
            try:
                image, met = self._read(self._images, index)
            except DataError as fault:
                return fault
            faults += met
            num_replaced += bool(met)
            if image is not None:
                with seeded("augment", self._seed, epoch, index):
                    pixels.append(self._transform(image))
                labels.append(int(self._images.labels[index]))
        # In a loader process torch stacks straight into shared memory.
        images_B3HW = default_collate(pixels) if pixels else torch.empty(0, 3, 0, 0)
        num_global = self._num_global or len(labels)
        labels_B = torch.tensor(labels, dtype=torch.int64)
        batch = Batch(images_B3HW, labels_B, num_global, num_replaced, self._first)
        return Loaded(batch, faults)
