"""Batches of images with boxes for one worker; the detector's counterpart of ``data/loader.py``.

Loader processes, pinned memory, warnings of unreadable files and the limit on them are those of
``batches.EpochLoader``. What a batch is: ``box_samples.py``; which images: ``box_sampler.py``.
"""

from pipeline.data.box_sampler import BucketBatchSampler
from pipeline.data.box_samples import BoxBatch, BoxSamples
from pipeline.data.box_table import BoxTable
from pipeline.data.box_transform import BoxTransform
from pipeline.data.loader import EpochLoader, LoaderOptions

__all__ = ["BoxBatch", "BoxLoader", "LoaderOptions", "eval_box_loader", "train_box_loader"]


class BoxLoader(EpochLoader[BoxBatch]):
    """An epoch of batches per iteration; unreadable files are warned of once each, with name.

    Iterating raises DataError where too many images cannot be read, or one is not the file that
    the boxes were made of.
    """


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
