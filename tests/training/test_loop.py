"""The loop against its arithmetic written out, cut in parts, over workers, stopped, and spoiled."""

import copy
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import TrainingDiverged
from pipeline.training.anomalies import Anomaly, AnomalyWatch
from pipeline.training.loop import Hooks, LoopSettings, StepKey, seed_epoch, train
from pipeline.training.workers import Workers
from tests.training.loop_runs import ALONE, CLIP, keeping, same_bits, settings
from tests.training.slow_loop import (
    NUM_GLOBAL,
    STEPS_PER_EPOCH,
    TinyTask,
    batch_indices,
    learning_rate,
    name_of,
    tiny_network,
    tiny_state,
    train_slowly,
)
from tests.training.two_workers import TwoWorkers

WHOLE = ((NUM_GLOBAL,),)
Cuts = Sequence[Sequence[int]]


def trained(
    workers: Workers, cuts: Cuts = WHOLE, num_epochs: int = 3, **others: Any
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The state and the history of a training of the tiny network in float64."""
    network = tiny_network()
    state, history = tiny_state(network), list[dict[str, float]]()
    train(
        TinyTask(network, workers, cuts),
        state,
        settings(num_epochs, **others),
        workers,
        keeping(history),
    )
    return copy.deepcopy(state.state_dict()), history


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], within: float) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=within, atol=within, msg=name)


def assert_same_history(
    found: Sequence[Mapping[str, float]], wanted: Sequence[Mapping[str, float]], within: float
) -> None:
    assert len(found) == len(wanted)
    for numbers, expected in zip(found, wanted, strict=True):
        assert {name: numbers[name] for name in expected} == pytest.approx(expected, rel=within)


@pytest.mark.parametrize(
    ("dtype", "clip", "within"),
    [
        (torch.float64, CLIP, 1e-11),
        (torch.float64, 0.0, 1e-11),
        (torch.float32, CLIP, 2e-4),
    ],
)
def test_training_equals_a_loop_written_out(dtype: torch.dtype, clip: float, within: float) -> None:
    network = tiny_network(dtype)
    wanted = train_slowly(copy.deepcopy(network), num_epochs=4, clip=clip)
    if clip:
        # Otherwise clipping all, or nothing, would pass.
        assert min(wanted.norms) < clip < max(wanted.norms)
    state, history = tiny_state(network), list[dict[str, float]]()

    train(TinyTask(network, ALONE), state, settings(4, clip=clip), ALONE, keeping(history))

    assert_same(network.state_dict(), wanted.weights, within)
    averaged = state.state_dict()["average"]
    assert_same(
        {name: averaged[f"module.{name}"] for name in wanted.average}, wanted.average, within
    )
    assert_same_history(history, wanted.history, within)
    assert state.next_epoch == 4


def test_cutting_a_batch_in_parts_changes_nothing_however_uneven() -> None:
    whole, history = trained(ALONE)
    for cut in ([4, 4], [3, 3, 2], [1, 6, 1], [7, 1]):
        state, numbers = trained(ALONE, [cut])
        assert_same(state["objective"], whole["objective"], 1e-11)
        assert_same_history(numbers, [_without_speed(one) for one in history], 1e-11)


def _without_speed(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: one for name, one in numbers.items() if name != "train/images_per_second"}


@pytest.mark.parametrize(
    "cuts", [((4,), (4,)), ((5,), (3,)), ((1,), (7,)), ((2, 2), (2, 2)), ((3, 1, 1), (2, 1))]
)
def test_two_workers_equal_one_at_the_same_global_batch(pair: TwoWorkers, cuts: Cuts) -> None:
    wanted = train_slowly(tiny_network(), num_epochs=3, clip=CLIP)
    (first, told_first), (second, told_second) = pair.run(trained, cuts)
    assert_same(first["objective"], wanted.weights, 1e-11)
    # Means over all images of all workers, on both.
    assert_same_history(told_first, wanted.history, 1e-11)
    assert_same_history(told_second, wanted.history, 1e-11)
    assert same_bits(first, second)


def run_in_pieces(
    workers: Workers, cuts: Cuts, stops: Sequence[int]
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train to each of ``stops``, each time in objects built anew from what was written."""
    written, history = b"", list[dict[str, float]]()
    for piece, stop in enumerate(stops):
        # Another start, another past of the generators: neither may matter.
        network = tiny_network(dropout=0.4, seed=1 + piece)
        torch.manual_seed(1000 + piece)
        state = tiny_state(network)
        if written:
            state.load_state_dict(torch.load(io.BytesIO(written), weights_only=True))
        task = TinyTask(network, workers, cuts)
        train(task, state, settings(stop), workers, keeping(history))
        file = io.BytesIO()
        torch.save(state.state_dict(), file)
        written = file.getvalue()
    return torch.load(io.BytesIO(written), weights_only=True), history


@pytest.mark.parametrize("stops", [(1, 5), (3, 5), (1, 2, 4, 5)])
def test_a_stopped_run_goes_on_bit_for_bit(stops: Sequence[int]) -> None:
    whole, history = run_in_pieces(ALONE, WHOLE, [5])
    resumed, told = run_in_pieces(ALONE, WHOLE, stops)
    assert same_bits(resumed, whole)
    assert list(map(_without_speed, told)) == list(map(_without_speed, history))


def test_a_stopped_run_of_two_workers_goes_on_bit_for_bit(pair: TwoWorkers) -> None:
    cuts = ((2, 3), (3,))
    whole = pair.run(run_in_pieces, cuts, (4,))
    resumed = pair.run(run_in_pieces, cuts, (2, 4))
    for rank in range(2):
        assert same_bits(resumed[rank][0], whole[rank][0])


def test_dropout_differs_from_epoch_to_epoch_and_with_the_seed() -> None:
    """Or the test above would pass with a generator that is never moved."""

    def final(seed: int, epochs: Sequence[int]) -> Tensor:
        network = tiny_network(dropout=0.4)
        masks = []
        network.dropout.register_forward_hook(lambda *seen: masks.append(seen[2] == 0))
        state = tiny_state(network)
        state.next_epoch = epochs[0]
        told = LoopSettings(epochs[-1] + 1, learning_rate, seed=seed)
        train(TinyTask(network, ALONE), state, told, ALONE, keeping([]))
        return torch.stack(masks)

    both = final(3, [0, 1])
    assert not torch.equal(both[:STEPS_PER_EPOCH], both[STEPS_PER_EPOCH:])
    assert torch.equal(final(3, [1]), both[STEPS_PER_EPOCH:])
    assert not torch.equal(final(4, [1]), both[STEPS_PER_EPOCH:])


@dataclass
class Fall:
    """What a training that ended in TrainingDiverged left."""

    complaint: str
    steps: list[int]
    untouched: bool
    """Whether weights, average and moments are as after the last good step."""


def run_into_fault(
    workers: Workers,
    cuts: Cuts,
    spoiled: dict[int, float],
    added: dict[int, float],
    detect_anomaly: bool = False,
) -> Fall:
    network = tiny_network()
    state = tiny_state(network)
    fall = Fall("", [], False)
    kept: list[dict[str, Any]] = []

    def keep_step(key: StepKey, num_images: int) -> None:
        assert num_images == NUM_GLOBAL
        fall.steps.append(key.step)
        kept.append(copy.deepcopy(state.state_dict()))

    hooks = Hooks(lambda epoch, numbers: None, keep_step)
    task = TinyTask(network, workers, cuts, spoiled=spoiled, added=added)
    told = settings(detect_anomaly=detect_anomaly)
    with pytest.raises(TrainingDiverged) as complaint:
        train(task, state, told, workers, hooks)
    fall.complaint = str(complaint.value)
    assert "\n" not in fall.complaint
    fall.untouched = same_bits(_without_rates(kept[-1]), _without_rates(state.state_dict()))
    return fall


def _without_rates(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state, "optimizer": state["optimizer"]["state"]}


AT_STEP_4 = "loss or gradient is not finite at epoch 2, step 4 ("


# An infinite input makes the gradient NaN though tanh of it, and so the loss, is finite; an
# infinite summand leaves the gradient finite.
@pytest.mark.parametrize("spoiled", [{4: math.nan}, {4: math.inf}, {}])
@pytest.mark.parametrize("cut", [[8], [4, 4]])
@pytest.mark.parametrize("detect_anomaly", [False, True])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_any_weight_moved(
    spoiled: dict[int, float], cut: Sequence[int], detect_anomaly: bool
) -> None:
    added = {} if spoiled else {4: math.inf}
    fall = run_into_fault(ALONE, [cut], spoiled, added, detect_anomaly)
    assert fall.steps == [0, 1, 2, 3]
    assert fall.untouched
    assert fall.complaint.startswith(AT_STEP_4)
    advised = "the same command with --detect-anomaly meets this step again and names its images"
    assert fall.complaint.endswith(advised) is not detect_anomaly


def names_at_step_4() -> list[str]:
    return [name_of(example) for example in list(batch_indices(1))[1].tolist()]


@pytest.mark.parametrize(
    ("spoiled", "added", "losses", "operation"),
    [
        ({4: math.nan}, {}, "fit=nan small=nan", "PowBackward0 of forward "),
        # An infinite summand leaves the gradient as it is.
        ({}, {4: math.inf}, "fit=inf", None),
    ],
)
def test_an_anomaly_is_told_with_its_operation_and_the_images_of_its_part(
    spoiled: dict[int, float], added: dict[int, float], losses: str, operation: str | None
) -> None:
    complaint = run_into_fault(ALONE, [[3, 5]], spoiled, added, detect_anomaly=True).complaint
    assert complaint.endswith("; images: " + ", ".join(names_at_step_4()[3:]))
    assert losses in complaint
    place = r"the gradient ceased to be finite in (.*)\(training/slow_loop.py:\d+\); images: "
    found = re.search(place, complaint)
    assert operation == (found and found[1])


def test_an_infinite_gradient_of_a_finite_loss_is_found_and_where_it_was_called() -> None:
    watch, weight = AnomalyWatch(), torch.tensor([0.0, 1.0], requires_grad=True)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        loss = ((weight * 2).sqrt() + 1).sum()
    watch.add(loss, {"loss": loss}, ["a"])
    loss.backward()  # type: ignore[no-untyped-call]
    assert watch.all_losses_finite
    (found,) = watch.first_met(ALONE).values()
    assert found.losses == {"loss": pytest.approx(math.sqrt(2) + 2)}
    assert found.operation.startswith("SqrtBackward0 of test_an_infinite_gradient")
    assert "(training/test_loop.py:" in found.operation


@pytest.mark.parametrize("spoiled", [{4: math.nan}, {}])
@pytest.mark.parametrize("detect_anomaly", [False, True])
def test_a_fault_on_one_worker_stops_both_before_any_weight_moved(
    pair: TwoWorkers, spoiled: dict[int, float], detect_anomaly: bool
) -> None:
    # The last input lies on worker 1, in the last of its parts.
    cuts = ((2, 2), (3, 1))
    added = {} if spoiled else {4: math.inf}
    falls = pair.run(run_into_fault, cuts, spoiled, added, detect_anomaly)
    for fall in falls:
        assert fall.steps == [0, 1, 2, 3]
        assert fall.untouched
        assert fall.complaint.startswith(AT_STEP_4)
    first, second = (fall.complaint for fall in falls)
    if detect_anomaly:
        # Whoever is heard tells of the one that found it.
        assert first == second
        assert first.endswith(f"images: {names_at_step_4()[-1]}")
        assert "worker 1: " in first
        assert "worker 0: " not in first
    else:
        lost = "fit=nan" if spoiled else "fit=inf"
        assert [lost in first, lost in second] == [False, True]


def test_a_gradient_too_large_only_as_a_whole_names_the_images_of_all_its_parts() -> None:
    watch, weight = AnomalyWatch(), torch.ones(1, requires_grad=True)
    for name in ("a", "b"):
        loss = (weight * 2e38).sum()
        watch.add(loss, {"loss": loss}, [name])
        loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.nn.utils.get_total_norm([weight.grad]) == math.inf
    assert watch.all_losses_finite
    (found,) = watch.first_met(ALONE).values()
    assert (found.operation, found.images) == ("", ["a", "b"])


def test_many_images_are_not_all_told() -> None:
    told = Anomaly({}, "", [str(number) for number in range(23)]).describe()
    assert told.endswith("18, 19, ... and 3 more")
    assert Anomaly({}, "", ["a"] * 20).describe().endswith("a, a")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_watching_for_anomalies_moves_no_weight(precision: str) -> None:
    plain, watched = (
        trained(ALONE, [[3, 5]], precision=precision, detect_anomaly=detect, gradient_norm_steps=2)
        for detect in (False, True)
    )
    assert same_bits(plain[0], watched[0])
    assert list(map(_without_speed, plain[1])) == list(map(_without_speed, watched[1]))


def test_watching_for_anomalies_moves_no_weight_of_two_workers(pair: TwoWorkers) -> None:
    cuts = ((2, 3), (3,))
    plain, watched = (pair.run(_trained_watched, cuts, detect) for detect in (False, True))
    for rank in range(2):
        assert same_bits(plain[rank][0], watched[rank][0])


def _trained_watched(
    workers: Workers, cuts: Cuts, detect_anomaly: bool
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    return trained(workers, cuts, detect_anomaly=detect_anomaly)


@pytest.mark.parametrize("cut", [[8], [3, 5]])
def test_measuring_gradient_norms_moves_no_weight(cut: Sequence[int]) -> None:
    plain, history = trained(ALONE, [cut])
    measured, told = trained(ALONE, [cut], gradient_norm_steps=2)
    assert same_bits(measured, plain)
    for numbers, expected in zip(told, history, strict=True):
        wanted = _without_speed(expected)
        assert {name: numbers[name] for name in wanted} == wanted
        # The steps divisible by 2: 0 and 2, then 4, then 6 and 8.
        assert {"grad_norm/fit", "grad_norm/small"} <= numbers.keys()


def test_gradient_norms_are_those_of_each_term_alone() -> None:
    wanted = train_slowly(tiny_network(), num_epochs=3, clip=CLIP).norms_of_terms
    _, history = trained(ALONE, gradient_norm_steps=2)
    assert_same_norms(history, wanted)


@pytest.mark.parametrize("cuts", [((4,), (4,)), ((5,), (3,))])
def test_gradient_norms_of_two_workers_are_those_of_the_global_batch(
    pair: TwoWorkers, cuts: Cuts
) -> None:
    wanted = train_slowly(tiny_network(), num_epochs=3, clip=CLIP).norms_of_terms
    plain = pair.run(_trained_with_norms, cuts, 0)
    measured = pair.run(_trained_with_norms, cuts, 2)
    for rank in range(2):
        assert same_bits(measured[rank][0], plain[rank][0])
        assert_same_norms(measured[rank][1], wanted)


def _trained_with_norms(
    workers: Workers, cuts: Cuts, every: int
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    return trained(workers, cuts, gradient_norm_steps=every)


def assert_same_norms(
    history: Sequence[Mapping[str, float]], wanted: Sequence[Mapping[str, float]]
) -> None:
    for epoch, numbers in enumerate(history):
        first = epoch * STEPS_PER_EPOCH
        measured = [step for step in range(first, first + STEPS_PER_EPOCH) if step % 2 == 0]
        for term in ("fit", "small"):
            mean = sum(wanted[step][term] for step in measured) / len(measured)
            assert numbers[f"grad_norm/{term}"] == pytest.approx(mean, rel=1e-6)


def test_the_hooks_are_told_of_every_step_and_epoch() -> None:
    network = tiny_network()
    steps: list[tuple[StepKey, int]] = []
    epochs: list[tuple[int, float, float]] = []
    hooks = Hooks(
        lambda epoch, told: epochs.append((epoch, told["weight"], told["train/images_per_second"])),
        lambda key, num_images: steps.append((key, num_images)),
    )
    state = tiny_state(network)
    state.next_epoch = 1
    train(TinyTask(network, ALONE), state, settings(3), ALONE, hooks)
    assert steps == [(StepKey(step // 3, step), NUM_GLOBAL) for step in range(3, 9)]
    assert [one[:2] for one in epochs] == [(1, 11.0), (2, 12.0)]
    assert all(speed > 0 for _, _, speed in epochs)


def drawn_after(seed: int, epoch: int, rank: int) -> float:
    with torch.random.fork_rng():
        seed_epoch(seed, epoch, rank)
        return float(torch.rand((), dtype=torch.float64))


def test_seed_epoch_depends_on_each_of_its_numbers() -> None:
    keys = list(itertools.product((0, 1, 2, 1000), (0, 1, 2, 299), (0, 1, 2, 7)))
    assert len({drawn_after(*key) for key in keys}) == len(keys)
    assert drawn_after(1, 2, 3) == drawn_after(1, 2, 3)


@pytest.mark.parametrize("seed", [20_000_000, 2**32 - 1, 2**63 - 1])
def test_seed_epoch_takes_every_seed_that_a_job_takes(seed: int) -> None:
    assert drawn_after(seed, 0, 0) != drawn_after(seed, 1, 0)


@pytest.mark.slow
def test_gradient_norms_can_be_measured_of_a_compiled_network() -> None:
    network = tiny_network(torch.float32)
    plain = copy.deepcopy(network)
    network.compile()
    histories: list[list[dict[str, float]]] = []
    for one in (plain, network):
        histories.append([])
        told = settings(1, gradient_norm_steps=2)
        train(TinyTask(one, ALONE), tiny_state(one), told, ALONE, keeping(histories[-1]))
    assert_same(network.state_dict(), plain.state_dict(), 1e-4)
    assert_same_history(histories[1], [_without_speed(one) for one in histories[0]], 1e-4)
