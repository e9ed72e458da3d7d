"""Small pictures and real processes: whole jobs run with nothing beside the repository."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.data.pseudo_labels import read_labels
from pipeline.storage import Location
from tests.conftest import ROOT
from tests.jobs.here import run_here

SIZES = [(96, 64), (64, 96), (80, 80)]

NO_RAY = "127.0.0.1:1"
"""The address of a Ray that is none: a job that needs one fails there."""


def write_photos(folder: Path, count: int) -> None:
    """``count`` different little pictures, in two sub-folders that repeat each other's names."""
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        path = folder / f"part-{number % 2}" / f"photo-{number // 2:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def run_script(job: Path, *args: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a job that needs no Ray to its end, as where nothing is installed."""
    return subprocess.run(
        [sys.executable, str(job), *map(str, args)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
        check=False,
    )


def help_without_libraries(job: Path) -> str:
    """What ``--help`` tells, after checking that it loads neither torch nor Ray and ends with 0."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(job)!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n"
        '    sys.stderr.write(f\'{stop.code} {sorted({"torch", "ray"} & set(sys.modules))}\')\n'
    )
    done = run_script(Path("-c"), code)
    assert done.stderr == "0 []"
    return done.stdout


def write_mixed(folder: Path, count: int) -> Path:
    """``count`` photos and three images that are none; what is not even named so is left out."""
    write_photos(folder, count)
    good = (folder / "part-0" / "photo-000.png").read_bytes()
    (folder / "truncated.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.JPG").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html></html>")
    return folder


def table_of(output: str | Path) -> pa.Table:
    """The table that a job wrote."""
    return read_labels(Location.parse(str(output)))


def comparable(output: Path, *besides: str) -> pa.Table:
    """What two runs over the same images must agree on, to the bit."""
    return table_of(output).drop_columns(["run_id", "created_at", *besides])


class LabelJobs:
    """Starts labelling jobs as a user does, and knows how to kill them."""

    def __init__(self, weights: Path, folder: Path, ray_address: str) -> None:
        self.weights, self.folder, self.ray_address = weights, folder, ray_address

    def command(self, images: str | Path, output: str | Path, *flags: str) -> list[str]:
        """The command line of a job over ``images`` with the tiny network."""
        return [
            sys.executable,
            "jobs/label_images.py",
            *("--images", str(images), "--output", str(output)),
            *("--backbone.name", "vit_tiny_patch16_224", "--backbone.normalize", "half"),
            *("--backbone.checkpoint", str(self.weights)),
            *("--tracking-uri", "off"),
            *flags,
        ]

    def run(
        self, images: str | Path, output: str | Path, *flags: str, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a job to its end in this process, on the tests' Ray."""
        _, job, *args = self.command(images, output, *flags)
        return run_here(ROOT / job, *args, **{"RAY_ADDRESS": self.ray_address, **env})

    def run_alone(
        self, images: str | Path, output: str | Path, *flags: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a job as a process with a Ray of its own, whose workers know this environment."""
        return subprocess.run(
            self.command(images, output, *flags),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def start(self, images: Path, output: Path, *flags: str, **env: str) -> "subprocess.Popen[str]":
        """Start a job as a process and return while it runs.

        Its Ray is its own, but where RAY_ADDRESS is given.
        """
        log = (self.folder / f"job-{time.monotonic_ns()}.log").open("w")
        return subprocess.Popen(
            self.command(images, output, *flags),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            text=True,
            env={**os.environ, **env},
        )


class DetectJobs(LabelJobs):
    """The same for detection jobs; what they are given as weights is a detector's folder."""

    def command(self, images: str | Path, output: str | Path, *flags: str) -> list[str]:
        """The command line of a job over ``images``; a pseudo-label table gives its own images."""
        source = "--labels" if (Path(images) / "_MANIFEST.json").is_file() else "--images"
        return [
            sys.executable,
            "jobs/detect_images.py",
            *(source, str(images), "--output", str(output), "--detector", str(self.weights)),
            *("--tracking-uri", "off"),
            *flags,
        ]


@pytest.fixture(scope="session")
def tiny_detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a nano detector as it is before any training, of a second round."""
    import torch

    from pipeline.detection.box_loader import SeenSize
    from pipeline.detection.detector import build_detector, default_options
    from pipeline.detection.exported_detector import write_detector
    from pipeline.storage import Location

    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = build_detector(default_options("nano", max_detections=20))
    folder = tmp_path_factory.mktemp("detector")
    write_detector(
        detector,
        Location.parse(str(folder)),
        size=SeenSize(64, 128),
        classes=["object"],
        made_by={"config": {"round": 2}},
    )
    return folder


@pytest.fixture
def detect_jobs(tiny_detector: Path, tmp_path: Path, ray_address: str) -> DetectJobs:
    return DetectJobs(tiny_detector, tmp_path, ray_address)


@pytest.fixture
def label_jobs(tiny_weights: Path, tmp_path: Path, ray_address: str) -> LabelJobs:
    return LabelJobs(tiny_weights, tmp_path, ray_address)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Return when ``condition`` holds; fail if the job ends or four minutes pass before."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the job ended before it could be killed"
        if time.monotonic() > deadline:
            kill(process)
            pytest.fail("waited for four minutes")
        time.sleep(0.02)


def finished_blocks(output: Path) -> list[Path]:
    """The blocks an unfinished run has on disk."""
    return sorted(output.glob("_run/*/pass-*/blocks/block-*.parquet"))


def processes_below(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """All processes the job has started, Ray's included."""
    return psutil.Process(process.pid).children(recursive=True)


def line_of(process: psutil.Process) -> str:
    """The command line of a process; of one that has ended, nothing."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL the driver, and see to it that nothing which could still write outlives it."""
    below = processes_below(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Ray's agents, which do no work of ours, notice late that their node is gone; and a worker that
    # was just being started looks for its cluster for half a minute, and does nothing else.
    for one in filter(_does_no_work, below):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    _, alive = psutil.wait_procs(below, timeout=90)
    assert not alive, f"outlived the driver: {alive}"


def _does_no_work(process: psutil.Process) -> bool:
    # Once it has found its cluster, Ray renames a worker.
    return any(name in line_of(process) for name in ("Agent", "default_worker.py"))


@pytest.fixture
def on_tests_ray(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs join the tests' Ray, in this process and in others."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
