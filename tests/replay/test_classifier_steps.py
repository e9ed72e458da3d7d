"""A step that diverges is kept whole, and computed again it comes out as it did."""

import contextlib
import math
import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.classification.run import KIND
from pipeline.classification.setup import set_up
from pipeline.config import TrainClassifierJob
from pipeline.errors import ConfigError, StorageError, TrainingDiverged, WeightsError
from pipeline.replay.__main__ import main
from pipeline.replay.kept_step import load_step
from pipeline.replay.replaying import rebuild, replay, replay_part
from pipeline.runs.folder import RunFolder
from pipeline.runs.random_states import remember_random_states
from pipeline.runs.step_fault import keep_fault
from pipeline.storage import Location
from pipeline.training.loop import Hooks, Part, StepFault, StepKey, train
from pipeline.training.workers import Workers
from tests.data.labelled import plant_classes

CPU = torch.device("cpu")
ALONE = Workers(0, 1, CPU)
NETWORKS: dict[str, dict[str, Any]] = {
    # With dropout, stochastic depth and no state beside the weights; and with batch norm.
    "vit": {
        "name": "vit_tiny_patch16_224",
        "options": "{embed_dim: 16, depth: 2, num_heads: 2, drop_rate: 0.3}",
        "image_size": 16,
        "patch_size": 4,
        "drop_path": 0.3,
    },
    "resnet": {
        "name": "resnet10t",
        "options": "{channels: [4, 4, 8, 8], stem_width: 4}",
        "image_size": 64,
        "patch_size": None,
    },
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {f"{split}/{name}": 10 for split in ("train", "val") for name in ("cat", "dog")}
    return plant_classes(tmp_path_factory.mktemp("images"), counts)


@pytest.fixture
def tiny_job(images: Path, tmp_path: Path) -> TrainClassifierJob:
    """Two steps per epoch of a tiny network with DRLoc, in two parts each."""
    return TrainClassifierJob.model_validate(
        {
            "data": {"name": "folder", "root": str(images), "loader_workers": 0},
            "model": NETWORKS["vit"],
            "output": str(tmp_path / "runs"),
            "epochs": 3,
            "batch_size": 8,
            "num_workers": 0,
            "tracking_uri": "off",
            "drloc": {"weight": 0.5, "schedule": "constant", "num_pairs": 8, "hidden_dim": 16},
            "optim": {"warmup_epochs": 0, "accumulate": 2},
            "augment": {"rand_augment": None},
            "gradient_norm_steps": 0,
        }
    )


def with_(job: TrainClassifierJob, **changes: Any) -> TrainClassifierJob:
    """The job with some of its groups' values changed."""
    values = job.model_dump()
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return TrainClassifierJob.model_validate(values)


def run_until_fault(job: TrainClassifierJob, poison: Any = None) -> str:
    """Train by the real loop until it diverges; what it says then."""
    setup = set_up(job, ALONE)
    if poison is not None:
        poison(setup.state.objective)
    folder = RunFolder.of(job)
    hooks = Hooks(
        on_epoch_end=lambda epoch, numbers: None,
        on_fault=lambda fault: keep_fault(fault, KIND, job, folder, setup.state.objective, ALONE),
    )
    with pytest.raises(TrainingDiverged) as diverged:
        train(setup.task, setup.state, setup.settings, ALONE, hooks)
    return str(diverged.value)


def kept_in(job: TrainClassifierJob) -> Path:
    return Path(RunFolder.of(job).place.path) / "step_fault" / "rank_0000.pt"


def blow_up(objective: nn.Module) -> None:
    """Weights at which fp32 holds for a while and the second block's MLP does not."""
    with torch.no_grad():
        objective.get_parameter("classifier.network.blocks.1.mlp.fc1.weight").fill_(3e38)


def test_an_absurd_learning_rate_ends_in_one_line_that_says_how_to_replay(
    tiny_job: TrainClassifierJob, capsys: pytest.CaptureFixture[str]
) -> None:
    job = with_(tiny_job, optim={"lr": 1e30, "clip": 0.0, "kind": "sgd"})
    message = run_until_fault(job)
    assert "\n" not in message
    command = f"python -m pipeline.replay {kept_in(job)}"
    assert message.endswith(f"The step is kept: {command}")
    assert main([str(kept_in(job))]) == 8
    told = capsys.readouterr().out
    assert told.endswith("NOT FINITE on cpu in fp32\n")
    assert "largest |weight|" in told
    assert len(told.splitlines()) < 30
    assert max(map(len, told.splitlines())) < 200


@pytest.mark.parametrize("network", NETWORKS)
def test_the_replay_repeats_the_step_to_the_last_digits(
    tiny_job: TrainClassifierJob, network: str
) -> None:
    # A finite step stands in for one that is not: its numbers can be compared.
    job = with_(tiny_job, model=NETWORKS[network])
    setup = set_up(job, ALONE)
    parts, losses = list[Part](), list[dict[str, float]]()

    def keep_second(key: StepKey, num_images: int) -> None:
        if key.step == 2:
            fault = StepFault(key, parts[-2:], losses[-2:])
            setup.state.objective.load_state_dict(before[-1])
            keep_fault(fault, KIND, job, RunFolder.of(job), setup.state.objective, ALONE)
            raise KeyboardInterrupt

    before: list[dict[str, torch.Tensor]] = []
    losses_of = setup.task.losses

    def watched(network: nn.Module, part: Any) -> Any:
        if len(parts) % 2 == 0:
            state = setup.state.objective.state_dict()
            before.append({name: value.clone() for name, value in state.items()})
        found = losses_of(network, part)
        parts.append(part)
        told = {**found.terms, **found.values}
        losses.append({name: float(value.detach()) for name, value in told.items()})
        return found

    setup.task.losses = watched  # type: ignore[method-assign]
    hooks = Hooks(on_epoch_end=lambda epoch, numbers: None, on_step=keep_second)
    with pytest.raises(KeyboardInterrupt):
        train(setup.task, setup.state, setup.settings, ALONE, hooks)
    step = load_step(Location.parse(str(kept_in(job))))
    assert (step.epoch, step.step, len(step.parts)) == (1, 2, 2)
    objective = rebuild(step)
    for number in range(2):
        again = replay_part(step, number, objective, "fp32", training=True)
        assert again.is_finite
        assert again.losses["cross_entropy"] == pytest.approx(
            losses[-2 + number]["cross_entropy"], rel=1e-6
        )
        assert again.losses["drloc"] == pytest.approx(losses[-2 + number]["drloc"], rel=1e-6)
    lines, is_finite = replay(step, CPU, "fp32")
    assert is_finite
    assert "with the random numbers of then" in "\n".join(lines)
    if network == "vit":
        # The same part with other dropout: what a replay without the states would show.
        forgotten = replace(step, parts=[replace(part, random=None) for part in step.parts])
        other = replay_part(forgotten, 1, objective, "fp32", training=True)
        assert other.losses["cross_entropy"] != pytest.approx(losses[-1]["cross_entropy"], rel=1e-3)


def test_the_first_module_that_is_not_finite_is_named_with_what_it_was_given(
    tiny_job: TrainClassifierJob, capsys: pytest.CaptureFixture[str]
) -> None:
    run_until_fault(tiny_job, blow_up)
    assert main([str(kept_in(tiny_job)), "--device", "cpu"]) == 8
    told = capsys.readouterr().out
    assert "first output not finite: classifier.network.blocks.1.mlp.fc1 (Linear)\n" in told
    assert "before it came classifier.network.blocks.1.norm2 (LayerNorm)" in told
    assert "largest |weight| 3e+38 in classifier.network.blocks.1.mlp.fc1.weight" in told
    assert "gradients: " in told
    assert " not finite: " in told
    assert "largest |input| " in told


def test_another_precision_can_make_it_finite(
    tiny_job: TrainClassifierJob, capsys: pytest.CaptureFixture[str]
) -> None:
    job = with_(tiny_job, precision="fp16")
    setup = set_up(job, ALONE)
    with torch.no_grad():
        name = "classifier.network.blocks.1.mlp.fc1.bias"
        setup.state.objective.get_parameter(name).fill_(1e5)
    key = StepKey(0, 0)
    batch = next(iter(setup.task.begin_epoch(0)))
    parts = setup.task.parts(batch, key)
    fault = StepFault(key, parts, [{"cross_entropy": math.nan}] * len(parts))
    assert "The step is kept" in keep_fault(
        fault, KIND, job, RunFolder.of(job), setup.state.objective, ALONE
    )
    assert main([str(kept_in(job))]) == 8
    assert "NOT FINITE on cpu in fp16" in capsys.readouterr().out
    assert main([str(kept_in(job)), "--precision", "fp32"]) == 0
    told = capsys.readouterr().out
    assert "finite on cpu in fp32" in told
    # Nothing was computed before it was kept, so there are no random states of it.
    assert "with other random numbers" in told


def test_a_baseline_without_drloc_replays_too(tiny_job: TrainClassifierJob) -> None:
    job = with_(tiny_job, drloc={"weight": 0.0})
    run_until_fault(job, blow_up)
    step = load_step(Location.parse(str(kept_in(job))))
    assert all(part.inputs.pairs == () for part in step.parts)
    assert main([str(kept_in(job))]) == 8


def test_other_workers_keep_only_what_is_their_own(
    tiny_job: TrainClassifierJob,
) -> None:
    folder, objective = RunFolder.of(tiny_job), nn.Linear(1, 1)
    other = Workers(3, 4, CPU)
    fine = StepFault(StepKey(0, 0), [], [])
    assert "Worker 0 keeps" in keep_fault(fine, KIND, tiny_job, folder, objective, other)
    assert folder.place.child("step_fault").is_empty()
    assert keep_fault(fine, KIND, tiny_job, folder, objective, ALONE).endswith("rank_0000.pt")


def test_a_worker_whose_own_losses_are_not_finite_keeps_them(tiny_job: TrainClassifierJob) -> None:
    setup = set_up(tiny_job, ALONE)
    key = StepKey(0, 0)
    parts = setup.task.parts(next(iter(setup.task.begin_epoch(0))), key)
    fault = StepFault(key, parts, [{"cross_entropy": math.inf}, {"cross_entropy": 1.0}])
    folder = RunFolder.of(tiny_job)
    told = keep_fault(fault, KIND, tiny_job, folder, setup.state.objective, Workers(3, 4, CPU))
    assert told.endswith("rank_0003.pt")
    step = load_step(folder.place.child("step_fault").child("rank_0003.pt"))
    assert (step.rank, step.num_workers) == (3, 4)
    assert step.parts[0].losses == {"cross_entropy": math.inf}
    assert torch.equal(step.parts[1].inputs.images_B3HW, parts[1].inputs.images_B3HW)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond that, as if the disk were full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_full_disk_does_not_hide_the_divergence(tiny_job: TrainClassifierJob, size: int) -> None:
    with files_of_at_most(size):
        message = run_until_fault(tiny_job, blow_up)
    assert "loss or gradient is not finite at epoch 1, step 0" in message
    assert "The step could not be kept: " in message
    assert "File too large" in message
    assert "\n" not in message
    assert not kept_in(tiny_job).exists()


def test_what_is_no_kept_step_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"empty.pt": b"", "text.pt": b"no pickle"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"version": 2}, tmp_path / "half.pt")
    torch.save({"version": 99}, tmp_path / "newer.pt")
    torch.save({"version": 1}, tmp_path / "older.pt")
    torch.save({"version": 2, "kind": "stranger"}, tmp_path / "stranger.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"version": 2, "x": nn.Linear(1, 1)}, tmp_path / "code.pt")
    for name in ("half.pt", "newer.pt", "older.pt", "stranger.pt", "list.pt", "code.pt", *files):
        assert main([str(tmp_path / name)]) == WeightsError.exit_code
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert name in told
        assert "nothing in it was run" in told
    assert main([str(tmp_path / "gone.pt")]) == StorageError.exit_code
    assert "gone.pt" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--device", "tpu"]) == ConfigError.exit_code
    assert "--device must be cpu or cuda, got tpu" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([str(tmp_path), "--device", "cuda"]) == ConfigError.exit_code
        assert "use --device cpu" in capsys.readouterr().err


def test_random_states_are_noted_in_training_alone_and_no_more_than_needed() -> None:
    network = nn.Sequential(nn.Dropout())
    remember_random_states(network, 2)
    hook: Any = next(iter(network._forward_pre_hooks.values()))
    network.eval()(torch.ones(3))
    assert len(hook.states) == 0
    network.train()
    outputs = [network(torch.ones(8)) for _ in range(3)]
    assert len(hook.states) == 2
    torch.set_rng_state(hook.states[0].cpu)
    assert torch.equal(network(torch.ones(8)), outputs[1])
