"""Where others may step in between gradient and weights, and a weight decay that changes."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipeline.errors import TrainingDiverged
from pipeline.training.loop import Hooks, LoopState, StepKey, train
from pipeline.training.optim import build_optimizer, parameter_groups
from pipeline.training.workers import Workers
from tests.training.loop_runs import ALONE, CLIP, keeping, same_bits, settings
from tests.training.slow_loop import (
    NUM_GLOBAL,
    WEIGHT_DECAY,
    TinyNetwork,
    TinyTask,
    batch_indices,
    examples,
    learning_rate,
    tiny_network,
    tiny_state,
    train_slowly,
)
from tests.training.two_workers import TwoWorkers

Cuts = Sequence[Sequence[int]]


def test_weight_decay_follows_its_schedule_as_written_out() -> None:
    def decay(step: int) -> float:
        return 0.5 + 0.3 * step

    network = tiny_network()
    weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    optimizer = build_optimizer(
        parameter_groups(network, weight_decay=7.0), kind="sgd", lr=1.0, momentum=0.0
    )
    state = LoopState(network, optimizer, None, torch.amp.GradScaler("cpu", enabled=False))
    told = settings(2, weight_decay=decay, clip=0.0)
    train(TinyTask(network, ALONE), state, told, ALONE, keeping([]))

    slow = tiny_network()
    inputs_ND, labels_N = examples(torch.float64)
    for step, index in enumerate([*batch_indices(0), *batch_indices(1)]):
        slow.load_state_dict(weights)
        found = slow(inputs_ND[index], labels_N[index])
        gradients = torch.autograd.grad(found["fit"] + found["small"], [*slow.parameters()])
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            decayed = decay(step) * weight if name.endswith("weight") else 0.0
            weight -= learning_rate(step) * (gradient + decayed)
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-11, atol=1e-11, msg=name)


def test_a_schedule_that_never_changes_the_weight_decay_changes_nothing() -> None:
    states = []
    for schedule in (None, lambda step: WEIGHT_DECAY):
        network = tiny_network()
        states.append(tiny_state(network))
        told = settings(weight_decay=schedule)
        train(TinyTask(network, ALONE), states[-1], told, ALONE, keeping([]))
    first, second = (state.state_dict() for state in states)
    assert same_bits(first, second)


def gradient_norm(network: TinyNetwork) -> float:
    gradients = [weight.grad for weight in network.parameters()]
    return math.hypot(*(float(one.norm()) for one in gradients if one is not None))


def whole_gradients(workers: Workers, cuts: Cuts) -> list[float]:
    """Norms of what ``before_update`` sees, in a training that clips."""
    network, norms = tiny_network(), list[float]()

    def look(key: StepKey) -> None:
        assert key.step == len(norms)
        norms.append(gradient_norm(network))

    hooks = Hooks(lambda epoch, numbers: None, before_update=look)
    train(TinyTask(network, workers, cuts), tiny_state(network), settings(), workers, hooks)
    return norms


def test_before_an_update_the_gradient_is_whole_and_not_clipped(pair: TwoWorkers) -> None:
    wanted = train_slowly(tiny_network(), num_epochs=3, clip=CLIP).norms
    assert max(wanted) > CLIP
    assert whole_gradients(ALONE, [[3, 5]]) == pytest.approx(wanted, rel=1e-11)
    for found in pair.run(whole_gradients, ((2, 3), (3,))):
        assert found == pytest.approx(wanted, rel=1e-11)


def test_what_loses_its_gradient_before_an_update_neither_learns_nor_decays_nor_counts() -> None:
    network, history = tiny_network(), list[dict[str, float]]()
    before = copy.deepcopy(network.state_dict())
    norms: list[float] = []

    def drop_first(key: StepKey) -> None:
        for weight in network.first.parameters():
            weight.grad = None
        norms.append(gradient_norm(network))

    hooks = Hooks(lambda epoch, numbers: history.append(numbers), before_update=drop_first)
    train(TinyTask(network, ALONE), tiny_state(network), settings(1), ALONE, hooks)
    moved = {
        name for name, weight in network.state_dict().items() if (weight != before[name]).any()
    }
    assert moved == {"last.weight", "last.bias"}
    assert history[0]["grad_norm/total"] == pytest.approx(sum(norms) / len(norms), rel=1e-12)


@pytest.mark.parametrize("fault", [None, 4])
def test_after_update_comes_when_weights_and_average_have_moved_and_only_then(
    fault: int | None,
) -> None:
    network = tiny_network()
    state, told = tiny_state(network), list[tuple[str, int]]()
    before: list[Any] = []

    def moving() -> list[Any]:
        now = state.state_dict()
        return copy.deepcopy([now["objective"], now["optimizer"]["state"], now["average"]])

    def look_before(key: StepKey) -> None:
        told.append(("before", key.step))
        if before:
            # Nothing moves between two steps.
            assert same_bits(before, moving())
        before[:] = moving()

    def look_after(key: StepKey) -> None:
        told.append(("after", key.step))
        assert not any(same_bits(*both) for both in zip(before, moving(), strict=True))
        before[:] = moving()

    hooks = Hooks(
        lambda epoch, numbers: None,
        on_step=lambda key, num_images: told.append(("told", key.step)),
        before_update=look_before,
        after_update=look_after,
    )
    task = TinyTask(network, ALONE, spoiled={} if fault is None else {fault: math.nan})
    steps = 6 if fault is None else fault
    wanted = [(name, step) for step in range(steps) for name in ("before", "after", "told")]
    if fault is None:
        train(task, state, settings(2), ALONE, hooks)
    else:
        with pytest.raises(TrainingDiverged):
            train(task, state, settings(2), ALONE, hooks)
        wanted.append(("before", fault))
    assert told == wanted


def test_a_step_left_out_under_fp16_moves_nothing_that_follows_the_weights() -> None:
    network = tiny_network(torch.float32)
    # Beyond what float16 holds: the first steps only halve it.
    state = tiny_state(network, scale=2.0**22)
    weights, after, steps = [copy.deepcopy(network.state_dict())], list[int](), list[int]()

    def keep(key: StepKey, num_images: int) -> None:
        assert num_images == NUM_GLOBAL
        if not same_bits(weights[-1], network.state_dict()):
            steps.append(key.step)
        weights.append(copy.deepcopy(network.state_dict()))

    hooks = Hooks(
        lambda epoch, numbers: None, keep, after_update=lambda key: after.append(key.step)
    )
    train(TinyTask(network, ALONE), state, settings(precision="fp16"), ALONE, hooks)
    assert after == steps
    assert 0 < len(steps) < 9
