"""A DINO step that diverges is kept whole, and computed again it comes out as it did."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import PretrainDinoJob
from pipeline.errors import TrainingDiverged
from pipeline.pretraining import dino_run
from pipeline.pretraining.dino_run import KIND, pretrain_dino_here
from pipeline.pretraining.dino_setup import DINOSetup, set_up
from pipeline.replay.__main__ import main
from pipeline.replay.kept_step import KeptStep, load_step
from pipeline.replay.replaying import rebuild, replay, replay_part
from pipeline.runs.folder import RunFolder
from pipeline.runs.life import Outside
from pipeline.runs.step_fault import keep_fault
from pipeline.storage import Location
from pipeline.training.loop import Hooks, Losses, Part, StepFault, StepKey, train
from pipeline.training.workers import Workers
from tests.data.pictures import encode

CPU = torch.device("cpu")
ALONE = Workers(0, 1, CPU)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of noise."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(8):
        pixels = draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        (root / f"{number}.png").write_bytes(encode(pixels, "PNG"))
    return root


def a_job(images: Path, output: Path) -> PretrainDinoJob:
    """Two steps per epoch in two parts each, with stochastic depth and a changing temperature."""
    return PretrainDinoJob.model_validate(
        {
            "images": [str(images)],
            "output": str(output),
            "epochs": 3,
            "batch_size": 4,
            "num_workers": 0,
            "loader_workers": 0,
            "tracking_uri": "off",
            "model": {"name": "vit_nano_patch8", "drop_path": 0.5},
            "dino": {
                "out_dim": 32,
                "hidden_dim": 16,
                "bottleneck_dim": 8,
                "warmup_teacher_temp": 0.02,
                "teacher_temp": 0.08,
                "warmup_teacher_temp_epochs": 2,
            },
            "crops": {"num_local": 2, "global_size": 32, "local_size": 16},
            "optim": {"warmup_epochs": 0, "accumulate": 2},
            "gradient_norm_steps": 0,
        }
    )


@pytest.fixture
def tiny_job(images: Path, tmp_path: Path) -> PretrainDinoJob:
    return a_job(images, tmp_path / "runs")


def kept_in(job: PretrainDinoJob) -> Path:
    return Path(RunFolder.of(job).place.path) / "step_fault" / "rank_0000.pt"


def load(job: PretrainDinoJob) -> KeptStep:
    return load_step(Location.parse(str(kept_in(job))))


def run_until_fault(job: PretrainDinoJob) -> str:
    """The whole run until it diverges; what it says then."""
    with pytest.raises(TrainingDiverged) as diverged:
        pretrain_dino_here(job, RunFolder.of(job), ALONE, Outside(lambda line: None))
    return str(diverged.value)


@pytest.fixture(scope="module")
def third_step(
    images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[KeptStep, list[dict[str, float]]]:
    """The first step of the second epoch, and its parts' losses.

    It is finite, and stands in for one that is not: its numbers can be compared.
    """
    job = a_job(images, tmp_path_factory.mktemp("runs"))
    setup = set_up(job, ALONE)
    parts, losses = list[Part](), list[dict[str, float]]()
    losses_of = setup.task.losses

    def watched(network: nn.Module, part: Part) -> Losses:
        found = losses_of(network, part)
        told = {**found.terms, **found.values}
        parts.append(part)
        losses.append({name: float(value.detach()) for name, value in told.items()})
        return found

    def keep(key: StepKey) -> None:
        setup.task.before_update(key)
        if key.step == 2:
            fault = StepFault(key, parts[-2:], losses[-2:])
            keep_fault(fault, KIND, job, RunFolder.of(job), setup.state.objective, ALONE)
            raise KeyboardInterrupt

    setup.task.losses = watched  # type: ignore[method-assign]
    hooks = Hooks(
        on_epoch_end=lambda epoch, numbers: None,
        before_update=keep,
        after_update=setup.task.after_update,
    )
    with pytest.raises(KeyboardInterrupt):
        train(setup.task, setup.state, setup.settings, ALONE, hooks)
    return load(job), losses[-2:]


def test_an_absurd_learning_rate_ends_in_one_line_that_says_how_to_replay(
    tiny_job: PretrainDinoJob, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = tiny_job.optim.model_copy(update={"lr": 1e30, "clip": 0.0})
    job = tiny_job.model_copy(update={"optim": optim})
    message = run_until_fault(job)
    assert "\n" not in message
    command = f"python -m pipeline.replay {kept_in(job)}"
    assert message.endswith(f"The step is kept: {command}")
    assert main([str(kept_in(job))]) == 8
    told = capsys.readouterr().out
    assert told.endswith("NOT FINITE on cpu in fp32\n")
    assert "vit_nano_patch8 on photos" in told
    assert "largest |weight|" in told
    assert "with the random numbers of then" in told
    assert len(told.splitlines()) < 30
    assert max(map(len, told.splitlines())) < 200


def test_the_replay_repeats_the_step_to_the_last_digits(
    third_step: tuple[KeptStep, list[dict[str, float]]],
) -> None:
    step, losses = third_step
    assert (step.epoch, step.step, len(step.parts)) == (1, 2, 2)
    assert step.objective["center.center_K"].abs().max() > 0
    objective = rebuild(step)
    # Each pass adds to the centre's sums; another time nothing else comes out.
    for number in (0, 1, 0, 1):
        again = replay_part(step, number, objective, "fp32", training=True)
        assert again.is_finite
        assert again.losses == pytest.approx(losses[number], rel=1e-6, abs=1e-7)
    lines, is_finite = replay(step, CPU, "fp32")
    assert is_finite
    assert "with the random numbers of then" in "\n".join(lines)
    assert "teacher's temperature 0.05" in lines[0]


def test_a_replay_needs_the_random_states_and_the_epoch(
    third_step: tuple[KeptStep, list[dict[str, float]]],
) -> None:
    step, losses = third_step
    forgotten = replace(step, parts=[replace(part, random=None) for part in step.parts])
    for other in (forgotten, replace(step, epoch=0)):
        again = replay_part(other, 1, rebuild(other), "fp32", training=True)
        assert again.losses["dino"] != pytest.approx(losses[1]["dino"], rel=1e-4)


def test_the_first_module_that_is_not_finite_is_named_with_what_it_was_given(
    tiny_job: PretrainDinoJob,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "student.backbone.blocks.5.mlp.fc1"

    def poisoned(*given: Any) -> DINOSetup:
        setup = set_up(*given)
        with torch.no_grad():
            setup.task.objective.get_parameter(f"{name}.weight").fill_(3e38)
        return setup

    monkeypatch.setattr(dino_run, "set_up", poisoned)
    assert "loss or gradient is not finite at epoch 1, step 0" in run_until_fault(tiny_job)
    assert main([str(kept_in(tiny_job))]) == 8
    told = capsys.readouterr().out
    assert f"first output not finite: {name} (Linear)\n" in told
    assert "before it came student.backbone.blocks.5.norm2 (LayerNorm)" in told
    assert f"largest |weight| 3e+38 in {name}.weight" in told
    assert " not finite: " in told


def test_a_compiled_run_replays_uncompiled(tiny_job: PretrainDinoJob) -> None:
    job = tiny_job.model_copy(update={"compile": True})
    setup = set_up(tiny_job, ALONE)
    key = StepKey(0, 0)
    parts = setup.task.parts(next(iter(setup.task.begin_epoch(0))), key)
    fault = StepFault(key, parts, [{"dino": 1.0}] * len(parts))
    keep_fault(fault, KIND, job, RunFolder.of(job), setup.state.objective, ALONE)
    objective = rebuild(load(job))
    assert all(module._compiled_call_impl is None for module in objective.modules())
