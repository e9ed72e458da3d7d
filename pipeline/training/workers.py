"""Who trains together: this process alone, or the ranks of a process group.

The group is whoever started it: nobody (a notebook, ``--num-workers 0``), torchrun, or Ray Train.
The loop asks here and never there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process among those that train together, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes and tells."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over all workers, on each of them."""
        if self.size > 1:
            value = value.to(self.device, copy=True)
            dist.all_reduce(value)
        return value

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all workers, on each of them."""
        if self.size == 1:
            return list(values)
        box = torch.tensor(values, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return [int(value) for value in box.tolist()]

    def totals(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums of several numbers, in one exchange; all workers give the same names."""
        names = sorted(values)
        # gloo and nccl both carry doubles, so counts stay exact.
        sums = self.total(
            torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
        )
        return dict(zip(names, sums.tolist(), strict=True))

    def from_first(self, value: Any) -> Any:
        """What rank 0 gave, on every worker; anything that pickles."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0, device=self.device)
            return box[0]
        return value

    def gathered(self, value: Any) -> list[Any]:
        """What each worker gave, in the order of their ranks, on every worker; anything that
        pickles.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Return once all workers are here."""
        if self.size > 1:
            dist.barrier()


def current_workers(device: torch.device | None = None) -> Workers:
    """The process group that is initialised, or this process alone.

    Args:
        device: What this process computes on; None is the CPU.
    """
    device = device or torch.device("cpu")
    if dist.is_available() and dist.is_initialized():
        return Workers(dist.get_rank(), dist.get_world_size(), device)
    return Workers(0, 1, device)
