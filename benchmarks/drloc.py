"""How fast training is, as ratios of ways that took turns in one run.

    python -m benchmarks.drloc                          # all parts, on the CPU
    python -m benchmarks.drloc --parts a b --device cuda --batch-size 128 --precision bf16

(a) a training step with DRLoc and without, and what its pieces cost
(b) images per second of our loop over those of timm's own train step: from a batch in memory, and
    from a folder of JPEGs through both loaders with the same number of processes
(c) images per second of a job in a Ray Train worker over those of the same job without Ray, from
    the second epoch on; whole jobs take turns
(d) efficiency of two workers pinned to a core each, at the same batch per worker; always on the CPU

Each ratio is taken round by round; the median is the result, the spread is the range of the rounds.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import tyro

from benchmarks.rounds import Ratio, print_and_keep, ratio, take_turns
from benchmarks.training_ways import (
    Network,
    OurTraining,
    RepeatedBatch,
    TimmTraining,
    head_shares,
    our_loader,
    plant_pictures,
    timm_loader,
)
from benchmarks.training_workers import Job, Load, ray_against_plain, two_against_one
from pipeline.data.loader import Batch
from pipeline.losses.multi_stage import DRLocObjective

Part = Literal["a", "b", "c", "d"]
_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    parts: tuple[Part, ...] = ("a", "b", "c", "d")
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    threads: int = _CORES
    """Of torch, in (a) and (b)."""
    name: str = "swin_tiny_patch4_window7_224"
    """Network of (a), (d) and of (b) from memory."""
    image_size: int = 224
    batch_size: int = 8
    steps: int = 1
    """Steps of a round from memory; more on a GPU, where a round should take 0.5 s or so."""
    rounds: int = 15
    data_name: str = "vit_tiny_patch16_224"
    """Network of (c), and of (b) from a folder: quick, so that the loaders count."""
    data_size: int = 64
    data_images: int = 1000
    data_batch: int = 64
    data_rounds: int = 3
    loader_workers: int = 1
    job_threads: int = max(1, _CORES - 1)
    """Of torch, in (c); Ray's own processes want some time too."""
    job_epochs: int = 5
    job_rounds: int = 2
    local_batch: int = 16
    """Of each worker in (d)."""
    local_steps: int = 1
    local_rounds: int = 5
    output: Path = Path("benchmarks/results/drloc.json")

    @property
    def network(self) -> Network:
        """What is trained from memory."""
        return Network(
            self.name,
            self.image_size,
            num_classes=100,
            device=torch.device(self.device),
            precision=self.precision,
            channels_last=self.channels_last,
        )

    @property
    def data_network(self) -> Network:
        """What is trained from a folder."""
        return replace(self.network, name=self.data_name, image_size=self.data_size, num_classes=10)


def repeated(network: Network, batch_size: int, steps: int) -> RepeatedBatch:
    images_B3HW, targets_B = network.noise(batch_size)
    return RepeatedBatch(Batch(images_B3HW, targets_B, batch_size, 0), steps)


def step_with_drloc(settings: Settings) -> list[Ratio]:
    """(a)"""
    network = settings.network
    loader = repeated(network, settings.batch_size, settings.steps).as_loader()
    with_drloc = OurTraining(network, loader, drloc=True)
    pieces = head_shares(network, settings.batch_size)

    def often(piece: Callable[[], object]) -> Callable[[], object]:
        return lambda: [piece() for _ in range(settings.steps)]

    ways: dict[str, Callable[[], object]] = {
        "without": OurTraining(network, loader),
        "with": with_drloc,
        **{name: often(piece) for name, piece in pieces.items()},
    }
    seconds = take_turns(ways, settings.rounds, network.device)
    weights = [sum(one.numel() for one in with_drloc.objective.parameters())]
    head = with_drloc.objective.drloc
    assert isinstance(head, DRLocObjective)
    of_head = sum(one.numel() for one in head.parameters())
    return [
        ratio("a: step with DRLoc / without", seconds["with"], seconds["without"], "<= 1.02"),
        *(ratio(f"a: {name} / step without", seconds[name], seconds["without"]) for name in pieces),
        Ratio("a: weights with DRLoc / without", [weights[0] / (weights[0] - of_head)]),
    ]


def loop_against_timm(settings: Settings) -> list[Ratio]:
    """(b), from memory"""
    network = settings.network
    batch = network.noise(settings.batch_size)
    ways: dict[str, Callable[[], object]] = {
        "ours": OurTraining(
            network, repeated(network, settings.batch_size, settings.steps).as_loader()
        ),
        "timm": TimmTraining(network, [batch] * settings.steps, mixed=False),
    }
    seconds = take_turns(ways, settings.rounds, network.device)
    # The same images in both: their speeds' ratio is the seconds' ratio turned over.
    return [ratio("b: our images/s / timm's, step", seconds["timm"], seconds["ours"], ">= 1.0")]


def loop_against_timm_with_data(settings: Settings, root: Path) -> list[Ratio]:
    """(b), from a folder"""
    network, batch = settings.data_network, settings.data_batch
    ways: dict[str, Callable[[], object]] = {
        "ours": OurTraining(network, our_loader(root, network, batch, settings.loader_workers)),
        "timm": TimmTraining(
            network, timm_loader(root, network, batch, settings.loader_workers), mixed=True
        ),
    }
    seconds = take_turns(ways, settings.data_rounds, network.device)
    name = f"b: our images/s / timm's, with data ({settings.data_name})"
    return [ratio(name, seconds["timm"], seconds["ours"], ">= 1.0")]


def job_of(settings: Settings, root: Path) -> Job:
    """(c)"""
    return Job(
        script="cluster/training.py",
        flags={
            "data.name": "folder",
            "data.root": str(root),
            "data.loader-workers": settings.loader_workers,
            "model.name": settings.data_name,
            "model.image-size": settings.data_size,
            "epochs": settings.job_epochs,
            "optim.warmup-epochs": 0,
        },
        batch_size=settings.data_batch,
        threads=settings.job_threads,
        use_gpu=settings.device == "cuda",
    )


def load_of(settings: Settings) -> Load:
    """(d)"""
    network = replace(settings.network, device=torch.device("cpu"), precision="fp32")
    return Load(network, settings.local_batch, settings.local_steps)


def main(settings: Settings) -> None:
    """Measure the parts asked for, print the ratios and keep them."""
    torch.set_num_threads(settings.threads)
    ratios: list[Ratio] = []
    with TemporaryDirectory() as folder:
        root = Path(folder)
        if {"b", "c"} & set(settings.parts):
            # A third larger than the network's: there is something to crop from.
            side = settings.data_size * 4 // 3
            plant_pictures(root, num_images=settings.data_images, side=side, num_classes=10)
        # The one that has the cores to itself least is measured last.
        if "a" in settings.parts:
            ratios += step_with_drloc(settings)
        if "b" in settings.parts:
            ratios += loop_against_timm(settings)
            ratios += loop_against_timm_with_data(settings, root)
        if "d" in settings.parts:
            ratios += two_against_one(load_of(settings).training, settings.local_rounds)
        if "c" in settings.parts:
            ratios += ray_against_plain(job_of(settings, root), settings.job_rounds)
    title = (
        f"{settings.name} at {settings.image_size} px, batch {settings.batch_size}, "
        f"{settings.precision}"
    )
    print_and_keep(title, ratios, settings, settings.output, torch.device(settings.device))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
