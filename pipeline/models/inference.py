"""What labellers share of a forward pass: its precision, and a batch too big for the memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch

Precision = Literal["fp32", "bf16", "fp16"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@contextmanager
def in_precision(precision: Precision, device: str) -> Iterator[None]:
    """Autocast, and ``fp32`` that means it.

    On a GPU convolutions would silently round to TF32: noise of 1e-3 moves one box in forty.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    kind = device.partition(":")[0]
    with (
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        torch.autocast(kind, dtype=dtype, enabled=precision != "fp32"),
    ):
        yield


def as_fits(
    work: Callable[[Sequence[_Item]], list[_Result]],
    items: Sequence[_Item],
    *,
    refuse: Callable[[_Item], _Result],
    device: str,
) -> list[_Result]:
    """What ``work`` makes of the items; the batch is halved while memory runs out.

    Args:
        work: one result for each item.
        items: the batch.
        refuse: the result of an item that alone is too big.
        device: whose memory it is.
    """
    try:
        return work(items)
    except (MemoryError, RuntimeError) as fault:
        if not _is_out_of_memory(fault):
            raise
    # Here the failed batch's tensors are gone with the exception that held them.
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    if len(items) == 1:
        return [refuse(items[0])]
    half = len(items) // 2
    first = as_fits(work, items[:half], refuse=refuse, device=device)
    return first + as_fits(work, items[half:], refuse=refuse, device=device)


def _is_out_of_memory(fault: BaseException) -> bool:
    """Whether memory ran out; on the CPU torch says so in a plain RuntimeError."""
    if isinstance(fault, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "not enough memory" in str(fault) or "allocate memory" in str(fault)
