"""The random states that training passes start from: with them a step is replayed as it was.

The loop's checkpoints need none (each epoch draws anew), but a step in the middle of an epoch does.
"""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class RandomState(NamedTuple):
    """Torch's global generators before a forward pass: of the CPU, and of the GPU in use."""

    cpu: Tensor
    gpu: Tensor | None


class _Remember:
    """A forward hook that keeps the random states before the last few passes in training mode."""

    def __init__(self, num_parts: int) -> None:
        self.states: deque[RandomState] = deque(maxlen=num_parts)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self.states.append(_random_state(_device_of(inputs)))


def remember_random_states(objective: nn.Module, num_parts: int) -> None:
    """Have each training pass of ``objective`` note the random states it starts from.

    Costs microseconds and a few KiB a pass; without it a step with dropout replays with another.

    Args:
        objective: What the loop calls once for every part; its inputs begin with a tensor, or with
            a sequence that does.
        num_parts: Parts of a step: so many states are kept.
    """
    objective.register_forward_pre_hook(_Remember(num_parts))


def remembered(objective: nn.Module) -> list[RandomState]:
    """The states before the last passes, oldest first; none if nobody asked for them."""
    hooks = objective._forward_pre_hooks.values()
    return [state for hook in hooks if isinstance(hook, _Remember) for state in hook.states]


def _device_of(inputs: Any) -> torch.device:
    while not isinstance(inputs, Tensor):
        inputs = inputs[0]
    return inputs.device


def _random_state(device: torch.device) -> RandomState:
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), gpu)
