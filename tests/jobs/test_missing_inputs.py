"""Inputs that are not there are told before Ray is started, and leave nothing behind."""

import sys
from pathlib import Path

import pytest

from tests.jobs import training

JOBS = {
    "train_classifier": ("--data.root", ("--data.name", "folder")),
    "pretrain_dino": ("--images", ("--preset", "nano")),
    "train_detector": ("--labels", ("--preset", "nano")),
}


@pytest.mark.parametrize("name", JOBS)
def test_what_is_not_there_is_told_before_ray_starts(name: str, tmp_path: Path) -> None:
    flag, others = JOBS[name]
    command = [sys.executable, f"jobs/{name}.py", flag, str(tmp_path / "nothing"), *others]
    output = tmp_path / "runs"
    done = training.finish([*command, "--num-workers", "1", "--output", str(output)])
    assert done.returncode == 3
    assert str(tmp_path / "nothing") in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Ray" not in done.stdout
    assert not list(output.glob("*"))
