"""Whole sweeps on a real local Ray: killed, continued, with trials that die."""

import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.jobs import training
from tests.jobs.conftest import kill, wait_for
from tests.tuning import spaces

SLOW = spaces.SCORED.replace(
    "def run(values, report):", "def run(values, report):\n    import time; time.sleep(0.4)"
)

CLASSIFIER = """
from ray import tune
JOB, METRIC, MODE, PICK = "classifier", "val/accuracy", "max", "best"
SPACE = {"optim.lr": tune.loguniform(1e-4, 1e-2)}
GRID = {"optim.lr": [0.003]}
"""


def command(space: Path, output: Path, *flags: str) -> list[str]:
    head = [sys.executable, "jobs/tune.py", "--space", str(space), "--output", str(output)]
    return [*head, "--tracking-uri", "off", *flags]


def lines(sweep: Path, name: str = "trials.jsonl") -> list[dict[str, Any]]:
    file = sweep / name
    return [json.loads(one) for one in file.read_text().splitlines()] if file.exists() else []


def test_a_wrong_space_is_told_in_one_line_before_anything_starts(tmp_path: Path) -> None:
    space = spaces.write(tmp_path, "METRIC = 'm'")
    done = training.here(command(space, tmp_path / "sweeps"))
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: --space space: JOB must be one of classifier")
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_a_trial_whose_process_is_killed_is_noted_and_the_others_are_run(tmp_path: Path) -> None:
    space = spaces.write(tmp_path, spaces.KILLING)
    flags = ("--search", "grid", "--name", "s")
    done = training.here(command(space, tmp_path, *flags))
    assert done.returncode == 0, done.stderr
    reasons = {one["values"]["fault"]: one["reason"] for one in lines(tmp_path / "s")}
    assert reasons == {
        "raise": "RuntimeError: broken on purpose",
        "nan": "score is not finite: nan",
        "kill": "the trial's process died: killed, or out of memory",
        "memory": "MemoryError: no memory on purpose",
        "none": None,
    }
    assert not list((tmp_path / "s").glob("_ray-*"))
    again = training.here(command(space, tmp_path, *flags))
    assert again.returncode == 5
    assert "holds a sweep already: --resume s goes on with it" in again.stderr


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_asha_stops_the_trials_that_are_behind_and_ends(tmp_path: Path) -> None:
    space = spaces.write(tmp_path, spaces.FALLING)
    flags = ("--search", "grid", "--scheduler", "asha", "--max-concurrent", "1", "--name", "s")
    done = training.here(command(space, tmp_path, *flags))
    assert done.returncode == 0, done.stderr
    found = lines(tmp_path / "s")
    assert len(found) == 8
    assert Counter(one["status"] for one in found)["stopped"] >= 6
    assert found[0]["status"] == "ok"
    assert found[0]["metric"] == 63
    assert all(one["epochs"] < 9 for one in found if one["status"] == "stopped")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("times", [1, 3])
def test_a_sweep_killed_again_and_again_loses_no_trial_and_repeats_none(
    tmp_path: Path, times: int, request: pytest.FixtureRequest
) -> None:
    if times > 1:
        # Killed once, the sweep takes a Ray of its own with it; again and again, it leaves one.
        request.getfixturevalue("on_tests_ray")
    space, sweep = spaces.write(tmp_path, SLOW), tmp_path / "s"
    flags: tuple[str, ...] = ("--num-samples", "14", "--name", "s", "--max-concurrent", "2")
    for number in range(1, times + 1):
        process = training.begin(command(space, tmp_path, *flags), tmp_path / "log")
        wait_for(lambda least=3 * number: len(lines(sweep)) >= least, process)  # type: ignore[misc]
        kill(process)
        kept = lines(sweep)
        assert len(kept) < 14
        flags = ("--resume", "s", "--max-concurrent", "2")
    done = training.here(command(space, tmp_path, *flags))
    assert done.returncode == 0, done.stderr
    assert f"going on after {len(kept)} trials" in done.stdout
    found = lines(sweep)
    assert found[: len(kept)] == kept
    assert sorted(one["number"] for one in found) == list(range(1, 15))
    assert len({json.dumps(one["values"]) for one in found}) == 14
    assert {one["status"] for one in found} == {"ok"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_address")
def test_trials_of_two_workers_are_stopped_and_their_workers_make_room(tmp_path: Path) -> None:
    """On two cores each trial needs both: one whose workers outlived it would hang the next.

    The sweep has a Ray of its own, and the tests' is the second one of this machine: Ray's clean-up
    must know whose it is.
    """
    pictures = training.write_classes(tmp_path / "pictures")
    source = CLASSIFIER.replace("[0.003]", "[0.003, 1e-7, 2e-7]")
    space, sweep = spaces.write(tmp_path, source), tmp_path / "s"
    settings = training.settings(pictures)
    flags = [*("--search", "grid", "--name", "s", "--trial-workers", "2", "--max-concurrent", "1")]
    asha = ["--scheduler", "asha", "--grace-epochs", "2", "--reduction-factor", "2"]
    done = training.finish(command(space, tmp_path, *flags, *asha, "--set", *settings))
    assert done.returncode == 0, done.stderr
    first, *others = lines(sweep)
    assert (first["status"], first["epochs"]) == ("ok", 6)
    assert [one["status"] for one in others] == ["stopped"] * 2
    # The word to stop takes its time to reach two workers: an epoch more may have been ended.
    assert all(2 <= one["epochs"] < 6 for one in others)
    summary = json.loads((Path(first["folder"]) / "summary.json").read_text())
    assert summary["num_workers"] == 2
    assert summary["metrics"]["val/accuracy_best"] == first["metric"]
    assert not list(sweep.glob("_ray-*"))


@pytest.mark.slow
def test_a_killed_sweeps_training_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    pictures = training.write_classes(tmp_path / "pictures")
    space, sweep = spaces.write(tmp_path, CLASSIFIER), tmp_path / "s"
    here = ("--max-concurrent", "0")
    flags = ("--search", "grid", "--name", "s", *here, "--set", *training.settings(pictures))
    process = training.begin(command(space, tmp_path, *flags), tmp_path / "log")
    wait_for(lambda: training.epochs_done(sweep / "runs") >= 2, process)
    kill(process)
    assert lines(sweep) == []
    history = training.run_folder(sweep / "runs") / "history.jsonl"
    before = history.read_text().splitlines()[:1]
    done = training.here(command(space, tmp_path, "--resume", "s", *here))
    assert done.returncode == 0, done.stderr
    (trial,) = lines(sweep)
    assert (trial["status"], trial["epochs"]) == ("ok", 6)
    # The very first epoch, with its seconds: it was not trained again.
    assert history.read_text().splitlines()[:1] == before


def test_a_sweep_that_is_at_work_is_left_alone(tmp_path: Path) -> None:
    space, sweep = spaces.write(tmp_path, SLOW), tmp_path / "s"
    here = ("--max-concurrent", "0")
    flags = ("--num-samples", "60", "--name", "s", *here)
    process = training.begin(command(space, tmp_path, *flags), tmp_path / "log")
    try:
        wait_for(lambda: len(lines(sweep)) >= 1, process)
        process.send_signal(signal.SIGSTOP)
        done = training.here(command(space, tmp_path, "--resume", "s", *here))
    finally:
        psutil.Process(process.pid).kill()
        process.wait()
    assert done.returncode == 5
    assert f"in use by process {process.pid}" in done.stderr


def test_sigterm_ends_a_sweep_with_the_way_to_go_on(tmp_path: Path) -> None:
    space, sweep = spaces.write(tmp_path, SLOW), tmp_path / "s"
    flags = ("--num-samples", "60", "--name", "s", "--max-concurrent", "0")
    process = training.begin(command(space, tmp_path, *flags), tmp_path / "log")
    wait_for(lambda: len(lines(sweep)) >= 1, process)
    process.terminate()
    assert process.wait(timeout=120) == 143
    assert "the same command with --resume NAME goes on with it" in (tmp_path / "log").read_text()
