"""Whole detector runs: killed, continued, shared, refused, and their rounds."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.pseudo_labels import manifest_sha256, read_labels
from pipeline.detection.exported_detector import load_detector
from pipeline.storage import Location
from tests.detection.runs import Material, copy_of, rows_of, write_material
from tests.jobs import training
from tests.jobs.conftest import kill, wait_for
from tests.tables import write_table

WINDOWS = 3
# A resumed run repeats the same sums.
SAME = 1e-6
# Two workers add float32 in another order: 2e-7 of weights and running statistics was seen, 5e-7
# after 6 steps. Four steps move the weights by thousandths, and a worker that normalised its own
# images alone, or counted a gradient twice, would be as far off.
REORDERED = 1e-5


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


def detecting(material: Material, output: Path, *flags: str) -> list[str]:
    """A nano detector's run of 3 windows of 4 steps."""
    return [
        *(sys.executable, "jobs/train_detector.py", "--preset", "nano"),
        *("--labels", str(material.labels), "--output", str(output), "--num-workers", "0"),
        *("--steps", "12", "--windows", str(WINDOWS), "--precise-bn", "2", "--batch-size", "4"),
        *("--loader-workers", "0", "--tracking-uri", "off", "--gradient-norm-steps", "3"),
        *flags,
    ]


def probes(material: Material) -> tuple[str, ...]:
    return (
        *("--probe.images", str(material.images), "--probe.every", "2"),
        *("--probe.ground-truth", str(material.truth)),
    )


@pytest.fixture(scope="module")
def watched_command(material: Material, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run that is watched; the others are not, and must come to the same."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    return detecting(material, output, *probes(material))


@pytest.fixture(scope="module")
def uninterrupted(watched_command: list[str]) -> Path:
    """The output of a run that nothing happened to, without Ray."""
    done = training.here(watched_command)
    assert done.returncode == 0, done.stderr
    return Path(watched_command[watched_command.index("--output") + 1])


def detector(output: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_detector(str(output)).detector.state_dict()
    return state


def apart(one: Path, other: Path) -> float:
    """The largest difference of any weight, trained or written."""
    files = training.largest_difference(detector(one), detector(other))
    return max(files, training.weights_apart(one, other))


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def test_the_output_holds_the_detector_and_what_it_finds_is_told(
    material: Material, uninterrupted: Path
) -> None:
    folder = training.run_folder(uninterrupted)
    for name in ("model.safetensors", "config.json"):
        assert (uninterrupted / name).read_bytes() == (folder / "model" / name).read_bytes()
    found = load_detector(str(uninterrupted)).predict(material.photos()[0])
    assert len(found) > 0
    assert np.diff(found.scores_D).max() <= 0


def test_the_same_command_tells_a_finished_run_again(
    watched_command: list[str], uninterrupted: Path
) -> None:
    checkpoints = training.run_folder(uninterrupted) / "checkpoints"
    before = {path: path.stat().st_mtime_ns for path in checkpoints.iterdir()}
    (uninterrupted / "model.safetensors").unlink()
    done = training.here(watched_command)
    assert done.returncode == 0, done.stderr
    assert "finished already" in done.stdout
    corloc = summary(training.run_folder(uninterrupted))["metrics"]["probe/corloc_last"]
    assert f"corloc   {corloc:.2%}" in done.stdout
    assert f"detector {uninterrupted}" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in checkpoints.iterdir()} == before
    assert (uninterrupted / "model.safetensors").exists()


def test_a_killed_driver_goes_on_to_the_weights_of_an_uninterrupted_run(
    material: Material, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    command = detecting(material, output)
    process = training.begin(command, output.with_suffix(".log"))
    wait_for(lambda: training.epochs_done(output) >= 1, process)
    kill(process)
    assert 1 <= training.epochs_done(output) < WINDOWS
    assert not (output / "config.json").exists()
    done = training.here(command)
    assert done.returncode == 0, done.stderr
    assert apart(uninterrupted, output) <= SAME


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_ray_worker_is_replaced_and_the_weights_are_the_same(
    material: Material, uninterrupted: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "worker", tmp_path / "worker.log"
    flags = (*probes(material), "--num-workers", "1")
    process = training.begin(detecting(material, output, *flags), log)
    wait_for(lambda: training.epochs_done(output) >= 1, process)
    training.kill_ray_worker(process)
    assert training.epochs_done(output) < WINDOWS
    assert process.wait(timeout=300) == 0, log.read_text()
    assert apart(uninterrupted, output) <= SAME


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Scenes of one size. Images are padded to the largest one of their worker's share, and what
    lies beside the image counts in batch norm: of mixed sizes, two shares are not one batch."""
    return write_material(tmp_path_factory.mktemp("squares"), sizes=((112, 112),))


def sharing(squares: Material, output: Path, *flags: str) -> list[str]:
    """Four steps at a constant rate: later a rounding error would choose other regions."""
    return detecting(
        squares,
        output,
        *("--data.short-sides", "112", "--steps", "4", "--windows", "2"),
        *("--optim.warmup-steps", "0", "--optim.lr", "0.01"),
        *flags,
    )


@pytest.fixture(scope="module")
def of_one(squares: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of such a run by one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    done = training.here(sharing(squares, output))
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_two_ray_workers_train_the_detector_of_one(
    squares: Material, of_one: Path, tmp_path: Path
) -> None:
    output = tmp_path / "two"
    done = training.here(sharing(squares, output, "--num-workers", "2"))
    assert done.returncode == 0, done.stderr
    assert summary(training.run_folder(output))["num_workers"] == 2
    assert apart(of_one, output) <= REORDERED


@pytest.mark.slow
def test_torchrun_trains_the_detector_of_one_process(
    squares: Material, of_one: Path, tmp_path: Path
) -> None:
    output = tmp_path / "two"
    done = training.finish(training.torchrun(sharing(squares, output, *probes(squares))))
    assert done.returncode == 0, done.stderr
    assert summary(training.run_folder(output))["num_workers"] == 2
    assert apart(of_one, output) <= REORDERED
    # Both look at the photos, each at its own, and one of them tells.
    assert done.stdout.count("corloc ") == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_a_second_round_learns_from_what_the_first_one_found_too(
    material: Material, tmp_path: Path
) -> None:
    output = tmp_path / "rounds"
    # A detector this young is sure of nothing.
    flags = ("--rounds", "2", "--self-training.min-score", "0.1")
    done = training.here(detecting(material, output, *flags))
    assert done.returncode == 0, done.stderr
    assert "round 1 of 2" in done.stdout
    assert "round 2 of 2" in done.stdout
    folders = [path for path in output.iterdir() if path.is_dir()]
    first, second = sorted(folders, key=lambda path: "round2" in path.name)
    detections = first / "detections"
    assert set(read_labels(Location.parse(str(detections)))["method"].to_pylist()) == {"cad"}
    sources = summary(second)["labels"]
    assert [one["place"] for one in sources] == [str(material.labels), str(detections)]
    assert [one["manifest_sha256"] for one in sources] == [
        manifest_sha256(Location.parse(one["place"])) for one in sources
    ]
    assert len(summary(first)["labels"]) == 1
    assert summary(second)["started_from"]["source"] == str(first / "model")
    model = (second / "model" / "model.safetensors").read_bytes()
    assert (output / "model.safetensors").read_bytes() == model
    again = training.here(detecting(material, output, *flags))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished already") >= 2


def test_rounds_are_refused_under_torchrun(material: Material, tmp_path: Path) -> None:
    output = tmp_path / "rounds"
    # As torchrun tells its processes; a second one would only wait for the first.
    done = training.here(detecting(material, output, "--rounds", "2"), WORLD_SIZE="1")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("ConfigError: --rounds must be 1 under torchrun, got 2")
    assert not output.exists()


def test_a_table_without_a_usable_box_is_refused_in_one_line_and_leaves_no_folder(
    material: Material, tmp_path: Path
) -> None:
    mine = copy_of(material, tmp_path)
    write_table(mine.labels, rows_of(mine, boxes=[[5.0, 5.0, 5.0, 9.0]]))
    done = training.here(detecting(mine, tmp_path / "runs"))
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert "got none in 12 rows (left out: images: 12 no_usable_box; boxes: 12 degenerate)" in line
    assert list((tmp_path / "runs").glob("*")) == []


def test_a_rate_that_blows_up_ends_in_one_line_and_exit_code_8(
    material: Material, tmp_path: Path
) -> None:
    done = training.here(detecting(material, tmp_path / "runs", "--optim.lr", "1e30"))
    assert done.returncode == 8, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("TrainingDiverged: loss or gradient is not finite at epoch 1, step ")
