"""Which images meet in each step of a detector's training, for ever and on each worker.

Images come in endless permutations; each falls into the bucket of its shape, and a bucket that is
full is the next global batch (as Detectron2 trains: images of one orientation pad each other
little). The sequence follows from (seed, batch size, buckets) alone, and each worker takes its own
share of every batch, so the number of workers changes nothing. An epoch is a window of it: to
resume, the sequence is gone through again from its beginning, which takes integers only.

To sort images otherwise: give other numbers of buckets.

Shape letters:  N images   K batches   B images of a global batch
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.seeding import key_of
from pipeline.data.sharding import ShareSampler
from pipeline.errors import ConfigError, DataError

BoxKey = tuple[int, int, int]
"""(step, place in the global batch, index of the image); the first two seed its augmentation."""


class BucketBatchSampler(ShareSampler[BoxKey]):
    """One worker's shares of the global batches of an epoch: steps of it, not a pass over the set.

    All images of a batch are of one bucket. Every image comes once in a pass, but the last images
    of a pass may share a batch with the first of the next; a bucket with fewer images than a batch
    fills it over several passes, so that an image may be twice in it.
    """

    def __init__(
        self,
        bucket_N: NDArray[np.generic],
        *,
        batch_size: int,
        steps_per_epoch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        """Cut batches for ``rank``.

        Args:
            bucket_N: The bucket of each image, ``BoxTable.is_wide_N`` or zeros for one bucket.
            batch_size: Of the global batch: the shares of all workers together.
            steps_per_epoch: Batches of an epoch.
            rank: Whose shares.
            world_size: Number of workers.
            seed: Of the order.

        Raises:
            ConfigError: a worker would have no image, or an epoch no step.
            DataError: there are no images.
            ValueError: ``rank`` is not in [0, world_size).
        """
        super().__init__(batch_size, rank=rank, world_size=world_size, seed=seed)
        if steps_per_epoch < 1:
            raise ConfigError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        if not len(bucket_N):
            raise DataError("the training set must have at least 1 image, got 0")
        numbers, bucket_of_N = np.unique(bucket_N, return_inverse=True)
        self._bucket_N = bucket_of_N
        self._num_buckets = len(numbers)
        self._steps_per_epoch = steps_per_epoch

    def __len__(self) -> int:
        """Steps of an epoch, the same on every worker."""
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[list[BoxKey]]:
        begin = self._epoch * self._steps_per_epoch
        batches = itertools.islice(self._batches_from(begin), self._steps_per_epoch)
        for step, batch_B in enumerate(batches, begin):
            mine = enumerate(batch_B[self.first : self.stop].tolist(), self.first)
            yield [(step, place, index) for place, index in mine]

    def _batches_from(self, step: int) -> Iterator[NDArray[np.int64]]:
        """The endless sequence of global batches from number ``step`` on."""
        waiting = [np.zeros(0, np.int64)] * self._num_buckets
        passed = 0
        for number in itertools.count():
            order_N = self._permutation(number)
            batches_KB, waiting = self._fill(order_N, waiting)
            # Passes before the window are counted and not looked at.
            yield from batches_KB[max(0, step - passed) :]
            passed += len(batches_KB)

    def _permutation(self, number: int) -> NDArray[np.int64]:
        generator = torch.Generator().manual_seed(key_of("box order", self.seed, number))
        order_N: NDArray[np.int64] = torch.randperm(
            len(self._bucket_N), generator=generator
        ).numpy()
        return order_N

    def _fill(
        self, order_N: NDArray[np.int64], waiting: list[NDArray[np.int64]]
    ) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
        """The batches that become full while ``order_N`` comes in, and what waits afterwards."""
        bucket_N = self._bucket_N[order_N]
        full, full_at, rest = [], [], []
        for bucket, already in enumerate(waiting):
            (at,) = np.nonzero(bucket_N == bucket)
            queue = np.concatenate([already, order_N[at]])
            num_full = len(queue) // self.num_global
            cut = num_full * self.num_global
            full.append(queue[:cut].reshape(num_full, self.num_global))
            # A batch is full when its last image comes in, which is never one that waited.
            last = np.arange(1, num_full + 1) * self.num_global - 1 - len(already)
            full_at.append(at[last])
            rest.append(queue[cut:])
        return np.concatenate(full)[np.argsort(np.concatenate(full_at))], rest
