"""How fast the detector trains and detects, as ratios of ways that took turns in one run.

    python -m benchmarks.detector                       # all parts, on the CPU
    python -m benchmarks.detector --parts a b --device cuda --kinds c4 fpn --backbone resnet50 \
        --side 800 --regions None --steps 5

(a) images per second of our training step, as a job sets it up, from a batch in memory, over those
    of torchvision's own Faster R-CNN with the same backbone and head, anchors, RoIs and image size
(b) images per second of detecting, over those of the bare detector on tensors in memory: from
    pixels to rows of the table; from files; and the Ray job of ``jobs/detect_images.py``, its
    start-up taken off
(c) images per second of a training job in a Ray Train worker over those of the same job without
    Ray, from the second window on; whole jobs take turns

Each ratio is taken round by round; the median is the result, the spread is the range of the rounds.

Shape letters:  H, W rows and columns
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.bulk_jobs import ray_seconds_per_image, repeated_inputs
from benchmarks.detector_ways import (
    PROVENANCE,
    OurTraining,
    Plan,
    TorchvisionTraining,
    plant_table,
    training_job,
)
from benchmarks.rounds import Ratio, print_and_keep, ratio, take_turns
from benchmarks.training_workers import ray_against_plain
from pipeline.config.detection import DetectComputeConfig, DetectImagesConfig, DetectorKind
from pipeline.data.lake import Collection
from pipeline.data.pixels import load_pixels
from pipeline.detection.c4 import BackboneName
from pipeline.detection.labeller import DetectedBoxes, DetectionLabeller
from pipeline.labelling.rows import decoded_images
from pipeline.models.features import in_precision
from pipeline.training.workers import Workers

Part = Literal["a", "b", "c"]
_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    parts: tuple[Part, ...] = ("a", "b", "c")
    kinds: tuple[DetectorKind, ...] = ("c4", "fpn", "nano")
    """Of (a) and (b)."""
    backbone: BackboneName = "resnet18"
    """Of c4 and fpn; nano has its own."""
    side: int = 320
    """Shorter side as c4 and fpn see it."""
    nano_side: int = 128
    regions: int | None = 16
    """Per image at most, in training and in a test; None is the kind's own: of c4 512 and 1000,
    minutes for a step on a core."""
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = _CORES
    """Of torch, in (a) and (b); in Ray so many actors."""
    batch_size: int = 2
    steps: int = 1
    """Steps of a round in (a), ten times as many of nano; more on a GPU, where a round should take
    0.5 s or so."""
    rounds: int = 5
    detect_images: int = 4
    """Images of a round in (b), ten times as many of nano."""
    detect_rounds: int = 5
    ray_blocks: int = 6
    """Blocks of as many images that the Ray job of (b) is given, beside one for each actor."""
    ray_rounds: int = 2
    job_kind: DetectorKind = "nano"
    """Of (c): the quickest step, so that Ray counts most."""
    job_steps: int = 30
    job_windows: int = 5
    job_threads: int = max(1, _CORES - 1)
    """Of torch, in (c); Ray's own processes want some time too."""
    job_rounds: int = 2
    output: Path = Path("benchmarks/results/detector.json")

    def plan(self, kind: DetectorKind) -> Plan:
        """What is measured of a kind."""
        return Plan(
            kind,
            self.backbone,
            self.nano_side if kind == "nano" else self.side,
            self.batch_size,
            self.regions,
            torch.device(self.device),
            self.precision,
        )

    def often(self, kind: DetectorKind) -> int:
        """How much more of it makes a round of equal length."""
        return 10 if kind == "nano" else 1


def step_against_torchvision(settings: Settings, kind: DetectorKind, root: Path) -> list[Ratio]:
    """(a)"""
    plan, steps = settings.plan(kind), settings.steps * settings.often(kind)
    ours = OurTraining(plan.job(root), Workers(0, 1, plan.device), steps)
    ways: dict[str, Callable[[], object]] = {
        "ours": ours,
        "torchvision": TorchvisionTraining(ours, plan, steps),
    }
    seconds = take_turns(ways, settings.rounds, plan.device)
    # The same images in both: their speeds' ratio is the seconds' ratio turned over.
    name = f"a: our images/s / torchvision's, step of {kind}"
    return [ratio(name, seconds["torchvision"], seconds["ours"], ">= 1.0")]


class BareForward:
    """The detector on images that are tensors of the right size, as the labeller groups them."""

    def __init__(self, labeller: DetectionLabeller, decoded: pa.Table) -> None:
        self._labeller = labeller
        images = decoded_images(decoded)
        seen = [self._seen(image) for image in images if image is not None]
        self._batches = [[seen[row] for row in rows] for rows in labeller.batches(images)]

    def _seen(self, image: NDArray[np.uint8]) -> Tensor:
        predictor = self._labeller.predictor
        image_3HW = predictor.size.pixels_of(Image.fromarray(image))
        return image_3HW.to(predictor.device).float() / 255

    @torch.inference_mode()
    def __call__(self) -> None:
        predictor = self._labeller.predictor
        with in_precision(self._labeller.precision, str(predictor.device)):
            for batch in self._batches:
                predictor.detector(batch)


def detecting_against_forward(settings: Settings, kind: DetectorKind, root: Path) -> list[Ratio]:
    """(b)"""
    plan, num_images = settings.plan(kind), settings.detect_images * settings.often(kind)
    files = Collection(str(root / "scenes" / "images"))
    inputs = repeated_inputs(files.chunks(), num_images)
    recipe = DetectedBoxes(plan.stored(), precision=plan.precision)
    labeller = recipe(PROVENANCE, settings.device)

    def load() -> pa.Table:
        return load_pixels(inputs, **DetectImagesConfig().model_dump())

    decoded = load()
    forward = BareForward(labeller, decoded)
    ways: dict[str, Callable[[], object]] = {
        "bare": forward,
        "pixels": lambda: labeller(decoded),
        "files": lambda: labeller(load()),
    }
    seconds = take_turns(ways, settings.detect_rounds, plan.device)
    bare, in_ray = [], []
    actors = settings.threads if settings.device == "cpu" else 1
    compute = DetectComputeConfig(
        precision=plan.precision, block_size=num_images, num_actors=actors
    )
    many = repeated_inputs(files.chunks(), num_images * (settings.ray_blocks + actors))
    for _ in range(settings.ray_rounds):
        in_ray.append(
            ray_seconds_per_image(recipe, many, PROVENANCE, DetectImagesConfig(), compute)
        )
        again = take_turns({"bare": forward}, 1, plan.device)["bare"]
        bare.append(again[0] / num_images)
    name = "images/s / the bare forward's"
    return [
        ratio(f"b: {kind} from pixels in memory, {name}", seconds["bare"], seconds["pixels"]),
        ratio(f"b: {kind} from files, {name}", seconds["bare"], seconds["files"], ">= 0.9"),
        ratio(f"b: {kind} in the Ray job, {name}", bare, in_ray, ">= 0.9"),
    ]


def main(settings: Settings) -> None:
    """Measure the parts asked for, print the ratios and keep them."""
    torch.set_num_threads(settings.threads)
    ratios: list[Ratio] = []
    with TemporaryDirectory() as folder:
        roots = {}
        for kind in dict.fromkeys((*settings.kinds, settings.job_kind)):
            plan = settings.plan(kind)
            if plan.side not in roots:
                roots[plan.side] = Path(folder) / str(plan.side)
                plant_table(
                    roots[plan.side], side=plan.side, num_images=max(8, settings.batch_size)
                )
        for kind in settings.kinds:
            root = roots[settings.plan(kind).side]
            if "a" in settings.parts:
                ratios += step_against_torchvision(settings, kind, root)
            if "b" in settings.parts:
                ratios += detecting_against_forward(settings, kind, root)
        if "c" in settings.parts:
            plan = settings.plan(settings.job_kind)
            job = training_job(
                plan,
                roots[plan.side],
                windows=settings.job_windows,
                steps=settings.job_steps,
                threads=settings.job_threads,
            )
            ratios += ray_against_plain(job, settings.job_rounds)
    title = (
        f"{settings.backbone} at {settings.side} px, nano at {settings.nano_side} px, "
        f"batch {settings.batch_size}, {settings.precision}, regions {settings.regions}"
    )
    print_and_keep(title, ratios, settings, settings.output, torch.device(settings.device))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
