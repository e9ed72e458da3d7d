"""The whole command: what it would run, what it runs, what is left of it after a kill."""

import csv
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.jobs import training
from tests.jobs.conftest import wait_for
from tests.jobs.here import run_here

JOB = ROOT / "jobs" / "reproduce.py"
ROW = ("--table", "drloc-4", "--scale", "small", "--rows", "flowers102-swin-drloc")
CUT = ("--epochs", "1", "--tracking-uri", "off")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.write_classes(tmp_path_factory.mktemp("pictures"), num_train=20)


def command(pictures: Path, output: Path, *flags: str, seeds: int = 1) -> list[str]:
    where = ("--data.flowers17", str(pictures), "--output", str(output))
    return [sys.executable, str(JOB), *ROW, *where, *CUT, "--seeds", str(seeds), *flags]


def summaries(output: Path) -> dict[str, float]:
    """When each finished run was finished."""
    return {one.parent.name: one.stat().st_mtime for one in output.glob("runs/*/summary.json")}


def rows_of(output: Path) -> dict[str, dict[str, str]]:
    table = output / "reports" / "drloc-4-small-epochs1" / "table.csv"
    return {row["row"]: row for row in csv.DictReader(table.read_text().splitlines())}


def test_a_dry_run_tells_the_runs_and_leaves_none(pictures: Path, tmp_path: Path) -> None:
    done = training.here(command(pictures, tmp_path / "out", "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert "flowers102-swin-base             flowers102, Swin-T, no DRLoc: 1 runs, 0 done" in (
        done.stdout
    )
    assert "2 runs to do, 0 are done\n" in done.stdout
    assert "take" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_row_that_is_none_of_the_tables_is_refused(tmp_path: Path) -> None:
    done = run_here(JOB, "--table", "drloc-2a", "--rows", "m65", "--output", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: --rows m65 is none of the table's: m0, m32, m64")


def test_a_table_without_any_data_is_written_with_every_row_marked(tmp_path: Path) -> None:
    done = run_here(JOB, "--table", "solost-4", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    report = tmp_path / "reports" / "solost-4-paper"
    rows = list(csv.DictReader((report / "table.csv").read_text().splitlines()))
    assert {row["state"] for row in rows} == {
        f"no data at hand (--data.{data} PATH)" for data in ("voc07", "voc12", "coco20k")
    }
    assert (report / "table.png").stat().st_size > 0


@pytest.mark.slow
def test_after_a_sigkill_the_same_command_repeats_no_finished_run(
    pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = training.begin(command(pictures, output), tmp_path / "first.log")
    wait_for(lambda: len(summaries(output)) == 1, process)
    wait_for(lambda: len(list((output / "logs").glob("*.log"))) == 2, process)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "runs go on without the process that started them"
    before = summaries(output)
    done = training.here(command(pictures, output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 2 runs are done already" in done.stdout
    after = summaries(output)
    assert len(after) == 2
    assert before.items() <= after.items()
    rows = rows_of(output)
    assert rows["flowers102-swin-drloc"]["state"] == "ok"
    assert rows["flowers102-swin-drloc"]["num_pairs"] == "1"
    assert rows["svhn-swin-drloc"]["state"] == "no data at hand (--data.svhn PATH)"
    again = training.here(command(pictures, output))
    assert "2 of 2 runs are done already" in again.stdout
    assert summaries(output) == after
    assert "CUT SHORT to 1 epochs" in again.stdout
    planned = training.here(command(pictures, output, "--dry-run", seeds=3))
    assert re.search(r"train_classifier +4 runs; 4 take \d+s, as", planned.stdout), planned.stdout


@pytest.mark.slow
def test_when_all_runs_fail_it_ends_with_one_line_and_the_table(
    pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    done: subprocess.CompletedProcess[str] = training.here(command(empty, output))
    assert done.returncode == 9
    (line,) = done.stderr.splitlines()
    assert line.startswith("AllTrialsFailed: all 2 runs failed, the first with: DataError: ")
    assert rows_of(output)["flowers102-swin-base"]["state"].startswith("0 of 1 runs; failed: Data")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_boxes_of_the_shipped_network_are_compared_over_photos(tmp_path: Path) -> None:
    from pipeline.scenes.scenes import write_collection

    scenes = tmp_path / "scenes"
    write_collection(scenes, num_scenes=12, seed=0)
    where = ("--data.voc07", str(scenes), "--output", str(tmp_path / "out"))
    rows = ("--rows", "voc07-vit-nano8-solost", "--num-images", "10", "--tracking-uri", "off")
    line = [sys.executable, str(JOB), "--table", "solost-4", "--scale", "small", *rows, *where]
    done = training.here(line)
    assert done.returncode == 0, done.stdout + done.stderr
    table = tmp_path / "out" / "reports" / "solost-4-small-first10" / "table.csv"
    found = {row["row"]: row for row in csv.DictReader(table.read_text().splitlines())}
    solost, lost = (found[f"voc07-vit-nano8-{rule}"] for rule in ("solost", "lost"))
    assert (solost["num_pairs"], solost["state"], lost["state"]) == ("10", "ok", "ok")
    assert float(solost["gain"]) == pytest.approx(float(solost["ours"]) - float(lost["ours"]))
    assert found["voc07-vit-s16-lost"]["state"] == (
        "no weights at hand (--weights vit-s16=FILE, or --fetch)"
    )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_detectors_are_trained_on_boxes_and_measured_on_other_photos(
    shared: Path, tmp_path: Path
) -> None:
    photos, weights = shared / "data" / "voc07_test_500", shared / "weights"
    where = ("--data.voc07", str(photos), "--data-root", str(weights), "--output", str(tmp_path))
    cut = ("--num-images", "8", "--epochs", "1", "--seeds", "2", "--tracking-uri", "off")
    rows = ("--scale", "small", "--rows", "voc07-test-ap50-lost")
    line = [sys.executable, str(JOB), "--table", "cad-5", *rows, *where, *cut]
    done = training.here(line)
    assert done.returncode == 0, done.stdout + done.stderr
    table = tmp_path / "reports" / "cad-5-small-epochs1-first8" / "table.csv"
    found = {row["row"]: row for row in csv.DictReader(table.read_text().splitlines())}
    assert found["voc07-test-ap50-lost"]["state"] == "ok"
    assert found["voc07-test-ap50-lost"]["seeds"] == "0 1"
    # The labels are there, and nobody asked for a detector on SoLOST's.
    assert "not asked for (--rows)" in found["voc07-test-ap50-solost"]["state"]
