"""Which images each rank sees in each step of each epoch.

Global batches follow from (seed, epoch) alone and are cut into one slice per rank, so that the same
images meet in a step whatever the number of ranks.
"""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch.utils.data import Sampler

from pipeline.data.seeding import key_of
from pipeline.errors import ConfigError, DataError

Key = tuple[int, int]
"""(epoch, index of the image): loader processes that live on learn the epoch from it."""

K = TypeVar("K")


class ShareSampler(Sampler[list[K]]):
    """One rank's shares of global batches, as lists of keys ``K``; a subclass says of which ones.

    Shares are contiguous and in whole groups, at most one group apart in length, and never empty;
    where a batch is no whole number of groups, its last share ends with a part of one.
    """

    def __init__(
        self, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0, group: int = 1
    ) -> None:
        """Cut batches for ``rank``.

        Args:
            batch_size: Of the global batch: the shares of all ranks together.
            rank: Whose shares.
            world_size: Number of ranks.
            seed: Of the order.
            group: Neighbours that stay together: 2 with Mixup, which mixes pairs.

        Raises:
            ConfigError: the global batch is too small to give every rank a group.
            ValueError: ``rank`` is not in [0, world_size).
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        # A group may be incomplete, so the last rank needs one image of its own and no more.
        self._least = (world_size - 1) * group + 1
        """Images that a global batch must have."""

        self._of_whom = f"{world_size} workers" + f" in groups of {group}" * (group > 1)
        if batch_size < self._least:
            raise ConfigError(
                f"batch_size must be at least {self._least} for {self._of_whom}, got {batch_size}; "
                "raise it or use fewer workers"
            )
        self.seed = seed
        self.num_global = batch_size
        self._share, self._group = (rank, world_size), group
        self._epoch = 0

    @property
    def first(self) -> int:
        """Where in the global batch this rank's share begins."""
        return self._edge(self._share[0])

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self._edge(self._share[0] + 1)

    def _edge(self, rank: int) -> int:
        num_groups = -(-self.num_global // self._group)
        return min(num_groups * rank // self._share[1] * self._group, self.num_global)

    @property
    def num_local(self) -> int:
        """Images of this rank in a step."""
        return self.stop - self.first

    def set_epoch(self, epoch: int) -> None:
        """What the next iteration goes through; an iteration already begun keeps its epoch."""
        self._epoch = epoch


class ShardedBatchSampler(ShareSampler[Key]):
    """One rank's slices of an epoch's global batches, as lists of (epoch, index).

    The last global batch is dropped where it would be incomplete; a set smaller than a batch is one
    batch.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        group: int = 1,
    ) -> None:
        """Cut batches of a set of ``num_images``; see ``ShareSampler``.

        Raises:
            ConfigError: the global batch is too small to give every rank a group.
            DataError: the set is.
            ValueError: ``rank`` is not in [0, world_size).
        """
        super().__init__(batch_size, rank=rank, world_size=world_size, seed=seed, group=group)
        if num_images < self._least:
            raise DataError(
                f"the training set must have at least {self._least} images for {self._of_whom}, "
                f"got {num_images}; use fewer workers"
            )
        self.num_images = num_images
        self.num_global = min(batch_size, num_images)

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self.num_images // self.num_global

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self._epoch
        generator = torch.Generator().manual_seed(key_of("order", self.seed, epoch))
        order = torch.randperm(self.num_images, generator=generator)
        for step in range(len(self)):
            begin = step * self.num_global
            mine = order[begin + self.first : begin + self.stop]
            yield [(epoch, index) for index in mine.tolist()]
