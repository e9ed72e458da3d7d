"""Do detectors that learn from pseudo-boxes find more than the pseudo-boxes? Jobs, start to end.

    python -m benchmarks.self_training --output OUT                # scenes of two to four objects
    python -m benchmarks.self_training --output OUT --rounds 1 --seeds 1 --images PHOTOS \
        --ground-truth COCO.json --labelling="--backbone.name ..." --training="--preset ..."

Labels the images with SoLOST, trains a detector per seed and round (jobs/train_detector.py), has
it detect on the held-out images, and measures its boxes and SoLOST's own there, against the same
annotations. Without ``--held-images`` detectors are measured on the images they learnt from, whose
annotations they never saw, as in LOST. The same command goes on where it was stopped.
"""

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.timing import print_table, write_json
from pipeline.scenes.scenes import write_collection

_SCENE_SIZES = ((224, 168), (168, 224), (192, 192))
_OBJECTS = (2, 3, 4)
# As the demo labels, with the network of this repository.
_LABELLING = (
    "--backbone.name vit_nano_patch8.dino --decode.max-side 224 "
    "--backbone.feature value --backbone.block 3"
)
_TRAINING = "--preset nano --num-workers 2 --loader-workers 0 --detector.droploss 0.01"


@dataclass(frozen=True)
class Settings:
    """What to learn from, how, and how often."""

    output: Path
    """Folder for all tables, runs and results."""
    images: str | None = None
    """None makes scenes, with held-out ones."""
    ground_truth: str | None = None
    held_images: str | None = None
    held_ground_truth: str | None = None
    labelling: str = _LABELLING
    """Flags of jobs/label_images.py."""
    training: str = _TRAINING
    """Flags of jobs/train_detector.py."""
    seeds: int = 3
    rounds: int = 2
    num_scenes: int = 600
    num_held: int = 200


@dataclass(frozen=True)
class Collection:
    """Images and what is on them."""

    images: str
    ground_truth: str


def main(settings: Settings) -> None:
    """Run what is missing, measure all, print the table and write it as JSON."""
    train, held = collections(settings)
    place = settings.output.absolute()
    labels = table_of(train, place / "labels", settings.labelling)
    on_held = labels if held == train else table_of(held, place / "held_labels", settings.labelling)
    rows = {"SoLOST's boxes": [measured(on_held, held, place / "measured" / "labels")]}
    for seed in range(settings.seeds):
        runs = place / "runs" / f"seed{seed}"
        flags = [*shlex.split(settings.training), "--tracking-uri", "off", "--seed", str(seed)]
        flags += ["--rounds", str(settings.rounds)]
        job("train_detector", "--labels", str(labels), "--output", str(runs), *flags)
        for number, model in enumerate(models(runs, settings.rounds), start=1):
            name = f"seed{seed}_round{number}"
            found = place / "found" / name
            bulk("detect_images", held.images, found, ["--detector", str(model)])
            numbers = measured(found, held, place / "measured" / name)
            rows.setdefault(f"detector, round {number}", []).append(numbers)
    report(rows, settings)


def collections(settings: Settings) -> tuple[Collection, Collection]:
    """To learn from, and to measure on."""
    if settings.images is not None and settings.ground_truth is not None:
        train = Collection(settings.images, settings.ground_truth)
        if settings.held_images is None or settings.held_ground_truth is None:
            return train, train
        return train, Collection(settings.held_images, settings.held_ground_truth)
    parts = []
    for name, count, seed in (
        ("scenes", settings.num_scenes, 500),
        ("held", settings.num_held, 600),
    ):
        folder = settings.output.absolute() / name
        if not (folder / "instances.json").exists():
            write_collection(
                folder, num_scenes=count, seed=seed, sizes=_SCENE_SIZES, num_objects=_OBJECTS
            )
        parts.append(Collection(str(folder / "images"), str(folder / "instances.json")))
    return parts[0], parts[1]


def table_of(collection: Collection, output: Path, flags: str) -> Path:
    """SoLOST's boxes."""
    bulk("label_images", collection.images, output, shlex.split(flags))
    return output


def bulk(name: str, images: str, output: Path, flags: list[str]) -> None:
    """A table of the images, or the rest of one."""
    again = ["--resume"] if output.exists() else []
    where = ["--images", images, "--output", str(output), "--tracking-uri", "off"]
    job(name, *where, *flags, *again)


def models(runs: Path, rounds: int) -> Iterator[Path]:
    """The detector of each round."""
    for number in range(1, rounds + 1):
        kind = f"*-round{number}-*" if number > 1 else "*"
        yield next(
            folder / "model"
            for folder in sorted(runs.glob(f"detector-{kind}"))
            if number > 1 or "-round" not in folder.name
        )


def measured(table: Path, collection: Collection, output: Path) -> dict[str, Any]:
    """The numbers of jobs/evaluate_boxes.py."""
    place = ["--labels", str(table), "--ground-truth", collection.ground_truth]
    job("evaluate_boxes", *place, "--output", str(output))
    numbers: dict[str, Any] = json.loads((output / "evaluation.json").read_text())
    return numbers


def job(name: str, *flags: str) -> None:
    """Run a job of this repository; its lines go where ours go."""
    print(f"$ python jobs/{name}.py {shlex.join(flags)}", flush=True)
    subprocess.run([sys.executable, f"jobs/{name}.py", *flags], check=True)


def report(rows: dict[str, list[dict[str, Any]]], settings: Settings) -> None:
    """One line per kind of boxes; over seeds the mean and the range."""
    columns = ["boxes", "AP50", "AP", "AR100", "CorLoc"]
    shown = [
        [name, *(_cell(results, key) for key in ("ap50", "ap", "ar_100", "corloc"))]
        for name, results in rows.items()
    ]
    print_table(f"{settings.seeds} seeds: mean, least, most; of one: its interval", columns, shown)
    write_json(settings.output / "results.json", rows)


def _cell(results: list[dict[str, Any]], key: str) -> str:
    if len(results) == 1:
        value, interval = _number(results[0], key), _interval(results[0], key)
        return f"{value:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
    values = [_number(one, key) for one in results]
    return f"{statistics.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def _number(result: dict[str, Any], key: str) -> float:
    return float(result["corloc"] if key == "corloc" else result["detection"][key])


def _interval(result: dict[str, Any], key: str) -> list[float] | None:
    if key == "corloc":
        return list(result["interval"])
    return list(result["detection"]["ap50_interval"]) if key == "ap50" else None


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
