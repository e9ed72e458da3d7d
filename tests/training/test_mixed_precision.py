"""The loop under bf16 and fp16: what is computed in them, scaled, left out, and gone on with."""

import copy
import math
from typing import Any

import pytest
import torch

from pipeline.errors import TrainingDiverged
from pipeline.training.loop import Hooks, StepKey, train
from tests.training.loop_runs import ALONE, keeping, same_bits, settings
from tests.training.slow_loop import (
    TinyTask,
    tiny_network,
    tiny_state,
)


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32() -> None:
    networks = {}
    for precision in ("fp32", "bf16"):
        network = networks[precision] = tiny_network(torch.float32)
        told = settings(3, precision=precision, gradient_norm_steps=1)
        train(TinyTask(network, ALONE), tiny_state(network), told, ALONE, keeping([]))
    half, full = networks["bf16"], networks["fp32"]
    assert (half.computed_in, full.computed_in) == (torch.bfloat16, torch.float32)
    assert half.first.weight.dtype == torch.float32
    assert not torch.equal(half.first.weight, full.first.weight)
    # AdamW makes a step of every gradient's sign: a few small ones differ.
    assert (half.first.weight - full.first.weight).abs().mean() < 0.02


def train_fp16(
    scale: float,
    spoiled: dict[int, float] | None = None,
    num_epochs: int = 3,
    *,
    detect_anomaly: bool = False,
) -> tuple[list[float], list[dict[str, Any]], list[dict[str, float]]]:
    """The loss scale and the state after each step, and the history."""
    network = tiny_network(torch.float32)
    state = tiny_state(network, scale=scale)
    scales, states, history = [], [], list[dict[str, float]]()

    def keep_step(key: StepKey, num_images: int) -> None:
        scales.append(state.scaler.get_scale())
        states.append(copy.deepcopy(state.state_dict()))

    hooks = Hooks(lambda epoch, numbers: history.append(numbers), keep_step)
    task = TinyTask(network, ALONE, spoiled=spoiled or {})
    told = settings(num_epochs, precision="fp16", detect_anomaly=detect_anomaly)
    train(task, state, told, ALONE, hooks)
    assert network.computed_in == torch.float16
    return scales, states, history


def test_fp16_leaves_out_a_step_whose_gradient_overflows_and_halves_the_scale() -> None:
    # float16 ends at 65,504: the first scaled gradients do not fit.
    scales, states, history = train_fp16(2.0**20)
    weights = tiny_network(torch.float32).state_dict()
    before, left_out = 2.0**20, 0
    for scale, state in zip(scales, states, strict=True):
        skipped = same_bits(state["objective"], weights)
        assert scale == (before / 2 if skipped else before)
        left_out += skipped
        before, weights = scale, state["objective"]
    assert 0 < left_out < len(scales)
    # A step that was not made is no reason to tell an infinite norm.
    assert all(math.isfinite(one) for numbers in history for one in numbers.values())


def test_fp16_goes_on_bit_for_bit_with_its_scale() -> None:
    network, other = tiny_network(torch.float32), tiny_network(torch.float32, seed=9)
    whole, begun = tiny_state(network, scale=2.0**20), tiny_state(other, scale=1.0)
    states: list[dict[str, Any]] = []
    hooks = Hooks(lambda epoch, numbers: states.append(copy.deepcopy(whole.state_dict())))
    train(TinyTask(network, ALONE), whole, settings(4, precision="fp16"), ALONE, hooks)
    begun.load_state_dict(states[1])
    train(TinyTask(other, ALONE), begun, settings(4, precision="fp16"), ALONE, keeping([]))
    assert same_bits(begun.state_dict(), states[3])


@pytest.mark.parametrize("spoiled", [{}, {4: math.nan}])
def test_a_step_that_fp16_leaves_out_is_no_anomaly(spoiled: dict[int, float]) -> None:
    plain = train_fp16(2.0**20, spoiled)
    watched = train_fp16(2.0**20, spoiled, detect_anomaly=True)
    assert plain[0][0] < 2.0**20
    assert same_bits(watched[:2], plain[:2])


@pytest.mark.parametrize("detect_anomaly", [False, True])
def test_fp16_ends_when_no_scale_helps(detect_anomaly: bool) -> None:
    with pytest.raises(TrainingDiverged, match="example" if detect_anomaly else "detect-anomaly"):
        train_fp16(
            1.0, dict.fromkeys(range(60), math.nan), num_epochs=20, detect_anomaly=detect_anomaly
        )
