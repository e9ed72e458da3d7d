"""Digests of what the jobs compute, so that a change which must not move a number can be checked.

    python -m benchmarks.digests --output FOLDER            # before the change, and after it
    python -m benchmarks.digests --output FOLDER --against BEFORE/digests.json

Only the command lines of ``jobs/`` are run, and only the files that they write are read: nothing
here knows a module of the pipeline. Everything runs on the CPU with fixed seeds and one thread.
Equal digests mean equal bits; another machine or library may give others. Held are

- scenes: the demo's 60 pictures and their ground truth, byte for byte;
- labels: of each image identity, size, status, boxes, scores, labels, seed and the other numbers of
  its row, by both rules and by the demo itself (which runs solost); evaluation: every number;
- classifier, DINO, detector: the tensors of the exported weights by name; all tensors of the newest
  checkpoint, optimiser's included, whatever their names; every number of the history;
- detections: the table of that detector;
- sweep: values, status and numbers of each trial of a localization sweep;
- classes: the labels and boxes of ``cluster_boxes``, by both methods;
- comparison: what ``compare_runs`` writes as JSON and CSV, numbers to ten decimals.

Runs, times, versions, paths and what is made of paths, as hashes of settings, are left out.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

NUM_SCENES = 60
RULES = ("solost", "lost")
METHODS = ("kmeans++", "lost")
SEEDS = (0, 1)
DRLOC_WEIGHTS = (0.5, 0.0)
BACKBONE = ("--backbone.name", "vit_nano_patch8.dino")
FEATURE = ("--backbone.feature", "value", "--backbone.block", "3", "--decode.max-side", "224")
NARROW = "{embed_dim: 16, depths: [1, 1], num_heads: [1, 2], window_size: 4}"
UNTRACKED = ("--tracking-uri", "off")
IN_PROCESS = ("--num-workers", "0", "--loader-workers", "0", "--gradient-norm-steps", "3")
CLASSIFIER = (
    *("--data.name", "folder", "--epochs", "2", "--batch-size", "16", "--num-workers", "0"),
    *("--model.image-size", "32", "--model.patch-size", "4", "--model.options", NARROW),
    *("--data.loader-workers", "0", "--drloc.hidden-dim", "32", "--gradient-norm-steps", "3"),
    *("--optim.lr", "0.003", "--optim.lr-batch", "None", "--optim.ema-decay", "0.5"),
    *("--optim.warmup-epochs", "1", *UNTRACKED),
)
DINO = (
    *("--preset", "nano", "--epochs", "2", "--batch-size", "16", "--crops.num-local", "2"),
    *("--dino.out-dim", "64", "--dino.hidden-dim", "64", "--dino.bottleneck-dim", "32"),
    *("--dino.teacher-momentum", "0.9", "--optim.lr", "0.002", "--optim.warmup-epochs", "1"),
    *(*IN_PROCESS, *UNTRACKED),
)
DETECTOR = (
    *("--preset", "nano", "--steps", "20", "--windows", "2", "--precise-bn", "2"),
    *("--batch-size", "2", *IN_PROCESS, *UNTRACKED),
)
# The table's columns that say nothing of runs, times, settings or places.
COLUMNS = (
    *("image_id", "width", "height", "exif_orientation", "num_frames", "status", "boxes"),
    *("scores", "labels", "method", "seed_xy", "seed_degree", "area_fraction"),
    *("touches_border", "content_sha256", "size_bytes"),
)
# Keys under which the jobs' JSON tells where, when and by what.
LEFT_OUT = frozenset(
    {
        *("source", "ground_truth", "folder", "sha256", "run_id", "config_hash", "pair_key", "id"),
        *("created_at", "versions", "evaluated_with", "seconds", "train/images_per_second"),
        # Of records from before 0.2 alone.
        "segment",
    }
)


@dataclass(frozen=True)
class Settings:
    """Where to work; ``root`` is the repository whose jobs are run."""

    output: Path
    root: Path = Path(__file__).resolve().parent.parent
    against: Path | None = None


@dataclass(frozen=True)
class Jobs:
    """Runs a repository's jobs as a user does; what they write lies in ``folder``."""

    root: Path
    folder: Path

    def run(self, job: str, *flags: object, **environment: str) -> None:
        """Run ``jobs/JOB.py`` to its end; where it fails, so do we, with what it told."""
        alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, f"jobs/{job}.py", *map(str, flags)],
            cwd=self.root,
            env={**os.environ, **alone, "PYTHONPATH": str(self.root), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{job} ended with {done.returncode}\n{done.stderr}")


def hex_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def of_values(values: object) -> str:
    """Of plain values; floats count to the last bit."""
    return hex_of(json.dumps(values, sort_keys=True).encode())


def of_files(folder: Path) -> str:
    """Of all files below, by their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return of_values([[str(one.relative_to(folder)), hex_of(one.read_bytes())] for one in files])


def of_tensor(tensor: Tensor) -> str:
    shape = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hex_of(shape + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def tensors_in(state: object) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for one in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(one)


def of_lines(file: Path) -> str:
    """Of a file with one JSON object a line."""
    return of_values([without_places(json.loads(line)) for line in file.read_text().splitlines()])


def of_table(folder: Path, columns: Sequence[str] = COLUMNS) -> str:
    """Of a finished table's rows, in the order of their images."""
    manifest = json.loads((folder / "_MANIFEST.json").read_text())
    tables = [pq.read_table(folder / file["name"]) for file in manifest["files"]]
    rows = [row for table in tables for row in table.select(list(columns)).to_pylist()]
    return of_values(sorted(rows, key=lambda row: str(row["image_id"])))


def without_places(value: Any) -> Any:
    """The value without what ``LEFT_OUT`` names at any depth."""
    if isinstance(value, dict):
        return {name: without_places(one) for name, one in value.items() if name not in LEFT_OUT}
    return [without_places(one) for one in value] if isinstance(value, list) else value


def rounded(value: Any) -> Any:
    """Numbers, and words that are numbers, to ten decimals; the rest as it is."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    try:
        return round(float(value), 10)
    except (TypeError, ValueError):
        return value


def of_run(what: str, output: Path) -> Iterator[tuple[str, str]]:
    """The three digests of the training run that ended last."""
    run = max(output.glob("*/summary.json"), key=lambda file: file.stat().st_mtime_ns).parent
    (weights,) = (run / "model").glob("*.safetensors")
    tensors = {name: of_tensor(tensor) for name, tensor in load_file(weights).items()}
    yield f"{what}: exported weights", of_values(tensors)
    newest = max((run / "checkpoints").glob("epoch_*.pt"))
    state = torch.load(newest, map_location="cpu", weights_only=True)
    yield f"{what}: newest checkpoint", of_values(sorted(map(of_tensor, tensors_in(state))))
    yield f"{what}: history", of_lines(run / "history.jsonl")


def write_classes(folder: Path) -> Path:
    """Three classes of noise with a rectangle of a faint colour; an ImageFolder."""
    rng = np.random.default_rng(0)
    for role, count in (("train", 48), ("test", 30)):
        for number, name in enumerate(("red", "green", "blue")):
            place = folder / role / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                x, y = rng.integers(0, 16, 2)
                pixels[y : y + 16, x : x + 16, number] += 55
                Image.fromarray(pixels).save(place / f"{index:03d}.png")
    return folder


def scenes_and_labels(jobs: Jobs) -> Iterator[tuple[str, str]]:
    """The demo's scenes, and what is done with their tables."""
    demo, place = jobs.folder / "demo", jobs.folder
    # The demo has no flag for where it is recorded.
    store = f"sqlite:///{place}/mlflow.db"
    jobs.run("demo", "--output", demo, "--num-scenes", NUM_SCENES, MLFLOW_TRACKING_URI=store)
    scenes, truth = demo / "scenes", demo / "scenes" / "instances.json"
    yield "scenes", of_files(scenes)
    yield "labels, by the demo", of_table(demo / "solost")
    for rule in RULES:
        table, flags = place / f"labels-{rule}", ("--localization.rule", rule, *UNTRACKED)
        where = ("--images", scenes / "images", "--output", table, "--compute.num-actors", "1")
        jobs.run("label_images", *where, *BACKBONE, *FEATURE, *flags)
        yield f"labels, {rule}", of_table(table)
        result = place / f"evaluation-{rule}"
        jobs.run("evaluate_boxes", "--labels", table, "--ground-truth", truth, "--output", result)
        content = json.loads((result / "evaluation.json").read_text())
        yield f"evaluation, {rule}", of_values(without_places(content))
    for method in METHODS:
        table, flags = place / f"classes-{method}", ("--method", method, "--num-clusters", "6")
        where = ("--labels", place / "labels-solost", "--output", table, "--sheet", "off")
        jobs.run("cluster_boxes", *where, *BACKBONE, "--crop-size", 64, *flags)
        yield f"classes, {method}", of_table(table, ("image_id", "boxes", "labels"))


def classifiers(jobs: Jobs) -> Iterator[tuple[str, str]]:
    """Two seeds with DRLoc and without, and their comparison."""
    data, runs = write_classes(jobs.folder / "classes"), jobs.folder / "classifiers"
    for seed in SEEDS:
        for weight in DRLOC_WEIGHTS:
            flags = ("--data.root", data, "--seed", seed, "--drloc.weight", weight)
            jobs.run("train_classifier", *CLASSIFIER, *flags, "--output", runs)
            yield from of_run(f"classifier, lambda {weight:g}, seed {seed}", runs)
    result = jobs.folder / "comparison"
    jobs.run("compare_runs", "--runs", runs, "--output", result)
    content = json.loads((result / "comparison.json").read_text())
    yield "comparison, JSON", of_values(rounded(without_places(content)))
    with (result / "table.csv").open(newline="") as file:
        words = [[cell.split() for cell in row] for row in csv.reader(file)]
    yield "comparison, CSV", of_values(rounded(words))


def dino(jobs: Jobs) -> Iterator[tuple[str, str]]:
    """A short pre-training on the scenes."""
    output = jobs.folder / "dino"
    images = jobs.folder / "demo" / "scenes" / "images"
    jobs.run("pretrain_dino", "--images", images, "--output", output, *DINO)
    yield from of_run("DINO", output)


def detector(jobs: Jobs) -> Iterator[tuple[str, str]]:
    """Twenty steps on the scenes' boxes, and what is detected after them."""
    output, labels = jobs.folder / "detector", jobs.folder / "labels-solost"
    table = jobs.folder / "detections"
    jobs.run("train_detector", "--labels", labels, "--output", output, *DETECTOR)
    yield from of_run("detector", output)
    where = ("--labels", labels, "--output", table, "--detector", output)
    jobs.run("detect_images", *where, "--compute.num-actors", "1", *UNTRACKED)
    yield "detections", of_table(table)


def sweep(jobs: Jobs) -> Iterator[tuple[str, str]]:
    """Six random trials of a localization sweep, in one process."""
    scenes = jobs.folder / "demo" / "scenes"
    of = ("--labels-for", scenes / "images", "--ground-truth", scenes / "instances.json")
    how = ("--num-samples", 6, "--max-concurrent", 0, "--name", "sweep", *UNTRACKED)
    space = ("--space", "tune_spaces/localization.py", "--output", jobs.folder / "sweeps")
    base = ("--set", f"backbone.name={BACKBONE[1]}", "decode.max_side=224")
    jobs.run("tune", *space, *of, *how, *base)
    yield "sweep, trials", of_lines(jobs.folder / "sweeps" / "sweep" / "trials.jsonl")


def main(settings: Settings) -> None:
    folder = settings.output.absolute()
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} must be empty or new")
    folder.mkdir(parents=True, exist_ok=True)
    jobs, found = Jobs(settings.root.absolute(), folder), dict[str, str]()
    before = json.loads(settings.against.read_text()) if settings.against else {}
    print("| what | digest |\n|---|---|")
    for part in (scenes_and_labels, classifiers, dino, detector, sweep):
        for what, digest in part(jobs):
            found[what] = digest
            differs = settings.against is not None and before.get(what) != digest
            print(f"| {what} | {digest}{' DIFFERS' if differs else ''} |", flush=True)
    (folder / "digests.json").write_text(json.dumps(found, indent=2) + "\n")
    if settings.against and found != before:
        raise SystemExit(f"not all as in {settings.against}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
