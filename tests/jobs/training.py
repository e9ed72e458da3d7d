"""Small runs of the training jobs, for tests that stop and compare them."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.storage import Location
from pipeline.training.checkpoints import CheckpointStore
from tests.conftest import ROOT
from tests.jobs.conftest import line_of, processes_below
from tests.jobs.here import run_here

NARROW = "{embed_dim: 16, depths: [1, 1], num_heads: [1, 2], window_size: 4}"


def write_classes(folder: Path, num_train: int = 48, num_test: int = 6) -> Path:
    """Three classes of little pictures that differ in their colour; an ImageFolder."""
    rng = np.random.default_rng(0)
    for role, count in (("train", num_train), ("test", num_test)):
        for number, name in enumerate(("red", "green", "blue")):
            place = folder / role / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 160, (32, 32, 3), dtype=np.uint8)
                pixels[..., number] += 80
                Image.fromarray(pixels).save(place / f"{index:03d}.png")
    return folder


def write_shapes(folder: Path, count: int) -> Path:
    """Pictures of 64 px: a rectangle of one colour on darker noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 120, (64, 64, 3), dtype=np.uint8)
        (x, y), (width, height) = rng.integers(2, 28, 2), rng.integers(16, 34, 2)
        pixels[y : y + height, x : x + width] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def command(data: Path, output: Path, *flags: str) -> list[str]:
    """A classifier's run of 6 epochs of 8 steps, seconds long, all that is random turned on."""
    return [
        sys.executable,
        "jobs/train_classifier.py",
        *("--data.name", "folder", "--data.root", str(data), "--output", str(output)),
        *("--epochs", "6", "--batch-size", "16", "--optim.warmup-epochs", "1"),
        *("--model.image-size", "32", "--model.patch-size", "4", "--model.options", NARROW),
        *("--data.loader-workers", "0", "--drloc.hidden-dim", "32", "--tracking-uri", "off"),
        *("--optim.lr", "0.003", "--optim.lr-batch", "None", "--optim.ema-decay", "0.5"),
        *("--gradient-norm-steps", "3"),
        *flags,
    ]


def settings(data: Path, epochs: int = 6) -> list[str]:
    """Much the same run as the base of a sweep."""
    return [
        *("data.name=folder", f"data.root={data}", "data.loader_workers=0", f"epochs={epochs}"),
        *("batch_size=16", "optim.warmup_epochs=1", "model.image_size=32", "model.patch_size=4"),
        *("drloc.hidden_dim=32", "optim.lr_batch=null", f"model.options='{NARROW}'"),
    ]


def pretraining(images: Path, output: Path, *flags: str) -> list[str]:
    """A DINO run of 4 epochs, with a teacher that moves and a tenth of the preset's work."""
    return [
        *(sys.executable, "jobs/pretrain_dino.py", "--preset", "nano"),
        *("--images", str(images), "--output", str(output), "--num-workers", "0"),
        *("--epochs", "4", "--batch-size", "16", "--crops.num-local", "2"),
        *("--dino.out-dim", "64", "--dino.hidden-dim", "64", "--dino.bottleneck-dim", "32"),
        *("--dino.teacher-momentum", "0.9", "--optim.lr", "0.002", "--optim.warmup-epochs", "1"),
        *("--loader-workers", "0", "--tracking-uri", "off", "--gradient-norm-steps", "3"),
        *flags,
    ]


def torchrun(one_process: Sequence[str]) -> list[str]:
    """The same command as two processes of torchrun's."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [one_process[0], *launcher, *one_process[1:]]


def environment(**more: str) -> dict[str, str]:
    """One thread each, so that sums come in one order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def here(line: Sequence[str], **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end in this process, with one thread too."""
    _, job, *flags = line
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_here(ROOT / job, *flags, **{"OMP_NUM_THREADS": "1", **env})
    finally:
        torch.set_num_threads(threads)


def finish(line: Sequence[str], **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end as a process."""
    return subprocess.run(
        line,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment(**env),
        timeout=400,
    )


def begin(line: Sequence[str], log_file: Path) -> "subprocess.Popen[str]":
    """Start a command; what it tells goes to the file."""
    with log_file.open("a") as log:
        return subprocess.Popen(
            line,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            text=True,
            env=environment(),
        )


def run(data: Path, output: Path, *flags: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Train a classifier to the end, in this process."""
    return here(command(data, output, *flags), **env)


def start(data: Path, output: Path, *flags: str) -> "subprocess.Popen[str]":
    """Begin to train a classifier as a process; the lines go to OUTPUT.log."""
    return begin(command(data, output, *flags), output.with_suffix(".log"))


def kill_ray_worker(process: "subprocess.Popen[str]") -> None:
    """SIGKILL the one Ray worker that trains for the job."""
    below = [(one, line_of(one)) for one in processes_below(process)]
    (worker,) = (one for one, line in below if "RayTrainWorker" in line)
    worker.send_signal(signal.SIGKILL)


def run_folder(output: Path) -> Path:
    """The one run's folder."""
    (folder,) = (path for path in output.iterdir() if path.is_dir())
    return folder


def epochs_done(output: Path) -> int:
    """Finished epochs of the one run that is on its way."""
    histories = list(output.glob("*/history.jsonl"))
    return len(histories[0].read_text().splitlines()) if histories else 0


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    """All weights after the last epoch, the heads' and the average's too."""
    store = CheckpointStore(Location.parse(str(run_folder(output) / "checkpoints")))
    latest = store.latest()
    assert latest is not None
    loop: dict[str, Any] = latest.state["loop"]
    average = {f"average.{name}": tensor for name, tensor in (loop["average"] or {}).items()}
    return {**loop["objective"], **average}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def weights_apart(one: Path, other: Path) -> float:
    """The largest difference of any final weight of two runs."""
    return largest_difference(final_weights(one), final_weights(other))
