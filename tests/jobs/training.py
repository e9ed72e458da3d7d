"""Small runs of train_classifier, as processes, for tests that stop and compare them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.storage import Location
from pipeline.training.checkpoints import CheckpointStore
from tests.conftest import ROOT

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


def command(data: Path, output: Path, *flags: str) -> list[str]:
    """A run of 6 epochs of 8 steps, seconds long, with all that is random turned on."""
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


def environment(**more: str) -> dict[str, str]:
    """One thread each, so that sums come in one order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run(data: Path, output: Path, *flags: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Train to the end."""
    return subprocess.run(
        command(data, output, *flags),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment(**env),
        timeout=400,
    )


def start(data: Path, output: Path, *flags: str) -> "subprocess.Popen[str]":
    """Begin to train; the lines go to OUTPUT.log."""
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command(data, output, *flags),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            text=True,
            env=environment(),
        )


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
    average = {f"average.{name}": tensor for name, tensor in loop["average"].items()}
    return {**loop["objective"], **average}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def weights_apart(one: Path, other: Path) -> float:
    """The largest difference of any final weight of two runs."""
    return largest_difference(final_weights(one), final_weights(other))
