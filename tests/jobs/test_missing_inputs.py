"""Inputs that are not there are told before Ray is started, and leave nothing behind."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.jobs.conftest import NO_RAY
from tests.jobs.here import run_here

JOBS = {
    "train_classifier": ("--data.root", ("--data.name", "folder")),
    "pretrain_dino": ("--images", ("--preset", "nano")),
    "train_detector": ("--labels", ("--preset", "nano")),
}


@pytest.mark.parametrize("name", JOBS)
def test_what_is_not_there_is_told_before_ray_starts(name: str, tmp_path: Path) -> None:
    flag, others = JOBS[name]
    output = tmp_path / "runs"
    args = (flag, tmp_path / "nothing", *others, "--num-workers", 1, "--output", output)
    done = run_here(ROOT / "jobs" / f"{name}.py", *args, RAY_ADDRESS=NO_RAY)
    assert done.returncode == 3
    assert str(tmp_path / "nothing") in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Ray" not in done.stdout
    assert not list(output.glob("*"))
