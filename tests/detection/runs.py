"""A detector's run small enough for a test: 12 scenes of about 112 px, their boxes in a table."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.boxes import xywh_to_xyxy
from pipeline.config import TrainDetectorJob
from pipeline.config.detection import presets
from pipeline.detection.run import train_detector_here
from pipeline.runs.folder import RunFolder
from pipeline.runs.life import Outside
from pipeline.scenes.scenes import write_collection
from pipeline.training.workers import Workers
from tests.tables import Row, label_row, write_table

ALONE = Workers(0, 1, torch.device("cpu"))
NUM_SCENES = 12


@dataclass(frozen=True)
class Material:
    """Scenes with what is on them, and a pseudo-label table that has one box of each."""

    scenes: Path
    labels: Path

    @property
    def images(self) -> Path:
        return self.scenes / "images"

    @property
    def truth(self) -> Path:
        return self.scenes / "instances.json"

    def photos(self) -> list[Path]:
        return sorted(self.images.rglob("*.jpg"))


SIZES = ((128, 96), (96, 128), (112, 112))


def write_material(folder: Path, sizes: Sequence[tuple[int, int]] = SIZES) -> Material:
    """Scenes of so many shapes; the pseudo-box is that of the main object."""
    write_collection(folder / "scenes", num_scenes=NUM_SCENES, seed=0, sizes=sizes)
    made = Material(folder / "scenes", folder / "labels")
    write_table(made.labels, rows_of(made))
    return made


def rows_of(material: Material, **columns: Any) -> list[Row]:
    """A row for each scene; ``columns`` are what all of them have otherwise."""
    truth = json.loads(material.truth.read_text())
    main = {one["image_id"]: one["bbox"] for one in reversed(truth["annotations"])}
    return [
        label_row(
            image["file_name"],
            uri=str(material.images / image["file_name"]),
            **{
                "width": image["width"],
                "height": image["height"],
                "boxes": xywh_to_xyxy(main[image["id"]]).tolist(),
                "scores": [0.9],
            }
            | columns,
        )
        for image in truth["images"]
    ]


def copy_of(material: Material, folder: Path) -> Material:
    """The same scenes elsewhere, to be harmed."""
    shutil.copytree(material.scenes, folder / "scenes")
    made = Material(folder / "scenes", folder / "labels")
    write_table(made.labels, rows_of(made))
    return made


def a_job(material: Material, output: Path, **changes: Any) -> TrainDetectorJob:
    """The preset nano in 3 windows of 4 steps; groups among ``changes`` add to the preset's."""
    preset = presets()["nano"]
    values: dict[str, Any] = preset | {
        "labels": str(material.labels),
        "output": str(output),
        "steps": 12,
        "windows": 3,
        "precise_bn": 2,
        "num_workers": 0,
        "loader_workers": 0,
        "tracking_uri": "off",
        "gradient_norm_steps": 3,
    }
    for name, value in changes.items():
        together = {**preset.get(name, {}), **value} if isinstance(value, dict) else value
        values[name] = together
    return TrainDetectorJob.model_validate(values)


def probe_of(material: Material) -> dict[str, Any]:
    """The settings of a probe on the very scenes."""
    return {"images": str(material.images), "ground_truth": str(material.truth), "every": 2}


def train(job: TrainDetectorJob, outside: Outside | None = None) -> tuple[dict[str, Any], str]:
    """Run the job in this process as its driver does; its summary, and all it told."""
    folder, lines = RunFolder.of(job), list[str]()
    with folder.held(job):
        summary = train_detector_here(job, folder, ALONE, outside or Outside(lines.append))
    return summary, "\n".join(lines)


def weights_of(job: TrainDetectorJob) -> dict[str, torch.Tensor]:
    """All tensors after the last whole window, running statistics too."""
    latest = RunFolder.of(job).checkpoints.latest()
    assert latest is not None
    weights: dict[str, torch.Tensor] = latest.state["loop"]["objective"]
    return weights
