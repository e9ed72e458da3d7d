"""Batches of labelled images for one rank: loader processes in, pinned float tensors out.

The numbers do not depend on the number of loader processes: an augmentation follows from (seed,
epoch, index), an epoch's order from (seed, epoch). What a rank sees is cut in ``sharding.py``, what
becomes of unreadable files is said in ``replacements.py``; ``samples.py`` makes a batch.

Shape letters:  B images
"""

import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from pipeline.data.labelled_images import LabelledImages
from pipeline.data.replacements import Fault, read_or_replace, read_or_skip
from pipeline.data.samples import Batch, Samples, Transform, micro_batches
from pipeline.data.sharding import ShardedBatchSampler
from pipeline.errors import DataError

__all__ = [
    "Batch",
    "BatchLoader",
    "EpochLoader",
    "LoaderOptions",
    "ShardedBatchSampler",
    "eval_loader",
    "micro_batches",
    "num_loaders",
    "train_loader",
]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How batches are made; nothing here changes a number."""

    num_workers: int = 0
    """Loader processes of this rank; 0: in the caller's thread."""

    prefetch_factor: int = 4
    """Batches that each process has ready."""

    device_type: str = "cpu"
    """For "cuda" the batches lie in pinned memory: copy them with ``non_blocking=True``."""

    max_bad_fraction: float = 0.05
    """Share of a rank's images of an epoch that may be unreadable, in [0, 1]."""


def num_loaders(wanted: int | None) -> int:
    """Loader processes of a worker: as many as wanted, or four, or as many as there are cores."""
    return min(4, len(os.sched_getaffinity(0))) if wanted is None else wanted


class AnyBatch(Protocol):
    """What must be known of a batch to hand it on."""

    @property
    def num_replaced(self) -> int:
        """Images that could not be read."""

    @property
    def num_images(self) -> int:
        """Of this worker; an empty batch is not handed on."""


B = TypeVar("B", bound=AnyBatch)


class AnySamples(Protocol):
    """A map-style data set whose ``__getitems__`` gives a batch with its faults, or a DataError."""

    instead: str
    """What becomes of an unreadable image, for people."""

    def share(self) -> None:
        """Put what is large where all loader processes see it."""


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
        samples: AnySamples,
        batch_sampler: Order,
        *,
        num_samples: int,
        options: LoaderOptions,
    ) -> None:
        """Use ``train_loader`` or ``eval_loader``; ``num_samples`` images make an epoch."""
        self._batch_sampler = batch_sampler
        self._num_samples = num_samples
        self._max_bad_fraction = options.max_bad_fraction
        if options.num_workers:
            samples.share()
        loader: Any = DataLoader(
            samples,  # type: ignore[arg-type]  # torch would have it derive from its Dataset
            batch_sampler=batch_sampler,
            collate_fn=_as_it_is,
            num_workers=options.num_workers,
            pin_memory=options.device_type == "cuda",
            persistent_workers=options.num_workers > 0,
            prefetch_factor=options.prefetch_factor if options.num_workers else None,
            multiprocessing_context=_context() if options.num_workers else None,
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
    options: LoaderOptions,
) -> BatchLoader:
    """The rank's batches of an epoch, in the order of ``sampler``, each image augmented by its key.

    An image that cannot be read is replaced by the next one of its class, under its own key.
    """
    samples = Samples(images, transform, read=read_or_replace, sampler=sampler)
    num_samples = len(sampler) * sampler.num_local
    return BatchLoader(samples, sampler, num_samples=num_samples, options=options)


def eval_loader(
    images: LabelledImages,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    options: LoaderOptions,
) -> BatchLoader:
    """Every image once over all ranks: rank r has images r, r + world_size, and so on, in order.

    Ranks may differ in images and in batches: sum over the set, then over ranks, once at the end.
    ``batch_size`` is the rank's own, and so is ``num_global``. An unreadable image is left out.
    """
    mine = [(0, index) for index in range(rank, len(images), world_size)]
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    samples = Samples(images, transform, read=read_or_skip)
    return BatchLoader(samples, batches, num_samples=len(mine), options=options)


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
    context.set_forkserver_preload(["__main__", __name__, "pipeline.data.augment"])
    return context
