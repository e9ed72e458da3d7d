"""Populations as processes on a real local Ray: killed in the middle of a generation, continued."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import training
from tests.jobs.conftest import kill, wait_for
from tests.jobs.test_tune import command, lines
from tests.tuning import spaces
from tests.tuning.test_population_sweep import same_bits, state_of

SPACE = """
from ray import tune
JOB, METRIC, MODE, PICK = "classifier", "val/accuracy", "max", "best"
SPACE = {"optim.lr": tune.loguniform(1e-5, 1e-2), "optim.weight_decay": tune.uniform(0.0, 0.2)}
MUTABLE = ("optim.lr", "optim.weight_decay")
"""


def told(sweep: Path) -> list[dict[str, Any]]:
    """All of the trials but how long they took; their folders from the sweep's on."""
    found = sorted(lines(sweep), key=lambda one: int(one["number"]))
    return [
        {**one, "seconds": 0, "folder": str(Path(one["folder"]).relative_to(sweep))}
        for one in found
    ]


def is_in_the_second_generation(sweep: Path) -> bool:
    """Whether a segment of it has trained an epoch, and not all have ended."""
    begun = [one["id"] for one in lines(sweep, "proposals.jsonl") if one["number"] > 3]
    histories = [file for one in begun for file in (sweep / "runs" / one).glob("*/history.jsonl")]
    return bool(histories) and len(lines(sweep)) < 6


@pytest.mark.slow
@pytest.mark.ray
def test_a_population_killed_within_a_generation_ends_as_one_that_was_never_killed(
    tmp_path: Path,
) -> None:
    pictures = training.write_classes(tmp_path / "pictures", num_train=16)
    space = spaces.write(tmp_path, SPACE)
    begin = (
        *("--scheduler", "pbt", "--num-samples", "3", "--perturb-epochs", "2", "--name", "s"),
        *("--max-concurrent", "2", "--set", *training.settings(pictures, epochs=4)),
    )
    whole, sweep = tmp_path / "whole" / "s", tmp_path / "killed" / "s"
    done = training.finish(command(space, whole.parent, *begin))
    assert done.returncode == 0, done.stderr
    assert [one["status"] for one in told(whole)] == ["part"] * 3 + ["ok"] * 3
    process = training.begin(command(space, sweep.parent, *begin), tmp_path / "log")
    wait_for(lambda: is_in_the_second_generation(sweep), process)
    kill(process)
    kept = lines(sweep)
    assert 3 <= len(kept) < 6
    again = training.finish(command(space, sweep.parent, "--resume", "s", "--max-concurrent", "2"))
    assert again.returncode == 0, again.stderr
    assert lines(sweep)[: len(kept)] == kept
    assert told(sweep) == told(whole)
    for ours, theirs in zip(told(sweep)[3:], told(whole)[3:], strict=True):
        assert same_bits(state_of(sweep / ours["folder"]), state_of(whole / theirs["folder"]))
    assert json.loads((sweep / "schedule.json").read_text()) == json.loads(
        (whole / "schedule.json").read_text()
    )
    assert not list(sweep.glob("_ray-*"))


def test_what_a_population_cannot_do_is_told_in_one_line(tmp_path: Path) -> None:
    space = spaces.write(tmp_path, SPACE)
    flags = ("--scheduler", "pbt", "--set", *training.settings(tmp_path, epochs=5))
    done = training.finish(command(space, tmp_path / "sweeps", *flags))
    assert done.returncode == 2
    assert done.stderr == (
        "ConfigError: --perturb-epochs must be in [1, 4] for a base of 5 epochs, got 5\n"
    )
    assert not (tmp_path / "sweeps" / "s").exists()
