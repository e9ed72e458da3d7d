"""Batches of images with boxes for one worker; the detector's counterpart of ``batches.py``.

Loader processes, pinned memory, warnings of unreadable files and the limit on them are those of
``batches.BatchLoader``. What a batch is: ``box_samples.py``; which images: ``box_sampler.py``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from pipeline.data.batches import BatchLoader, LoaderOptions
from pipeline.data.box_sampler import BoxKey, BucketBatchSampler
from pipeline.data.box_samples import BoxBatch, BoxSamples
from pipeline.data.box_table import BoxTable
from pipeline.data.box_transform import BoxTransform

__all__ = ["BoxBatch", "BoxLoader", "LoaderOptions", "eval_box_loader", "train_box_loader"]


class BoxLoader:
    """An epoch of batches per iteration; unreadable files are warned of once each, with name.

    Iterating raises DataError where too many images cannot be read, or one is not the file that
    the boxes were made of.
    """

    def __init__(
        self,
        samples: BoxSamples,
        batches: BucketBatchSampler | Sequence[list[BoxKey]],
        *,
        num_samples: int,
        options: LoaderOptions,
    ) -> None:
        """Use ``train_box_loader`` or ``eval_box_loader``."""
        self._batches = batches
        # It looks at nothing in which these differ from a classifier's.
        self._loader = BatchLoader(
            cast(Any, samples), cast(Any, batches), num_samples=num_samples, options=options
        )

    def set_epoch(self, epoch: int) -> None:
        """Which window of the steps the next iteration is; evaluation has no epochs."""
        if isinstance(self._batches, BucketBatchSampler):
            self._batches.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of an iteration."""
        return len(self._loader)

    def __iter__(self) -> Iterator[BoxBatch]:
        return cast(Iterator[BoxBatch], iter(self._loader))


def train_box_loader(
    table: BoxTable, transform: BoxTransform, *, sampler: BucketBatchSampler, options: LoaderOptions
) -> BoxLoader:
    """The worker's batches of an epoch, in the order of ``sampler``.

    An image that cannot be read is replaced by the next one of its orientation, under its own key.
    """
    samples = BoxSamples(table, transform, sampler=sampler)
    num_samples = len(sampler) * sampler.num_local
    return BoxLoader(samples, sampler, num_samples=num_samples, options=options)


def eval_box_loader(
    table: BoxTable,
    transform: BoxTransform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    options: LoaderOptions,
) -> BoxLoader:
    """Every image once over all workers: worker r has images r, r + world_size, and so on.

    ``batch_size`` is the worker's own, and so is ``num_global``. An unreadable image is left out.
    """
    mine = [(0, index, index) for index in range(rank, len(table), world_size)]
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    return BoxLoader(BoxSamples(table, transform), batches, num_samples=len(mine), options=options)
