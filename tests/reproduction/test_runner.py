"""Runs as processes: what is done is not repeated, what fails costs only what needs it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.reproduction.cells import Run
from pipeline.reproduction.runner import Runner
from pipeline.storage import Location
from tests.conftest import ROOT

# Notes that it began, waits until so many have, fails if told so, and leaves its result.
SCRIPT = """
import sys, time, pathlib, yaml
values = yaml.safe_load(pathlib.Path(sys.argv[2]).read_text())
with open(values["journal"], "a") as journal:
    journal.write(values["name"] + "\\n")
deadline = time.monotonic() + 100
while len(pathlib.Path(values["journal"]).read_text().splitlines()) < values["others"]:
    time.sleep(0.05)
    if time.monotonic() > deadline:
        sys.exit("waited in vain")
if values["fails"]:
    sys.exit("DataError: it is broken")
with open(values["journal"], "a") as journal:
    journal.write(values["name"] + " ended\\n")
pathlib.Path(values["result"]).write_text("{}")
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "work.py").write_text(SCRIPT)
    return folder


def run(folder: Path, name: str, *after: str, fails: bool = False, others: int = 0) -> Run:
    result = folder / f"{name}.json"
    values = {
        "name": name,
        "journal": str(folder / "journal"),
        "result": str(result),
        "fails": fails,
        "others": others,
    }
    return Run(name, "work", values, Location.parse(str(result)), after)


def runner(jobs: Path, told: list[str], num_parallel: int = 1) -> Runner:
    return Runner(jobs, jobs.parent / "logs", num_parallel, told.append, lambda one: "done")


def journal(folder: Path) -> list[str]:
    return (folder / "journal").read_text().splitlines()


def test_each_run_is_done_once_and_after_what_it_needs(jobs: Path, tmp_path: Path) -> None:
    runs = [
        run(tmp_path, "label", others=2),
        run(tmp_path, "train", "label"),
        run(tmp_path, "detect", "train"),
        run(tmp_path, "other"),
    ]
    told: list[str] = []
    assert not runner(jobs, told, num_parallel=3).do(runs)
    lines = journal(tmp_path)
    assert lines.index("label ended") < lines.index("train")
    assert lines.index("train ended") < lines.index("detect")
    assert sorted(one for one in lines if "ended" not in one) == sorted(one.name for one in runs)
    assert told[-1].startswith("run 4/4 ok detect: done")
    again: list[str] = []
    assert not runner(jobs, again).do(runs)
    assert again == ["4 of 4 runs are done already"]
    assert journal(tmp_path) == lines


def test_a_failure_is_told_with_its_last_line_and_costs_only_what_needs_it(
    jobs: Path, tmp_path: Path
) -> None:
    runs = [
        run(tmp_path, "label", fails=True),
        run(tmp_path, "train", "label"),
        run(tmp_path, "detect", "train"),
        run(tmp_path, "other"),
    ]
    told: list[str] = []
    failed = runner(jobs, told).do(runs)
    assert failed == {
        "label": "DataError: it is broken (code 1)",
        "train": "what it needs failed",
        "detect": "what it needs failed",
    }
    assert journal(tmp_path) == ["label", "other", "other ended"]
    assert any("FAILED label: DataError: it is broken (code 1)" in one for one in told)
    # Given again, it is tried again.
    assert runner(jobs, told).do(runs).keys() == failed.keys()
    assert journal(tmp_path).count("label") == 2


def test_no_more_processes_at_a_time_than_told(jobs: Path, tmp_path: Path) -> None:
    runs = [run(tmp_path, str(number), others=2) for number in range(4)]
    assert not runner(jobs, [], num_parallel=2).do(runs)
    active = most = 0
    for line in journal(tmp_path):
        active += -1 if line.endswith("ended") else 1
        most = max(most, active)
    assert most == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_runs_end_with_the_process_that_started_them(
    jobs: Path, tmp_path: Path, how: signal.Signals
) -> None:
    code = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from tests.reproduction.test_runner import run, runner\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "runner(folder / 'jobs', []).do([run(folder, 'long', others=9)])\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "journal").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (child,) = psutil.Process(driver.pid).children()
    driver.send_signal(how)
    driver.wait(timeout=30)
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
