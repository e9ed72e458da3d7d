"""The whole command: what it prints, its last line, its files, its exit codes."""

import csv
import io
import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.comparison.report import compare_runs
from pipeline.errors import ConfigError
from tests.conftest import ROOT
from tests.jobs.conftest import run_script
from tests.jobs.here import run_here

METRIC = "test/accuracy_selected"
JOB = ROOT / "jobs" / "compare_runs.py"
run = partial(run_here, JOB, COLUMNS="80")


def summary(seed: int, weight: float, value: float, finished: bool = True) -> dict[str, Any]:
    """What a finished training run leaves in its folder."""
    return {
        "kind": "classifier",
        "finished": finished,
        "name": f"swin-{seed}-{weight}",
        "config": {
            "data": {"name": "cifar10"},
            "model": {"name": "swin"},
            "epochs": 9,
            "drloc": {"weight": weight, "num_pairs": 64},
            "seed": seed,
        },
        "config_hash": f"{seed}-{weight}",
        "pair_key": "key",
        "metrics": {METRIC: value, "test/accuracy_last": value - 0.01},
        "created_at": "2026-01-01T00:00:00+00:00",
    }


def numbers(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three seeds with differences of 2, 1 and 3 points, and one that is not finished."""
    values = {0.0: [0.5, 0.6, 0.7], 0.5: [0.52, 0.61, 0.73]}
    contents = [
        summary(seed, weight, value)
        for weight, accuracies in values.items()
        for seed, value in enumerate(accuracies)
    ]
    folder = tmp_path / "runs"
    for content in [*contents, summary(9, 0.5, 0.1, finished=False)]:
        place = folder / content["name"] / "summary.json"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(content))
    return folder


def test_every_number_of_a_hand_made_case(runs: Path) -> None:
    result = run("--runs", runs)
    found = numbers(result)
    (arm,) = found["arms"]
    assert (arm["baseline_mean"], arm["drloc_mean"], arm["difference_mean"]) == (60, 62, 2)
    assert (arm["baseline_sd"], arm["difference_sd"]) == (10, 1)
    # Student's t for two degrees of freedom, 4.302653, over the root of three.
    assert arm["interval_low"] == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert (arm["verdict"], arm["p_sign_flip"]) == ("no difference shown", 0.25)
    assert (arm["seeds"], arm["drloc"]["drloc.num_pairs"]) == ([0, 1, 2], "64")
    assert (found["num_runs"], found["num_unfinished"], found["unit"]) == (7, 1, "%")
    assert "cifar10, swin, 9 epochs" in result.stdout
    assert "1 unfinished runs are left out." in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_other_metric_and_confidence_are_taken(runs: Path) -> None:
    (arm,) = numbers(run("--runs", runs, "--metric", "test/accuracy_last"))["arms"]
    assert arm["drloc_mean"] == 61
    narrow = numbers(run("--runs", runs, "--confidence", "0.8"))
    assert narrow["arms"][0]["verdict"] == "better"


def test_output_holds_the_same_numbers_and_a_picture(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "comparison"
    result = run("--runs", runs, "--output", output)
    names = ["comparison.json", "comparison.png", "table.csv", "table.md"]
    assert sorted(one.name for one in output.iterdir()) == names
    assert json.loads((output / "comparison.json").read_text()) == numbers(result)
    (row,) = csv.DictReader(io.StringIO((output / "table.csv").read_text()))
    assert row["difference_mean"] == "2.0"
    assert "| +2.00 [-0.48, +4.48] |" in (output / "table.md").read_text()
    assert Image.open(output / "comparison.png").width > 800
    assert f"Written to {output}" in result.stdout


def test_report_survives_a_narrow_ascii_terminal(runs: Path) -> None:
    result = run_script(JOB, "--runs", runs, PYTHONIOENCODING="ascii", COLUMNS="30")
    assert numbers(result)["num_arms"] == 1


def test_tracked_runs_are_compared_by_experiment(mlflow_uri: str, tmp_path: Path) -> None:
    from pipeline.config import flatten
    from pipeline.tracking.tracker import start_tracker

    for seed, weight, value in [(0, 0.0, 0.5), (1, 0.0, 0.6), (0, 0.5, 0.6), (1, 0.5, 0.701)]:
        content = summary(seed, weight, value)
        with start_tracker(mlflow_uri, experiment="lab") as tracker:
            tracker.log_params(flatten(content["config"]))
            tracker.log_metrics(content["metrics"])
            told = {"kind": "classifier", "finished": "true", "pair_key": "key"}
            tracker.set_tags({f"patchseed.{name}": value for name, value in told.items()})
    where = ("--tracking-uri", mlflow_uri)
    # As a process, which loads MLflow anew: it talks while it loads.
    result = run_script(JOB, "--experiment", "lab", *where)
    (arm,) = numbers(result)["arms"]
    assert (arm["baseline"], arm["drloc_values"]) == ([50, 60], [60, 70.1])
    assert arm["verdict"] == "better"
    assert result.stderr == "", "MLflow's own chatter must not reach the job's output"
    wrong = run("--experiment", "lob", *where)
    assert wrong.returncode == 3
    assert "did you mean lab?" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


def test_runs_that_do_not_pair_end_in_one_line_with_the_remedy(runs: Path) -> None:
    for place in runs.glob("*-0.0"):
        (place / "summary.json").unlink()
    result = run("--runs", runs)
    assert result.returncode == 3
    assert result.stderr == (
        "DataError: the 3 finished runs have no baseline: run the same commands again with "
        "--drloc.weight 0\n"
    )


def test_exactly_one_source_is_wanted(runs: Path) -> None:
    for flags in ((), ("--experiment", "lab", "--runs", str(runs))):
        result = run(*flags)
        assert result.returncode == 2
        assert "--experiment NAME or --runs FOLDER" in result.stderr
    with pytest.raises(ConfigError, match="--experiment NAME or --runs FOLDER"):
        compare_runs(
            experiment=None,
            runs=None,
            tracking_uri=None,
            metric=METRIC,
            confidence=0.95,
            output=None,
        )
