"""A detector's step that diverges is kept whole, and computed again it comes out as it did."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import TrainDetectorJob
from pipeline.detection import run as detector_run
from pipeline.detection import setup as detector_setup
from pipeline.detection.detector import Detector
from pipeline.detection.run import KIND
from pipeline.detection.setup import DetectorSetup, Start, set_up
from pipeline.detection.task import Inputs
from pipeline.errors import TrainingDiverged, WeightsError
from pipeline.replay.__main__ import main
from pipeline.replay.kept_step import KeptStep, load_step
from pipeline.replay.replaying import rebuild, replay, replay_part
from pipeline.runs.folder import RunFolder
from pipeline.runs.step_fault import keep_fault, mapped
from pipeline.storage import Location
from pipeline.training.loop import Hooks, Losses, Part, StepFault, StepKey
from pipeline.training.loop import train as train_by
from tests.detection.runs import ALONE, Material, a_job, train, write_material

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
HEAD = "roi_heads.box_head"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def tiny_job(material: Material, tmp_path: Path) -> TrainDetectorJob:
    return two_parts(material, tmp_path / "runs")


def two_parts(material: Material, output: Path, **changes: Any) -> TrainDetectorJob:
    """Steps of four images in two parts."""
    optim = {"accumulate": 2} | changes.pop("optim", {})
    return a_job(material, output, optim=optim, gradient_norm_steps=0, **changes)


def kept_in(job: TrainDetectorJob) -> Path:
    return Path(RunFolder.of(job).place.path) / "step_fault" / "rank_0000.pt"


def load(job: TrainDetectorJob) -> KeptStep:
    return load_step(Location.parse(str(kept_in(job))))


def run_until_fault(job: TrainDetectorJob) -> str:
    """The whole run until it diverges; what it says then."""
    with pytest.raises(TrainingDiverged) as diverged:
        train(job)
    return str(diverged.value)


def poison(monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    """Have the next run begin with one tensor of the detector full of ``value``."""

    def poisoned(*given: Any) -> DetectorSetup:
        setup = set_up(*given)
        setup.task.objective.state_dict()[name].fill_(value)
        return setup

    monkeypatch.setattr(detector_run, "set_up", poisoned)


Finite = tuple[KeptStep, list[Part], list[dict[str, float]]]


def keep_third_step(job: TrainDetectorJob) -> Finite:
    """The third step, kept; its parts and their losses. It is finite: its numbers compare."""
    setup = set_up(job, ALONE)
    parts, losses = list[Part](), list[dict[str, float]]()
    losses_of = setup.task.losses

    def watched(network: nn.Module, part: Part) -> Losses:
        found = losses_of(network, part)
        parts.append(part)
        losses.append({name: float(value.detach()) for name, value in found.terms.items()})
        return found

    def keep(key: StepKey) -> None:
        if key.step == 2:
            fault = StepFault(key, parts[-2:], losses[-2:])
            told = keep_fault(fault, KIND, job, RunFolder.of(job), setup.state.objective, ALONE)
            assert told.startswith("The step is kept")
            raise KeyboardInterrupt

    setup.task.losses = watched  # type: ignore[method-assign]
    hooks = Hooks(on_epoch_end=lambda epoch, numbers: None, before_update=keep)
    with pytest.raises(KeyboardInterrupt):
        train_by(setup.task, setup.state, setup.settings, ALONE, hooks)
    return load(job), parts[-2:], losses[-2:]


@pytest.fixture(scope="module")
def third_step(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Finite:
    return keep_third_step(two_parts(material, tmp_path_factory.mktemp("runs")))


def test_an_absurd_learning_rate_ends_in_one_line_that_says_how_to_replay(
    material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = two_parts(material, tmp_path / "runs", optim={"lr": 1e30, "warmup_steps": 0})
    message = run_until_fault(job)
    assert "\n" not in message
    assert message.endswith(f"The step is kept: python -m pipeline.replay {kept_in(job)}")
    assert main([str(kept_in(job))]) == 8
    told = capsys.readouterr().out
    assert told.endswith("NOT FINITE on cpu in fp32\n")
    assert "detector nano (--detector.init none) on labels" in told
    assert "largest |weight|" in told
    assert "with the random numbers of then" in told
    assert len(told.splitlines()) < 30
    # Four names of weights, which are long here, on a line.
    assert max(map(len, told.splitlines())) < 250


def test_what_is_kept_is_what_the_step_was_computed_from(third_step: Finite) -> None:
    step, parts, losses = third_step
    assert (step.epoch, step.step, len(step.parts)) == (0, 2, 2)
    assert isinstance(step.job, TrainDetectorJob)
    for kept, part, then in zip(step.parts, parts, losses, strict=True):
        inputs, given = kept.inputs, part.inputs
        assert isinstance(inputs, Inputs)
        assert (kept.num_images, kept.num_global) == (2, 4)
        assert inputs.canvas == given.canvas
        assert all(map(torch.equal, inputs.images, given.images))
        for target, its_own in zip(inputs.targets, given.targets, strict=True):
            assert target.keys() == its_own.keys()
            assert all(torch.equal(target[name], its_own[name]) for name in target)
        assert kept.losses == then
        assert then.keys() == LOSSES


def test_every_tensor_of_the_inputs_moves_to_the_device(third_step: Finite) -> None:
    images, targets, canvas = mapped(third_step[1][0].inputs, lambda one: one.to("meta"))
    tensors = [*images, *(value for target in targets for value in target.values())]
    assert [one.device.type for one in tensors] == ["meta"] * (2 + 2 * 4)
    assert canvas == third_step[1][0].inputs.canvas


def test_the_replay_repeats_the_step_whatever_torch_would_draw(third_step: Finite) -> None:
    step, _, losses = third_step
    objective = rebuild(step)
    # Each pass moves the running statistics; another time nothing else comes out.
    for number, seed in ((0, 1), (1, 2), (0, 3), (1, 4)):
        other = replace(step, job=step.job.model_copy(update={"seed": seed}))
        again = replay_part(other, number, objective, "fp32", training=True)
        assert again.is_finite
        assert again.losses == pytest.approx(losses[number], rel=1e-6)
    lines, is_finite = replay(step, torch.device("cpu"), "fp32")
    assert is_finite
    assert "with the random numbers of then" in "\n".join(lines)


def test_a_replay_needs_the_keys(third_step: Finite) -> None:
    step, _, losses = third_step
    part = step.parts[0]
    keyed = [target | {"key": target["key"] + 1} for target in part.inputs.targets]
    other = replace(step, parts=[replace(part, inputs=part.inputs._replace(targets=keyed))])
    again = replay_part(other, 0, rebuild(other), "fp32", training=True)
    assert again.losses["loss_objectness"] != pytest.approx(losses[0]["loss_objectness"], rel=1e-4)


def test_in_evaluation_mode_the_losses_are_those_of_the_running_statistics(
    third_step: Finite,
) -> None:
    step, _, losses = third_step
    objective = rebuild(step)
    again = replay_part(step, 0, objective, "fp32", training=False)
    assert again.is_finite
    assert again.losses.keys() == LOSSES
    assert again.losses != pytest.approx(losses[0], rel=1e-3)
    assert not any(module.training for module in objective.modules())
    for name, value in objective.state_dict().items():
        assert torch.equal(value, step.objective[name]), name


@pytest.mark.parametrize(
    ("name", "first"),
    [
        # What makes proposals, and what only regions pass through.
        ("backbone.layer1.0.conv1.weight", "backbone.layer1.0.conv1 (Conv2d)"),
        (f"{HEAD}.layer4.0.conv1.weight", f"{HEAD}.layer4.0.conv1 (Conv2d)"),
    ],
)
def test_the_first_module_that_is_not_finite_is_named(
    tiny_job: TrainDetectorJob,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    first: str,
) -> None:
    poison(monkeypatch, name, math.inf)
    assert "loss or gradient is not finite at epoch 1, step 0" in run_until_fault(tiny_job)
    step = load(tiny_job)
    assert any(math.isnan(value) for value in step.parts[0].losses.values())
    again = replay_part(step, 0, rebuild(step), "fp32", training=True)
    assert again.losses == pytest.approx(step.parts[0].losses, rel=1e-6, nan_ok=True)
    assert main([str(kept_in(tiny_job))]) == 8
    told = capsys.readouterr().out
    assert f"first output not finite: {first}\n" in told
    weights = next(line for line in told.splitlines() if line.startswith("weights before it: "))
    assert f" not finite: {name}" in weights


VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {"detector": {"norm": "frozen", "freeze_at": 2}},
    "pooled": {"detector": {"norm": "pooled", "weight_by_score": True, "droploss": 0.01}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_norms_and_losses_replay_too(
    material: Material, tmp_path: Path, variant: str
) -> None:
    step, _, losses = keep_third_step(two_parts(material, tmp_path, **VARIANTS[variant]))
    objective = rebuild(step)
    for number in range(2):
        again = replay_part(step, number, objective, "fp32", training=True)
        assert again.losses == pytest.approx(losses[number], rel=1e-6)


def test_the_number_of_classes_is_that_of_the_kept_weights(
    tiny_job: TrainDetectorJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = detector_setup.build

    def with_three(job: TrainDetectorJob, start: Start, *, num_classes: int) -> Detector:
        return build(job, start, num_classes=3)

    monkeypatch.setattr(detector_setup, "build", with_three)
    step, _, losses = keep_third_step(tiny_job)
    objective = rebuild(step)
    assert isinstance(objective, Detector)
    assert objective.options.num_classes == 3
    again = replay_part(step, 0, objective, "fp32", training=True)
    assert again.losses == pytest.approx(losses[0], rel=1e-6)


def test_a_step_without_the_weights_of_classes_is_refused(third_step: Finite) -> None:
    step, _, _ = third_step
    without: dict[str, Tensor] = {
        name: value for name, value in step.objective.items() if "cls_score" not in name
    }
    with pytest.raises(WeightsError, match="number of classes"):
        rebuild(replace(step, objective=without))
