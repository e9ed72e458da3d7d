"""Cells -> the runs that measure them: jobs with their settings, and the file that says it is done.

Two cells that need the same run share it; a cell whose data or weights are not at hand has none,
and says so. To run another kind of recipe: a method of ``_Planner``.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean

from pipeline.config import DetectJob, LabelJob, TrainClassifierJob, TrainDetectorJob
from pipeline.config.presets import merged
from pipeline.data.pseudo_labels import MANIFEST_NAME, config_hash
from pipeline.reproduction.backbones import BACKBONES
from pipeline.reproduction.cells import (
    BoxesRecipe,
    Cell,
    ClassifierRecipe,
    DetectorRecipe,
    Run,
    Split,
    Values,
)
from pipeline.reproduction.inputs import AtHand, Photos, read_photos
from pipeline.runs.folder import RunFolder
from pipeline.storage import Location

_DETECTOR_START = "resnet50-dino"
_SUMMARY = "summary.json"
_TRAINING = ("train_classifier", "train_detector")
# Of detectors cut short, whose preset counts steps.
_STEPS_OF_A_WINDOW = 10

LISTS = "photos"
"""Folder of the lists of photos."""


@dataclass(frozen=True, eq=False)
class PlannedCell:
    """A cell with the runs whose results are its figure.

    Attributes:
        cell: what is measured.
        runs: one per seed; of pseudo-boxes a single one.
        photos: on which boxes are measured; None for classifiers.
        missing: why it cannot be run; None where it can.
    """

    cell: Cell
    runs: tuple[Run, ...] = ()
    photos: Photos | None = None
    missing: str | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """All cells, their runs in an order in which they can be done, and the photos of those.

    The runs find lists of photos in ``LISTS`` below the output, which is written before them.
    """

    cells: tuple[PlannedCell, ...]
    runs: tuple[Run, ...]
    photos: tuple[Photos, ...] = ()


@dataclass(frozen=True)
class Choices:
    """What a user decides of a reproduction.

    Attributes:
        output: folder of all results.
        at_hand: data and weights.
        num_seeds: of each run that has a seed.
        epochs: fewer than the rows', for trying; None is theirs.
        num_images: fewer photos, likewise.
        training: settings of every training run: workers, GPUs, where it is recorded.
        bulk: settings of every labelling run.
    """

    output: Location
    at_hand: AtHand
    num_seeds: int
    epochs: int | None = None
    num_images: int | None = None
    training: Values = field(default_factory=dict)
    bulk: Values = field(default_factory=dict)


def plan_cells(cells: Sequence[Cell], choices: Choices) -> Plan:
    """The runs of the cells.

    Raises:
        DataError: a place told by a flag is missing, or holds something else than it should.
    """
    planner = _Planner(choices)
    planned = tuple(planner.plan(cell) for cell in cells)
    return Plan(planned, tuple(planner.runs.values()), tuple(planner.photos.values()))


def expected_seconds(runs: Sequence[Run]) -> dict[str, float]:
    """By name, what training runs that are not done will take, where runs that differ from them in
    their seed alone are done: the mean of what those took.
    """
    taken: dict[str, list[float]] = {}
    for run in runs:
        if run.job in _TRAINING and run.is_done:
            history = RunFolder(run.folder).history()
            taken.setdefault(_but_its_seed(run), []).append(sum(one["seconds"] for one in history))
    return {
        run.name: fmean(known)
        for run in runs
        if not run.is_done and (known := taken.get(_but_its_seed(run)))
    }


def _but_its_seed(run: Run) -> str:
    # A detector's seed is also in the folder that it is written to.
    same = {name: value for name, value in run.values.items() if name not in ("seed", "output")}
    return config_hash({"job": run.job, **same})


class _Missing(Exception):
    """Data or weights of a cell are not at hand."""


class _Planner:
    """Plans cell by cell, and keeps every run it has made."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.runs: dict[str, Run] = {}
        self.photos: dict[tuple[str, Split | None], Photos] = {}

    def plan(self, cell: Cell) -> PlannedCell:
        """The cell's runs, or why there are none."""
        try:
            match cell.recipe:
                case None:
                    return PlannedCell(cell, missing="the paper's figure alone: it is not run here")
                case ClassifierRecipe() as recipe:
                    seeds = range(self.choices.num_seeds)
                    return PlannedCell(cell, tuple(self._classifier(recipe, s) for s in seeds))
                case BoxesRecipe() as recipe:
                    photos = self._photos_of(recipe.data, recipe.split)
                    return PlannedCell(cell, (self._boxes(recipe, photos),), photos)
                case DetectorRecipe() as recipe:
                    photos = self._photos_of(recipe.boxes.data, recipe.split)
                    seeds = range(self.choices.num_seeds)
                    runs = tuple(self._detections(recipe, photos, seed) for seed in seeds)
                    return PlannedCell(cell, runs, photos)
        except _Missing as reason:
            return PlannedCell(cell, missing=str(reason))

    def _kept(self, run: Run) -> Run:
        return self.runs.setdefault(run.name, run)

    def _classifier(self, recipe: ClassifierRecipe, seed: int) -> Run:
        root = self._place(recipe.data)
        fixed: Values = {
            "data": {"root": root},
            "seed": seed,
            "output": str(self.choices.output.child("runs")),
        }
        values = merged(merged(recipe.values, self.choices.training), fixed)
        values = merged(values, self._start(recipe))
        if self.choices.epochs is not None:
            values = merged(values, _cut_short(values, self.choices.epochs))
        folder = RunFolder.of(TrainClassifierJob.model_validate(values)).place
        return self._kept(Run(folder.name, "train_classifier", values, folder.child(_SUMMARY)))

    def _start(self, recipe: ClassifierRecipe) -> Values:
        """Where the weights of a run start."""
        if recipe.starts_from is None:
            return {}
        file = self.choices.at_hand.weights_of(recipe.starts_from)
        if file is not None:
            return {"model": {"checkpoint": file, "pretrained": False}}
        if self.choices.at_hand.fetch and not recipe.narrowed:
            return {"model": {"pretrained": True}}
        raise _Missing(f"no weights at hand (--weights {recipe.starts_from}=FILE)")

    def _boxes(self, recipe: BoxesRecipe, photos: Photos) -> Run:
        backbone = BACKBONES[recipe.backbone]
        file = self._weights(recipe.backbone)
        chosen = {"feature": recipe.feature} if recipe.feature else {}
        decides: Values = {
            "images": str(photos.list_in(self.choices.output.child(LISTS))),
            "backbone": {**backbone.settings, "name": backbone.name, "checkpoint": file, **chosen},
            "localization": {"rule": recipe.rule, "similarity": recipe.similarity},
            "decode": backbone.decode,
        }
        if recipe.max_objects > 1:
            decides["localization"]["max_objects"] = recipe.max_objects
        digest = config_hash({**decides, "sha256": None if file is None else _sha256(file)})
        parts = (recipe.data, recipe.backbone, recipe.rule, recipe.similarity, recipe.feature)
        name = "-".join([*(part for part in parts if part), digest[:8]])
        output = self.choices.output.child("labels").child(name)
        values = merged(self.choices.bulk, {**decides, "output": str(output), "resume": True})
        LabelJob.model_validate(values)
        return self._kept(Run(name, "label_images", values, output.child(MANIFEST_NAME)))

    def _detections(self, recipe: DetectorRecipe, photos: Photos, seed: int) -> Run:
        """Boxes of the training photos, a detector trained on them, and what it finds."""
        labels = self._boxes(recipe.boxes, self._photos_of(recipe.boxes.data, "trainval"))
        detector = self._detector(recipe, labels, seed)
        decides = {
            "images": str(photos.list_in(self.choices.output.child(LISTS))),
            "detector": str(detector.folder.child("model")),
        }
        # Detector, and seed, are in the name of the folder it lies in.
        name = f"{detector.folder.name}-{recipe.split}-{photos.key}"
        output = self.choices.output.child("found").child(name)
        values = merged(self.choices.bulk, {**decides, "output": str(output), "resume": True})
        DetectJob.model_validate(values)
        result = output.child(MANIFEST_NAME)
        return self._kept(Run(name, "detect_images", values, result, (detector.name,)))

    def _detector(self, recipe: DetectorRecipe, labels: Run, seed: int) -> Run:
        fixed: Values = {"labels": labels.values["output"], "seed": seed}
        values = merged(merged(recipe.values, self.choices.training), fixed)
        if recipe.values.get("detector", {}).get("init") != "none":
            values = merged(values, {"detector": {"init": self._detector_start()}})
        if self.choices.epochs is not None:
            windows = self.choices.epochs
            values = merged(values, {"windows": windows, "steps": windows * _STEPS_OF_A_WINDOW})
        decides = TrainDetectorJob.model_validate(values).what_decides_the_weights()
        # A detector of its own folder: the job also writes its model beside the runs.
        output = self.choices.output.child("detectors").child(config_hash(decides)[:12])
        values = merged(values, {"output": str(output)})
        folder = RunFolder.of(TrainDetectorJob.model_validate(values)).place
        result = folder.child(_SUMMARY)
        return self._kept(Run(folder.name, "train_detector", values, result, (labels.name,)))

    def _detector_start(self) -> str:
        file = self.choices.at_hand.weights_of(_DETECTOR_START)
        if file is None and not self.choices.at_hand.fetch:
            raise _Missing(f"no weights at hand (--weights {_DETECTOR_START}=FILE)")
        return file or "dino"

    def _weights(self, backbone: str) -> str | None:
        """The file of a backbone; None where it comes with the package or by its name."""
        file = self.choices.at_hand.weights_of(backbone)
        if file or BACKBONES[backbone].shipped or self.choices.at_hand.fetch:
            return file
        raise _Missing(f"no weights at hand (--weights {backbone}=FILE, or --fetch)")

    def _place(self, data: str) -> str:
        place = self.choices.at_hand.place_of(data)
        if place is None:
            raise _Missing(f"no data at hand (--data.{data.partition('-')[0]} PATH)")
        return place

    def _photos_of(self, data: str, split: Split | None) -> Photos:
        place = self._place(data)
        if (data, split) not in self.photos:
            self.photos[data, split] = read_photos(place, split, self.choices.num_images)
        return self.photos[data, split]


def _cut_short(values: Values, epochs: int) -> Values:
    """So few epochs, with a warm-up that leaves some."""
    warmup = values.get("optim", {}).get("warmup_epochs", 10.0)
    optim = {"warmup_epochs": min(warmup, epochs / 2), "cooldown_epochs": 0}
    return {"epochs": epochs, "stop_after": None, "optim": optim}


@cache
def _sha256(file: str) -> str:
    """Of a file of weights, read once."""
    with Path(file).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
