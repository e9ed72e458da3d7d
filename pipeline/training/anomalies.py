"""What ``--detect-anomaly`` finds in a step that is not finite: where it began, in which images.

Autograd's anomaly mode remembers for each operation where the forward pass called it. Its own check
for NaN is not used: it raises in the middle of a backward pass, where other workers wait for this
one's gradients, and it takes an overflow for a fault that fp16 would leave out. Here each operation
is looked at as its gradient comes by, infinite ones too, and the step goes on to where the loop
judges it.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pipeline.training.workers import Workers

_MOST_IMAGES = 20
_FRAME = re.compile(r'File "(?P<path>.*)", line (?P<line>\d+), in (?P<function>.*)')


@dataclass(frozen=True)
class Anomaly:
    """A worker's first part in which something was not finite."""

    losses: Mapping[str, float]
    operation: str
    """Where the gradient, finite until then, ceased to be; empty where it did not."""

    images: Sequence[str]
    since: tuple[int, int] = (0, 0)
    """The number of the part, and of the operation in its backward pass; 0 is the loss itself."""

    def describe(self) -> str:
        """As the end of a sentence."""
        origin = f"the gradient ceased to be finite in {self.operation}; " if self.operation else ""
        more = len(self.images) - _MOST_IMAGES
        shown = ", ".join(self.images[:_MOST_IMAGES]) + (f", ... and {more} more" * (more > 0))
        return f"{origin}images: {shown}"


@dataclass(frozen=True)
class _Watched:
    losses: Mapping[str, Tensor]
    images: Sequence[str]
    loss_is_finite: bool
    operations: Sequence[tuple[int, str]]
    """Those that spoilt a gradient, by their numbers; filled while it is computed."""


class AnomalyWatch:
    """Looks at one step of one worker, part by part."""

    def __init__(self) -> None:
        self._parts: list[_Watched] = []

    def add(self, loss: Tensor, losses: Mapping[str, Tensor], images: Sequence[str]) -> None:
        """Look at a part whose gradient is about to be computed.

        Args:
            loss: What ``backward`` will be called on, or comes from.
            losses: What it is made of, by name.
            images: The names of the part's images.
        """
        operations: list[tuple[int, str]] = []
        _look_at_operations(loss, operations)
        finite = bool(torch.isfinite(loss.detach()))
        self._parts.append(_Watched(losses, images, finite, operations))

    @property
    def all_losses_finite(self) -> bool:
        """Whether those of all parts so far are."""
        return all(part.loss_is_finite for part in self._parts)

    def first_met(self, workers: Workers) -> dict[int, Anomaly]:
        """By rank, the same on all workers, which all must ask.

        Of those that found something first, as norms over all workers spread it; of all where none
        did, because only the sum of their gradients is too large.
        """
        told = workers.gathered((self._first(), self._all()))
        found = {rank: first for rank, (first, _) in enumerate(told) if first is not None}
        if not found:
            return {rank: whole for rank, (_, whole) in enumerate(told)}
        since = min(one.since for one in found.values())
        return {rank: one for rank, one in found.items() if one.since == since}

    def _first(self) -> Anomaly | None:
        for number, part in enumerate(self._parts):
            if part.operations or not part.loss_is_finite:
                place, operation = part.operations[0] if part.operations else (0, "")
                since = (number, place if part.loss_is_finite else 0)
                return Anomaly(_floats(part), operation, part.images, since)
        return None

    def _all(self) -> Anomaly:
        return Anomaly(
            _floats(self._parts[0]), "", [n for part in self._parts for n in part.images]
        )


def _floats(part: _Watched) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in part.losses.items()}


def _look_at_operations(loss: Tensor, found: list[tuple[int, str]]) -> None:
    """Have each operation of the graph add itself to ``found`` when it spoils the gradient."""
    seen: set[Node] = set()
    count = itertools.count(1)
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # A weight's own node has no next one; it may outlive the step, and so would its hook.
        if node.next_functions:
            node.register_hook(_looking(node, count, found))
            ahead.extend(following for following, _ in node.next_functions)


def _looking(node: Node, count: Iterator[int], found: list[tuple[int, str]]) -> Callable[..., None]:
    # Not the node itself: a hook that held it would keep the graph alive.
    metadata: Any = node.metadata
    name, called_at = node.name(), metadata.get("traceback_", [])

    def look(given: Sequence[Tensor | None], received: Sequence[Tensor | None]) -> None:
        number = next(count)
        if _are_finite(received) and not _are_finite(given):
            found.append((number, f"{name}{_place(called_at)}"))

    return look


def _are_finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether their norms are, as the loop asks of the whole gradient's."""
    return all(
        math.isfinite(
            torch.linalg.vector_norm(one, dtype=torch.promote_types(one.dtype, torch.float32))
        )
        for one in gradients
        if one is not None
    )


def _place(stack: Sequence[str]) -> str:
    """The innermost function of a stack that is not torch's own, as `` of NAME (FILE:LINE)``."""
    frames = [frame for entry in stack if (frame := _FRAME.search(entry)) is not None]
    for frame in reversed(frames):
        parts = frame["path"].replace("\\", "/").split("/")
        if "torch" not in parts:
            return f" of {frame['function']} ({'/'.join(parts[-2:])}:{frame['line']})"
    return ""
