"""What tests of the loop share: settings of the tiny task, and states compared by their bits."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.training.loop import Hooks, LoopSettings
from pipeline.training.workers import Workers
from tests.training.slow_loop import (
    learning_rate,
)

ALONE = Workers(0, 1, torch.device("cpu"))
CLIP = 0.4


def settings(num_epochs: int = 3, **others: Any) -> LoopSettings:
    return LoopSettings(num_epochs, learning_rate, seed=3, **{"clip": CLIP, **others})


def keeping(history: list[dict[str, float]]) -> Hooks:
    return Hooks(on_epoch_end=lambda epoch, numbers: history.append(numbers))


def same_bits(first: object, second: object) -> bool:
    """Whether two nested states are equal in every bit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(
            same_bits(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        pairs = itertools.zip_longest(first, second)
        return all(same_bits(one, other) for one, other in pairs)
    return first == second
