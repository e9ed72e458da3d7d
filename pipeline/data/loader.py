"""Batches of labelled images for one rank: loader processes in, pinned float tensors out.

The numbers do not depend on the number of loader processes: an augmentation follows from (seed,
epoch, index), an epoch's order from (seed, epoch). What a rank sees is cut in ``sharding.py``. A
loader process reads, augments under the image's own key, and stacks.

One bad file does not end a run: in training the next readable image of its class takes its place
(``read_or_replace``); in evaluation it is left out (``read_or_skip``), since counting another one
twice would be a wrong accuracy. Another rule is another function of the type ``Read``.

Loader processes do not start as forks: they share one copy of the big arrays (``pack``), as each
would otherwise unpickle names and pixels of its own.

Shape letters:  B images   H, W rows and columns in pixels   K classes
"""

import logging
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from pipeline.config.settings import LoaderConfig
from pipeline.data.labelled_images import LabelledImages
from pipeline.data.seeding import seeded
from pipeline.data.sharding import Key, ShardedBatchSampler, ShareSampler
from pipeline.errors import DataError
from pipeline.training.workers import Workers

T = TypeVar("T")

_WORTH_SHARING = 2**16
# Batches that each loader process has ready.
_READY = 4


class Packed(NamedTuple, Generic[T]):
    """A ``T`` for another process: torch moves a tensor it pickles into shared memory, once."""

    pickled: bytes
    buffers: list[Tensor]

    def unpack(self) -> T:
        """The same, whose big arrays are views of the shared memory."""
        buffers = [buffer.numpy() for buffer in self.buffers]
        found: T = pickle.loads(self.pickled, buffers=buffers)
        return found


def pack(images: T) -> Packed[T]:
    """The images with their big arrays beside them, where shared memory has room for those.

    Docker gives a container 64 MiB of it unless told otherwise, and a process that writes beyond
    ends by SIGBUS: so at most half of what is free is taken, the batches need the rest.
    """
    buffers: list[Tensor] = []
    room = _free_shared_memory() // 2

    def kept_inside(buffer: pickle.PickleBuffer) -> bool:
        nonlocal room
        view = buffer.raw()
        if view.nbytes < _WORTH_SHARING or view.nbytes > room:
            return True
        room -= view.nbytes
        shared = torch.frombuffer(view, dtype=torch.uint8).clone()
        buffers.append(shared)
        return False

    return Packed(pickle.dumps(images, protocol=5, buffer_callback=kept_inside), buffers)


def _free_shared_memory() -> int:
    """Bytes; 0 where there is no such folder (not Linux), and then every process has its copy."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


class Fault(NamedTuple):
    """An image that could not be read: what it is called, and a sentence that says so and why."""

    name: str
    complaint: str


class Reading(NamedTuple):
    """An image (None: left out) and the files that could not be read on the way to it."""

    image: Image.Image | None
    name: str
    faults: tuple[Fault, ...] = ()


Read = Callable[[LabelledImages, int], Reading]


def read_or_replace(images: LabelledImages, index: int) -> Reading:
    """The image, or the next readable one of its class in the order of indices, wrapping around.

    Raises:
        DataError: no image of the class can be read.
    """
    first = _read(images, index)
    if not isinstance(first, Fault):
        return Reading(first, images.name(index))
    target = int(images.targets[index])
    members = np.flatnonzero(images.targets == target)
    faults = [first]
    for other in np.roll(members, -1 - int(np.searchsorted(members, index)))[:-1]:
        found = _read(images, int(other))
        if not isinstance(found, Fault):
            return Reading(found, images.name(int(other)), tuple(faults))
        faults.append(found)
    complaint = f"({first.complaint}); mend the files"
    if len(members) == len(images):
        # Of one class, as all unlabelled images are: users know of none.
        raise DataError(
            f"at least one image must be readable, none of {len(members)} is {complaint}"
        )
    raise DataError(
        f"at least one image of class {target} must be readable, none of its {len(members)} is "
        f"{complaint} or remove the class"
    )


def read_or_skip(images: LabelledImages, index: int) -> Reading:
    """The image, or nothing in its place."""
    found = _read(images, index)
    if isinstance(found, Fault):
        return Reading(None, found.name, (found,))
    return Reading(found, images.name(index))


def _read(images: LabelledImages, index: int) -> Image.Image | Fault:
    try:
        return images.image(index)
    except DataError as fault:
        return Fault(images.name(index), str(fault))


Transform = Callable[[Image.Image], Tensor]
"""An RGB image of any size in, a float32 ``(3, H, W)`` tensor out; must pickle."""


class Batch(NamedTuple):
    """One rank's slice of a global batch."""

    images_B3HW: Tensor
    """float32, normalised."""

    targets_B: Tensor
    """int64: the images' classes."""

    num_global: int
    """Images of all ranks in this step: a loss weighted by B / num_global and summed over ranks and
    micro-batches is the mean over the global batch, however uneven the slices."""

    num_replaced: int
    """Images that could not be read: another stands in their place, or in evaluation none."""

    @property
    def num_images(self) -> int:
        return len(self.targets_B)

    first: int = 0
    """Where in the global batch this slice begins; 0 in evaluation."""

    names: Sequence[str] = ()
    """What each image is called, for people; of one that was replaced, the other's."""


def micro_batches(batch: Batch, num: int) -> Iterator[Batch]:
    """The batch in ``num`` parts, as even as possible; fewer where it has fewer images.

    Targets may also be soft, ``(B, K)``: mix first and split then, and accumulating over parts
    changes nothing. ``num_replaced`` stands in the first part, so that the sum is right.
    """
    num = min(num, len(batch.targets_B))
    parts = zip(batch.images_B3HW.tensor_split(num), batch.targets_B.tensor_split(num), strict=True)
    first, num_replaced = batch.first, batch.num_replaced
    for images_B3HW, targets_B in parts:
        yield Batch(images_B3HW, targets_B, batch.num_global, num_replaced, first)
        first, num_replaced = first + len(targets_B), 0


class Loaded(NamedTuple):
    """What a loader process sends."""

    batch: Batch
    faults: Sequence[Fault]


class SharedSamples(Generic[T]):
    """Whole batches of ``T`` by their keys: torch's loader asks for all of a batch at once.

    A subclass has ``__getitems__``, which gives a batch with its faults, or a DataError.
    """

    def __init__(self, images: T, sampler: ShareSampler[Any] | None, instead: str) -> None:
        """``instead`` is what becomes of an unreadable image, for people."""
        self._images = images
        self._packed: Packed[T] | None = None
        self._seed = sampler.seed if sampler else 0
        self._num_global = sampler.num_global if sampler else None
        self._first = sampler.first if sampler else 0
        self.instead = instead

    def share(self) -> None:
        """From now on a pickle of this carries the images in shared memory."""
        self._packed = pack(self._images)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._images = state["_packed"].unpack()


class Samples(SharedSamples[LabelledImages]):
    """Of images with one class each."""

    def __init__(
        self,
        images: LabelledImages,
        transform: Transform,
        *,
        read: Read,
        sampler: ShardedBatchSampler | None = None,
    ) -> None:
        instead = "the next image of its class takes its place" if sampler else "it is left out"
        super().__init__(images, sampler, instead)
        self._transform = transform
        self._read = read

    def __getitems__(self, keys: list[Key]) -> Loaded | DataError:
        pixels: list[Tensor] = []
        targets: list[int] = []
        names: list[str] = []
        faults: list[Fault] = []
        num_replaced = 0
        for epoch, index in keys:
            try:
                image, name, met = self._read(self._images, index)
            except DataError as fault:
                return fault
            faults += met
            num_replaced += bool(met)
            if image is not None:
                with seeded("augment", self._seed, epoch, index):
                    pixels.append(self._transform(image))
                targets.append(int(self._images.targets[index]))
                names.append(name)
        # In a loader process torch stacks straight into shared memory.
        images_B3HW = default_collate(pixels) if pixels else torch.empty(0, 3, 0, 0)
        num_global = self._num_global or len(targets)
        targets_B = torch.tensor(targets, dtype=torch.int64)
        batch = Batch(images_B3HW, targets_B, num_global, num_replaced, self._first, names)
        return Loaded(batch, faults)


__all__ = [
    "Batch",
    "BatchLoader",
    "EpochLoader",
    "ShardedBatchSampler",
    "eval_loader",
    "micro_batches",
    "train_loader",
]

_LOG = logging.getLogger(__name__)


class AnyBatch(Protocol):
    """What must be known of a batch to hand it on."""

    @property
    def num_replaced(self) -> int:
        """Images that could not be read."""

    @property
    def num_images(self) -> int:
        """Of this worker; an empty batch is not handed on."""


B = TypeVar("B", bound=AnyBatch)


class Order(Protocol):
    """Keys of the images of each batch; one of training also has ``set_epoch``."""

    def __iter__(self) -> Iterator[list[Any]]:
        """A batch after the other."""

    def __len__(self) -> int:
        """Batches of an epoch."""


class EpochLoader(Generic[B]):
    """An epoch of batches per iteration; unreadable files are warned of once each, with name.

    Iterating raises DataError where too many images, or all of a class, cannot be read.
    """

    def __init__(
        self,
        samples: SharedSamples[Any],
        batch_sampler: Order,
        *,
        num_samples: int,
        config: LoaderConfig,
        device_type: str = "cpu",
    ) -> None:
        """Use ``train_loader``, ``eval_loader`` or the like of another kind of batches.

        Args:
            samples: batches by their keys.
            batch_sampler: the keys.
            num_samples: images that make an epoch.
            config: loader processes, and how many images may be unreadable.
            device_type: for "cuda" batches lie in pinned memory: copy them with
                ``non_blocking=True``.
        """
        self._batch_sampler = batch_sampler
        self._num_samples = num_samples
        self._max_bad_fraction = config.max_bad_fraction
        num_workers = _num_loaders(config)
        if num_workers:
            samples.share()
        loader: Any = DataLoader(
            samples,  # type: ignore[arg-type]  # torch would have it derive from its Dataset
            batch_sampler=batch_sampler,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=device_type == "cuda",
            persistent_workers=num_workers > 0,
            prefetch_factor=_READY if num_workers else None,
            multiprocessing_context=_context() if num_workers else None,
            # Each epoch draws a seed for the processes (which use none of it): without a generator
            # of its own it would come from the global stream of the training process.
            generator=torch.Generator(),
        )
        self._loader: Iterable[tuple[B, list[Fault]] | DataError] = loader
        self._instead = samples.instead
        self._warned: set[str] = set()

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is; evaluation has no epochs."""
        if hasattr(self._batch_sampler, "set_epoch"):
            self._batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of an iteration."""
        return len(self._batch_sampler)

    def __iter__(self) -> Iterator[B]:
        num_bad = 0
        for loaded in self._loader:
            # Returned, not raised by the process: torch would put its traceback into the message.
            if isinstance(loaded, DataError):
                raise loaded
            batch, faults = loaded
            self._warn(faults)
            num_bad += batch.num_replaced
            # One is never too many, however small the set.
            if num_bad > max(1, self._max_bad_fraction * self._num_samples):
                raise DataError(
                    f"more than max-bad-fraction {self._max_bad_fraction:.3g} of "
                    f"{self._num_samples} images cannot be read: {num_bad} so far, the last: "
                    f"{faults[-1][1]}; or raise max-bad-fraction: the run then goes on"
                )
            if batch.num_images:
                yield batch

    def _warn(self, faults: Sequence[Fault]) -> None:
        for name, complaint in faults:
            if name not in self._warned:
                self._warned.add(name)
                _LOG.warning("%s; %s", complaint, self._instead)


class BatchLoader(EpochLoader[Batch]):
    """Of labelled images."""


def train_loader(
    images: LabelledImages,
    transform: Transform,
    *,
    sampler: ShardedBatchSampler,
    config: LoaderConfig,
    device_type: str = "cpu",
) -> BatchLoader:
    """The rank's batches of an epoch, in the order of ``sampler``, each image augmented by its key.

    An image that cannot be read is replaced by the next one of its class, under its own key.
    """
    samples = Samples(images, transform, read=read_or_replace, sampler=sampler)
    num_samples = len(sampler) * sampler.num_local
    return BatchLoader(
        samples, sampler, num_samples=num_samples, config=config, device_type=device_type
    )


def eval_loader(
    images: LabelledImages,
    transform: Transform,
    *,
    batch_size: int,
    workers: Workers,
    config: LoaderConfig,
) -> BatchLoader:
    """Every image once over all ranks: rank r has images r, r + size, and so on, in order.

    Ranks may differ in images and in batches: sum over the set, then over ranks, once at the end.
    ``batch_size`` is the rank's own, and so is ``num_global``. An unreadable image is left out.
    """
    mine = [(0, index) for index in range(workers.rank, len(images), workers.size)]
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    samples = Samples(images, transform, read=read_or_skip)
    return BatchLoader(
        samples,
        batches,
        num_samples=len(mine),
        config=config,
        device_type=workers.device.type,
    )


def _num_loaders(config: LoaderConfig) -> int:
    """Loader processes: as many as wanted, or four, or as many as there are cores."""
    if config.loader_workers is None:
        return min(4, len(os.sched_getaffinity(0)))
    return config.loader_workers


def _as_it_is(loaded: Any) -> Any:
    """The batch, which is whole when it leaves `Samples`."""
    return loaded


def _context() -> BaseContext:
    """How loader processes start: not as copies of a process that may hold locks.

    The training process has threads of torch, of gRPC (Ray) and perhaps CUDA; a fork of it can hang
    in a lock that some thread held. A fork server is clean, and imports once for all processes.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__, "pipeline.classification.augment"])
    return context
