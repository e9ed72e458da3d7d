"""Whole DINO runs: killed, continued, shared, told again, and what is made of them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

from pipeline.config import PretrainDinoJob
from pipeline.data.pseudo_labels import read_labels, read_manifest
from pipeline.models.backbones import build_vit, load_weights
from pipeline.pretraining.setup import build_objective
from pipeline.scenes.scenes import write_collection
from pipeline.storage import Location
from tests.conftest import ROOT
from tests.jobs import training
from tests.jobs.conftest import kill, wait_for
from tests.jobs.here import run_here

EPOCHS = 4
# A resumed run repeats the same sums.
SAME = 1e-6
# Two workers add float32 in another order. That is 1e-7 of a gradient, but Adam divides it by its
# own size: more is left of it (2e-7, and 2e-6 at 4 times the rate) where the exact gradient is 0,
# in the keys' biases. A weight pushed the wrong way in one step would be 2.5e-4, twice the rate.
REORDERED = 4e-6


@dataclass(frozen=True)
class Material:
    """What the runs see."""

    photos: Path
    scenes: Path
    classes: Path

    def probes(self) -> tuple[str, ...]:
        """Flags that watch a run, with places as one writes them from the repository's root."""
        scenes, classes = (os.path.relpath(place, ROOT) for place in (self.scenes, self.classes))
        return (
            *("--probe.images", f"{scenes}/images", "--probe.every", "3"),
            *("--probe.ground-truth", f"{scenes}/instances.json", "--probe.labelled", classes),
        )


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    sizes = ((96, 64), (64, 96), (80, 80))
    write_collection(folder / "scenes", num_scenes=12, seed=0, sizes=sizes)
    return Material(
        training.write_shapes(folder / "photos", 48),
        folder / "scenes",
        training.write_classes(folder / "classes", num_train=6, num_test=4),
    )


@pytest.fixture(scope="module")
def mlflow_uri(empty_mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of this module's own."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(empty_mlflow_database, folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="module")
def watched_command(
    material: Material, mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Of a run that is watched and recorded; the others are not, and must come to the same."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    flags = (*material.probes(), "--tracking-uri", mlflow_uri)
    return training.pretraining(material.photos, output, *flags)


@pytest.fixture(scope="module")
def uninterrupted(watched_command: list[str]) -> Path:
    """The output of a run that nothing happened to, without Ray."""
    done = training.here(watched_command)
    assert done.returncode == 0, done.stderr
    return Path(watched_command[watched_command.index("--output") + 1])


@pytest.fixture(scope="module")
def half(material: Material, uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, told again with a teacher of 16-bit floats."""
    output = tmp_path_factory.mktemp("half") / "whole"
    shutil.copytree(uninterrupted, output)
    done = training.here(training.pretraining(material.photos, output, "--half"))
    assert done.returncode == 0, done.stderr
    assert "finished already" in done.stdout
    return output


def teacher(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "teacher.safetensors")


def apart(one: Path, other: Path) -> float:
    """The largest difference of student, teacher, head or centre, or of the teachers' files."""
    files = training.largest_difference(teacher(one), teacher(other))
    return max(files, training.weights_apart(one, other))


def history(output: Path) -> list[dict[str, float]]:
    lines = (training.run_folder(output) / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def summary(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((training.run_folder(output) / "summary.json").read_text())
    return content


def label(
    images: Path, output: Path, checkpoint: Path, *flags: str
) -> "subprocess.CompletedProcess[str]":
    """Label with a file of weights, whose network is not named."""
    return training.here(
        [
            *(sys.executable, "jobs/label_images.py", "--images", str(images)),
            *("--output", str(output), "--backbone.checkpoint", str(checkpoint)),
            *("--compute.num-actors", "1", "--tracking-uri", "off"),
            *flags,
        ]
    )


def test_a_run_leaves_its_settings_numbers_teacher_and_curves(uninterrupted: Path) -> None:
    folder = training.run_folder(uninterrupted)
    assert summary(uninterrupted)["finished"]
    assert [one["epoch"] for one in history(uninterrupted)] == [1, 2, 3, 4]
    for name in ("config.yaml", "model/config.json", "figures/curves.png"):
        assert (folder / name).stat().st_size > 0
    inner = (folder / "model" / "teacher.safetensors").read_bytes()
    assert (uninterrupted / "teacher.safetensors").read_bytes() == inner
    state = training.final_weights(uninterrupted)
    for name, tensor in teacher(uninterrupted).items():
        assert torch.equal(tensor, state[f"teacher.backbone.{name}"]), name


def test_training_moves_the_weights_far_beyond_what_runs_may_differ_by(uninterrupted: Path) -> None:
    settings = yaml.safe_load((training.run_folder(uninterrupted) / "config.yaml").read_text())
    objective = build_objective(PretrainDinoJob.model_validate(settings), None)
    start = objective.teacher.backbone.state_dict()
    assert training.largest_difference(start, teacher(uninterrupted)) > 10 * REORDERED


def test_probes_of_every_third_and_the_last_epoch_are_in_history_and_summary(
    uninterrupted: Path,
) -> None:
    for name in ("probe/corloc", "probe/knn"):
        told = {one["epoch"]: one[name] for one in history(uninterrupted) if name in one}
        assert told.keys() == {3, 4}
        assert all(0 <= value <= 1 for value in told.values())
        assert summary(uninterrupted)["metrics"][f"{name}_last"] == told[4]


def test_the_same_command_tells_a_finished_run_again(
    watched_command: list[str], uninterrupted: Path
) -> None:
    checkpoints = training.run_folder(uninterrupted) / "checkpoints"
    before = {path: path.stat().st_mtime_ns for path in checkpoints.iterdir()}
    (uninterrupted / "teacher.safetensors").unlink()
    done = training.here(watched_command)
    assert done.returncode == 0, done.stderr
    assert "finished already" in done.stdout
    assert f"teacher  {uninterrupted / 'teacher.safetensors'}" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in checkpoints.iterdir()} == before
    assert len(history(uninterrupted)) == EPOCHS
    assert (uninterrupted / "teacher.safetensors").exists()


def test_mlflow_holds_settings_numbers_per_epoch_and_what_was_made(
    uninterrupted: Path, mlflow_uri: str, tmp_path: Path
) -> None:
    client = MlflowClient(tracking_uri=mlflow_uri)
    experiment = client.get_experiment_by_name("patchseed")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["dino.out_dim"] == "64"
    assert run.data.params["model.name"] == "vit_nano_patch8"
    assert run.data.tags["patchseed.kind"] == "dino"
    assert run.data.tags["patchseed.finished"] == "true"
    for name in ("dino", "teacher_entropy", "divergence", "feature_std"):
        told = client.get_metric_history(run.info.run_id, f"train/{name}")
        assert sorted((one.step, one.value) for one in told) == [
            (epoch["epoch"], epoch[f"train/{name}"]) for epoch in history(uninterrupted)
        ]
    folder = training.run_folder(uninterrupted)
    for name in ("model/teacher.safetensors", "figures/curves.png"):
        kept = client.download_artifacts(run.info.run_id, name, str(tmp_path))
        assert Path(kept).read_bytes() == (folder / name).read_bytes()


def test_timm_loads_the_teacher_and_sees_what_our_network_sees(uninterrupted: Path) -> None:
    theirs = timm.create_model(f"local-dir:{uninterrupted}", pretrained=True).eval()
    # Name by name: none is missing, and none was left as it was drawn.
    assert training.largest_difference(theirs.state_dict(), teacher(uninterrupted)) == 0
    file = str(uninterrupted / "teacher.safetensors")
    ours = build_vit("vit_nano_patch8", weights=load_weights("vit_nano_patch8", file)).eval()
    images_B3HW = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images_B3HW), ours(images_B3HW))


def test_a_classifier_starts_from_the_teacher(
    material: Material, uninterrupted: Path, tmp_path: Path
) -> None:
    weights = uninterrupted / "teacher.safetensors"
    done = training.run(
        material.classes,
        tmp_path / "tuned",
        *("--model.name", "vit_nano_patch8", "--model.checkpoint", str(weights)),
        *("--model.image-size", "64", "--model.patch-size", "8", "--model.options", "{}"),
        *("--epochs", "1", "--optim.warmup-epochs", "0", "--optim.lr", "1e-6"),
        *("--num-workers", "0"),
    )
    assert done.returncode == 0, done.stderr
    tuned = tmp_path / "tuned"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert summary(tuned)["started_from"] == sha256
    found = load_file(training.run_folder(tuned) / "model" / "model.safetensors")
    # A few steps of 1e-6 from where they were.
    backbone = {name: found[name] for name in teacher(uninterrupted)}
    assert 0 < training.largest_difference(backbone, teacher(uninterrupted)) < 1e-4


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_the_labeller_takes_the_teacher_unnamed_and_finds_what_the_probe_found(
    material: Material, uninterrupted: Path, tmp_path: Path
) -> None:
    weights, labels = uninterrupted / "teacher.safetensors", tmp_path / "labels"
    done = label(material.scenes / "images", labels, weights)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(Location.parse(str(labels)))
    assert manifest.config["backbone.name"] == "vit_nano_patch8"
    assert manifest.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert manifest.rows == 12
    truth = material.scenes / "instances.json"
    evaluate = ROOT / "jobs" / "evaluate_boxes.py"
    measured = run_here(evaluate, "--labels", labels, "--ground-truth", truth)
    found = json.loads(measured.stdout.splitlines()[-1])
    assert found["hits"] == round(12 * summary(uninterrupted)["metrics"]["probe/corloc_last"])


def test_a_labeller_that_names_another_network_is_refused(
    material: Material, uninterrupted: Path, tmp_path: Path
) -> None:
    weights, labels = uninterrupted / "teacher.safetensors", tmp_path / "labels"
    flags = ("--backbone.name", "vit_tiny_patch16_224")
    done = label(material.scenes / "images", labels, weights, *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ConfigError: {weights} holds weights of vit_nano_patch8")
    assert "got --backbone.name vit_tiny_patch16_224" in line
    assert not labels.exists()


def test_a_half_teacher_is_the_teacher_rounded_in_half_the_size(
    uninterrupted: Path, half: Path
) -> None:
    whole = teacher(uninterrupted)
    rounded = {name: tensor.half() for name, tensor in whole.items()}
    assert {tensor.dtype for tensor in teacher(half).values()} == {torch.float16}
    assert training.largest_difference(rounded, teacher(half)) == 0
    sizes = [(place / "teacher.safetensors").stat().st_size for place in (half, uninterrupted)]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, rel=0.01)
    # What the run itself keeps stays whole.
    assert training.weights_apart(half, uninterrupted) == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_a_half_teacher_labels_too(material: Material, half: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    done = label(material.scenes / "images" / "square", labels, half / "teacher.safetensors")
    assert done.returncode == 0, done.stderr
    assert read_labels(Location.parse(str(labels)))["status"].to_pylist() == ["ok"] * 4


def test_a_killed_driver_goes_on_to_the_teacher_of_an_uninterrupted_run(
    material: Material, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    command = training.pretraining(material.photos, output)
    process = training.begin(command, output.with_suffix(".log"))
    wait_for(lambda: training.epochs_done(output) >= 2, process)
    kill(process)
    assert 2 <= training.epochs_done(output) < EPOCHS
    assert not (output / "teacher.safetensors").exists()
    done = training.here(command)
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stdout
    assert apart(uninterrupted, output) <= SAME


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_ray_worker_is_replaced_and_the_teacher_is_the_same(
    material: Material, uninterrupted: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "worker", tmp_path / "worker.log"
    # Ray's workers live in folders of their own, and the probes' places are relative.
    flags = (*material.probes(), "--num-workers", "1")
    process = training.begin(training.pretraining(material.photos, output, *flags), log)
    wait_for(lambda: training.epochs_done(output) >= 2, process)
    training.kill_ray_worker(process)
    assert training.epochs_done(output) < EPOCHS
    assert process.wait(timeout=300) == 0, log.read_text()
    assert "going on after epoch" in log.read_text()
    assert apart(uninterrupted, output) <= SAME
    assert "probe/corloc" in history(output)[-1]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_two_ray_workers_train_the_teacher_of_one(
    material: Material, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "two"
    done = training.here(training.pretraining(material.photos, output, "--num-workers", "2"))
    assert done.returncode == 0, done.stderr
    assert summary(output)["num_workers"] == 2
    assert apart(uninterrupted, output) <= REORDERED


@pytest.mark.slow
def test_torchrun_trains_the_teacher_of_one_process(
    material: Material, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "two"
    done = training.finish(training.torchrun(training.pretraining(material.photos, output)))
    assert done.returncode == 0, done.stderr
    assert summary(output)["num_workers"] == 2
    assert apart(uninterrupted, output) <= REORDERED
