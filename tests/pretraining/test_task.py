"""DINO's task: who learns, who follows, and that nobody can tell how the work was shared."""

import copy
import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.pretraining import CropsConfig
from pipeline.config.settings import LoaderConfig
from pipeline.data.loader import Batch, ShardedBatchSampler, train_loader
from pipeline.errors import TrainingDiverged
from pipeline.pretraining.images import random_square
from pipeline.pretraining.task import Crops, DINOObjective, DINOTask
from pipeline.training.loop import StepKey
from pipeline.training.workers import Workers
from tests.losses.slow_dino import slow_terms
from tests.pretraining.dino_runs import (
    ALONE,
    BATCH,
    NUM_IMAGES,
    PROTOTYPES,
    STEPS_PER_EPOCH,
    Choice,
    Noise,
    Run,
    a_task,
    an_objective,
    largest_difference,
    of,
    teacher_momentum,
    teacher_temp,
    watched,
)
from tests.training.loop_runs import same_bits
from tests.training.two_workers import TwoWorkers

Trained = tuple[dict[str, Tensor], list[dict[str, float]]]
"""The objective's state, and the numbers of each epoch."""

LAST_LAYER = "head.last_layer."
TERMS = ("train/dino", "train/teacher_entropy", "train/divergence")


def grown_apart() -> DINOObjective:
    """Student, teacher and centre as in the midst of a training, where all three differ."""
    objective = an_objective(Choice())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for weight in objective.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        objective.center.center_K += 0.3 * torch.randn(PROTOTYPES)
    return objective


def crops_of(num_local: int = 2, images: int = 3, seed: int = 0) -> Crops:
    generator = torch.Generator().manual_seed(seed)
    sizes = [16, 16] + [8] * num_local
    views = [torch.randn(images, 3, size, size, generator=generator) for size in sizes]
    return Crops(views[:2], views[2:])


@pytest.mark.parametrize("num_local", [0, 1, 4])
def test_the_loss_is_the_written_out_one_of_the_networks_outputs(num_local: int) -> None:
    objective = grown_apart()
    crops = crops_of(num_local)
    found = objective(crops, 0.05)
    with torch.no_grad():
        # View by view, as a reader of the paper would.
        student = [objective.student(view) for view in [*crops.global_B3HW, *crops.local_B3HW]]
        teacher = [objective.teacher(view) for view in crops.global_B3HW]
    outputs = [torch.stack(views).double().numpy() for views in (student, teacher)]
    assert np.abs(outputs[0][:2] - outputs[1]).max() > 0.1
    center = objective.center.center_K.double().numpy()
    wanted = slow_terms(outputs[0], outputs[1], center, 0.1, 0.05)
    values = [found[name].item() for name in ("loss", "teacher_entropy", "divergence")]
    assert values == pytest.approx(wanted, rel=1e-5)
    assert min(wanted) > 0.01


def test_the_student_learns_and_no_gradient_reaches_teacher_or_centre() -> None:
    objective = grown_apart()
    before = copy.deepcopy(objective.state_dict())
    found = objective(crops_of(), 0.05)
    found["loss"].backward()
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]
    frozen = "student.head.last_layer.parametrizations.weight.original0"
    for name, weight in objective.named_parameters():
        learns = name.startswith("student.") and name != frozen
        assert weight.requires_grad == learns, name
        # DistributedDataParallel waits for every gradient there can be.
        assert (weight.grad is not None) == learns, name
    assert not objective.center.center_K.requires_grad
    assert not list(objective.center.parameters())
    # Looking at images moves nothing, the centre neither.
    assert same_bits(objective.state_dict(), before)


def test_the_teacher_begins_as_the_student_and_is_another_network() -> None:
    objective = an_objective(Choice())
    assert same_bits(dict(objective.student.state_dict()), dict(objective.teacher.state_dict()))
    with torch.no_grad():
        for weight in objective.student.parameters():
            weight.add_(1)
    both = objective.student.state_dict(), objective.teacher.state_dict()
    assert largest_difference(*both) == pytest.approx(1)


def test_spread_is_that_of_the_teachers_features_and_0_once_all_look_alike() -> None:
    objective = grown_apart()
    crops = crops_of(images=5)
    with torch.no_grad():
        features = torch.cat([objective.teacher.features(view) for view in crops.global_B3HW])
    columns = zip(*F.normalize(features, dim=1).tolist(), strict=True)
    deviations = [math.sqrt(np.var(column)) for column in columns]
    wanted = sum(deviations) / len(deviations) * math.sqrt(24)
    assert float(objective(crops, 0.05)["feature_std"]) == pytest.approx(wanted, rel=1e-4)
    assert 0.01 < wanted < 1
    same = torch.ones(5, 3, 16, 16)
    assert float(objective(Crops([same, same], []), 0.05)["feature_std"]) < 1e-5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_teacher_is_a_moving_average_of_the_student_written_out(optimizer: Any) -> None:
    run = Run(Choice(optimizer=optimizer, lr=0.3 if optimizer == "sgd" else 0.01)).until(2)
    assert len(run.weights) == 1 + 2 * STEPS_PER_EPOCH
    teacher = {name: value.double() for name, value in of(run.weights[0], "teacher").items()}
    for step, state in enumerate(run.weights[1:]):
        keep = teacher_momentum(step)
        for name, weight in of(state, "student").items():
            teacher[name] = keep * teacher[name] + (1 - keep) * weight.double()
        found = of(state, "teacher")
        assert largest_difference({name: w.double() for name, w in found.items()}, teacher) < 1e-6
    # It moved, and not with the student.
    assert largest_difference(found, of(run.weights[0], "teacher")) > 1e-2
    assert largest_difference(found, of(run.weights[-1], "student")) > 1e-3


def test_the_centre_is_a_moving_mean_of_the_teachers_outputs_written_out() -> None:
    run = Run(Choice(accumulate=2))
    outputs: list[Tensor] = []
    watched(run, "teacher.head", lambda module, inputs, output: outputs.append(output.clone()))
    run.until(2)
    # Two parts a step, of two views each.
    assert [len(one) for one in outputs] == [8, 6] * 2 * STEPS_PER_EPOCH
    center = torch.zeros(PROTOTYPES, dtype=torch.float64)
    for step, state in enumerate(run.weights[1:]):
        of_step = torch.cat(outputs[2 * step : 2 * step + 2]).double()
        center = 0.8 * center + 0.2 * of_step.mean(dim=0)
        torch.testing.assert_close(state["center.center_K"].double(), center, rtol=1e-5, atol=1e-6)
    assert center.abs().max() > 0.01


@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.parametrize("freeze", [0, 1, 2])
def test_prototypes_stay_as_they_are_in_the_first_epochs_and_then_move(
    freeze: int, norm_last_layer: bool
) -> None:
    """AdamW's weight decay would move them without any gradient."""
    choice = Choice(
        optimizer="adamw", lr=0.01, freeze_last_layer=freeze, norm_last_layer=norm_last_layer
    )
    states = [of(state, "student") for state in Run(choice).until(3).weights]
    first = freeze * STEPS_PER_EPOCH
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
        of_prototypes = {name for name in after if name.startswith(LAST_LAYER)}
        assert len(of_prototypes) == 2
        # All else learns from the first step on.
        wanted = set(after) - of_prototypes
        if step >= first:
            lengths = {f"{LAST_LAYER}parametrizations.weight.original0"} & of_prototypes
            wanted |= of_prototypes - (lengths if norm_last_layer else set())
        assert moved == wanted, step


def test_the_teacher_is_in_eval_mode_while_the_student_trains() -> None:
    run = Run(Choice(drop_path=0.5))
    modes: list[tuple[bool, bool]] = []
    watched(
        run,
        "teacher.backbone.blocks.1.drop_path1",
        lambda module, inputs, output: modes.append((module.training, output is inputs[0])),
    )
    students: list[bool] = []
    watched(
        run,
        "student.backbone.blocks.1.drop_path1",
        lambda module, inputs, output: students.append(torch.equal(output, inputs[0])),
    )
    run.until(1)
    assert modes == [(False, True)] * STEPS_PER_EPOCH
    # Or there would be nothing to be turned off.
    assert len(students) == 2 * STEPS_PER_EPOCH
    assert not all(students)
    assert all(module.training for module in run.task.objective.student.modules())
    assert not any(module.training for module in run.task.objective.teacher.modules())
    assert not any(module.training for module in run.task.objective.eval().modules())


def final(workers: Workers, choice: Choice) -> Trained:
    run = Run(choice, workers).until(2)
    return run.weights[-1], run.history


def assert_same_training(found: Trained, wanted: Trained) -> None:
    """Weights, teacher, centre and numbers, but for rounding."""
    for name, value in wanted[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for numbers, expected in zip(found[1], wanted[1], strict=True):
        for name in (*TERMS, "grad_norm/total"):
            assert numbers[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.fixture(scope="module")
def alone() -> Trained:
    """One worker's training, in which everything moves far beyond rounding."""
    run = Run(Choice()).until(2)
    first, last = run.weights[0], run.weights[-1]
    for name, value in last.items():
        if not name.endswith("original0"):
            assert (value - first[name]).abs().max() > 1e-3, name
    return last, run.history


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_workers_train_as_one_does(pair: TwoWorkers, alone: Trained, accumulate: int) -> None:
    first, second = pair.run(final, Choice(accumulate=accumulate))
    assert same_bits(first[0], second[0])
    assert_same_training(first, alone)


@pytest.mark.parametrize("accumulate", [2, 3, 99])
def test_cutting_a_batch_in_parts_changes_nothing(alone: Trained, accumulate: int) -> None:
    assert_same_training(final(ALONE, Choice(accumulate=accumulate)), alone)


def in_pieces(workers: Workers, choice: Choice, stops: Sequence[int]) -> dict[str, Any]:
    """Train to each of ``stops``, each time in objects built anew from what was written."""
    written = b""
    for piece, stop in enumerate(stops):
        torch.manual_seed(1000 + piece)
        # Other weights at first: none of them may be left.
        run = Run(Choice(**{**vars(choice), "weights_seed": 1 + piece}), workers)
        if written:
            run.state.load_state_dict(torch.load(io.BytesIO(written), weights_only=True))
        file = io.BytesIO()
        torch.save(run.until(stop).state.state_dict(), file)
        written = file.getvalue()
    loaded: dict[str, Any] = torch.load(io.BytesIO(written), weights_only=True)
    return loaded


ADAMW = Choice(optimizer="adamw", lr=0.003, drop_path=0.3, accumulate=2)


@pytest.mark.parametrize("stops", [(1, 3), (2, 3), (1, 2, 3)])
def test_a_stopped_run_goes_on_bit_for_bit(stops: Sequence[int]) -> None:
    whole = in_pieces(ALONE, ADAMW, [3])
    assert {name.partition(".")[0] for name in whole["objective"]} == {
        "student",
        "teacher",
        "center",
    }
    assert whole["optimizer"]["state"]
    assert same_bits(in_pieces(ALONE, ADAMW, stops), whole)


def test_a_stopped_run_of_two_workers_goes_on_bit_for_bit(pair: TwoWorkers) -> None:
    whole = pair.run(in_pieces, ADAMW, (2,))
    resumed = pair.run(in_pieces, ADAMW, (1, 2))
    for rank in range(2):
        assert same_bits(resumed[rank], whole[rank])


def test_another_seed_trains_otherwise(alone: Trained) -> None:
    """Or the tests above would compare trainings that see nothing of their images."""
    other, _ = final(ALONE, Choice(seed=4))
    assert largest_difference(of(other, "student"), of(alone[0], "student")) > 1e-3


def seen_in(task: DINOTask, epoch: int) -> list[list[Crops]]:
    """The crops of each part of each batch."""
    return [
        [
            part.inputs
            for part in task.parts(batch, StepKey(epoch, epoch * task.steps_per_epoch + index))
        ]
        for index, batch in enumerate(task.begin_epoch(epoch))
    ]


def joined(parts: Sequence[Crops]) -> list[Tensor]:
    """Every view, as if there were one part."""
    return [
        torch.cat(views) for kinds in zip(*parts, strict=True) for views in zip(*kinds, strict=True)
    ]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_workers_together_see_the_views_that_one_would(accumulate: int) -> None:
    for epoch in (0, 1):
        whole = seen_in(a_task(Choice()), epoch)
        shares = [
            seen_in(a_task(Choice(accumulate=accumulate), Workers(rank, 2, ALONE.device)), epoch)
            for rank in range(2)
        ]
        assert [len(joined(share[0])[0]) for share in shares] == [3, 4]
        for wanted, *parts in zip(whole, *shares, strict=True):
            views = joined(wanted)
            assert [tuple(view.shape) for view in views] == [
                *[(BATCH, 3, 16, 16)] * 2,
                *[(BATCH, 3, 8, 8)] * 2,
            ]
            for one, other in zip(joined([*parts[0], *parts[1]]), views, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_views_differ_with_step_seed_and_number_and_come_again() -> None:
    images = torch.randint(256, (BATCH, 3, 18, 18), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(BATCH, dtype=torch.int64), BATCH, 0)

    def views(seed: int, step: int) -> list[Tensor]:
        return joined(
            [part.inputs for part in a_task(Choice(seed=seed)).parts(batch, StepKey(0, step))]
        )

    first, second, third, fourth = views(3, 0)
    assert all(map(torch.equal, views(3, 0), (first, second, third, fourth)))
    for other in (views(3, 1), views(4, 0)):
        assert not any(map(torch.equal, other, (first, second, third, fourth)))
    assert not torch.equal(first, second)
    assert not torch.equal(third, fourth)


def test_temperature_and_momentum_are_the_epochs_own_and_are_told() -> None:
    run = Run(Choice())
    temperatures: list[float] = []
    run.task.objective.register_forward_pre_hook(
        lambda module, inputs: temperatures.append(inputs[1])
    )
    run.until(2)
    assert temperatures == [teacher_temp(epoch) for epoch in (0, 1) for _ in range(STEPS_PER_EPOCH)]
    for epoch, numbers in enumerate(run.history):
        assert numbers["teacher/temperature"] == teacher_temp(epoch)
        last = (epoch + 1) * STEPS_PER_EPOCH - 1
        assert numbers["teacher/momentum"] == teacher_momentum(last)
        loss = numbers["train/teacher_entropy"] + numbers["train/divergence"]
        assert numbers["train/dino"] == pytest.approx(loss)


def test_in_bfloat16_weights_teacher_and_centre_stay_float32_and_close() -> None:
    exact, rough = Run(Choice()).until(1), Run(Choice(precision="bf16")).until(1)
    assert {value.dtype for value in rough.weights[-1].values()} == {torch.float32}
    assert rough.history[0]["train/dino"] == pytest.approx(exact.history[0]["train/dino"], rel=0.02)
    difference = largest_difference(rough.weights[-1], exact.weights[-1])
    assert 0 < difference < 0.1


def test_without_local_views_global_ones_teach_each_other() -> None:
    crops = CropsConfig(num_local=0, global_size=16, local_size=8)
    run = Run(Choice(crops=crops)).until(1)
    assert math.isfinite(run.history[0]["train/dino"])
    student = of(run.weights[-1], "student"), of(run.weights[0], "student")
    assert largest_difference(*student) > 1e-3


SPOILT = 17


class SpoiltNoise(Noise):
    """Of which one picture says that it is to be spoilt."""

    def image(self, index: int) -> Image.Image:
        image = super().image(index)
        image.info["spoilt"] = index == SPOILT
        return image


def spoiling_square(image: Image.Image) -> Tensor:
    """A square as a task takes it, no number anywhere in the spoilt picture."""
    pixels_3HW = random_square(image, side=18).float()
    return pixels_3HW * math.nan if image.info["spoilt"] else pixels_3HW


def diverged(workers: Workers, accumulate: int) -> str:
    """What is told of a training that meets the spoilt picture."""
    training = Run(Choice(accumulate=accumulate, detect_anomaly=True), workers)
    sampler = training.task.loader._batch_sampler
    assert isinstance(sampler, ShardedBatchSampler)
    training.task.loader = train_loader(
        SpoiltNoise(), spoiling_square, sampler=sampler, config=LoaderConfig(loader_workers=0)
    )
    with pytest.raises(TrainingDiverged) as complaint:
        training.until(1)
    return str(complaint.value)


def batch_of_the_spoilt() -> tuple[int, list[str]]:
    """In epoch 0: its step, and what all its pictures are called."""
    sampler = ShardedBatchSampler(NUM_IMAGES, batch_size=BATCH, seed=Choice.seed)
    batches = [[str(index) for _, index in keys] for keys in sampler]
    return next(found for found in enumerate(batches) if str(SPOILT) in found[1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_anomaly_names_the_images_of_its_part(accumulate: int) -> None:
    step, names = batch_of_the_spoilt()
    if accumulate == 2:
        names = next(half for half in (names[:4], names[4:]) if str(SPOILT) in half)
    told = diverged(ALONE, accumulate)
    assert told.startswith(f"loss or gradient is not finite at epoch 1, step {step} (dino=nan")
    assert told.endswith(f"; images: {', '.join(names)}")


def test_the_worker_that_finds_an_anomaly_names_its_own_images(pair: TwoWorkers) -> None:
    _, names = batch_of_the_spoilt()
    shares = [names[:3], names[3:]]
    (finder,) = [rank for rank in range(2) if str(SPOILT) in shares[rank]]
    first, second = pair.run(diverged, 1)
    assert first == second
    assert f"worker {finder}: " in first
    assert f"worker {1 - finder}: " not in first
    assert first.endswith(f"; images: {', '.join(shares[finder])}")
