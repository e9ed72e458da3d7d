"""How fast training without labels is, as ratios of ways that took turns in one run.

    python -m benchmarks.dino                           # all parts, on the CPU
    python -m benchmarks.dino --parts a b --preset paper --device cuda --precision bf16 \
        --batch-size 128 --steps 5

(a) images per second of our step, from a batch of uint8 images in memory to the moved teacher, over
    those of its forward/backward bound: the same networks on crops made beforehand, in plain torch
    without loop, clipping or centre; and what the views, the heads and the loss cost of our step
(b) images per second of the batched augmentation over those of the same views made image by image
    with torchvision.transforms.v2, one core each; with --device cuda ours are made there
(c) images per second of a job in a Ray Train worker over those of the same job without Ray, from
    the second epoch on; whole jobs take turns
(d) efficiency of two workers pinned to a core each, at the same batch per worker; always on the CPU

Each ratio is taken round by round; the median is the result, the spread is the range of the rounds.

Shape letters:  B images   H, W pixels   G global views   V all views   D channels   K prototypes
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.rounds import Ratio, print_and_keep, ratio, take_turns
from benchmarks.training_ways import LoopTraining, RepeatedBatch, plant_pictures
from benchmarks.training_workers import Job, ray_against_plain, two_against_one
from pipeline.config import PretrainDinoJob
from pipeline.config.pretraining import CropsConfig, presets
from pipeline.losses.dino import dino_loss
from pipeline.pretraining.setup import build_objective, set_up
from pipeline.pretraining.task import Crops
from pipeline.pretraining.views import NUM_GLOBAL, draw_views, make_views
from pipeline.training.loop import AUTOCAST, Hooks, StepKey
from pipeline.training.workers import Workers

Part = Literal["a", "b", "c", "d"]
_CORES = len(os.sched_getaffinity(0))
# So many that no schedule ends here.
_EPOCHS = 1_000_000
# Side in pixels, as far as ours reaches: four of the largest standard deviations either way.
_BLUR_KERNEL = 17


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    parts: tuple[Part, ...] = ("a", "b", "c", "d")
    preset: Literal["nano", "paper"] = "nano"
    """Network, head and crops as in ``jobs/pretrain_dino.py``; paper: ViT-S/16, 224 and 96 px."""
    name: str | None = None
    """Another network than the preset's."""
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    """The blocks, in both ways of (a)."""
    threads: int = _CORES
    """Of torch, in (a)."""
    batch_size: int = 32
    """Of (a), (b) and (c)."""
    steps: int = 1
    """Steps of a round in (a); more on a GPU, where a round should take 0.5 s or so."""
    rounds: int = 15
    view_rounds: int = 7
    job_images: int = 512
    loader_workers: int = 1
    job_threads: int = max(1, _CORES - 1)
    """Of torch, in (c); Ray's own processes want some time too."""
    job_epochs: int = 5
    job_rounds: int = 2
    local_batch: int = 16
    """Of each worker in (d)."""
    local_steps: int = 1
    local_rounds: int = 5
    output: Path = Path("benchmarks/results/dino.json")

    def job(self, root: Path, batch_size: int) -> PretrainDinoJob:
        """What ``jobs/pretrain_dino.py`` would be asked for."""
        values = presets()[self.preset]
        named = {} if self.name is None else {"name": self.name}
        return PretrainDinoJob(
            **{
                **values,
                "images": (str(root),),
                "epochs": _EPOCHS,
                "batch_size": batch_size,
                "loader_workers": 0,
                "precision": self.precision,
                "compile": self.compile,
                "model": {**values.get("model", {}), **named},
            }
        )


class OurTraining(LoopTraining):
    """A job as it is set up, but for its loader: every epoch is the same batch, ``steps`` times."""

    def __init__(self, job: PretrainDinoJob, workers: Workers, steps: int) -> None:
        setup = set_up(job, workers)
        self.task, self.job = setup.task, job
        (self.batch,) = islice(self.task.begin_epoch(0), 1)
        self.task.loader = RepeatedBatch(self.batch, steps).as_loader()
        hooks = Hooks(
            lambda epoch, numbers: None,
            before_update=self.task.before_update,
            after_update=self.task.after_update,
        )
        super().__init__(self.task, setup.state, setup.settings, workers, hooks)

    def crops(self) -> Crops:
        """Those of a step, as the step makes them."""
        (part,) = self.task.parts(self.batch, StepKey(1, 1))
        crops: Crops = part.inputs
        return crops

    def autocast(self) -> AbstractContextManager[Any]:
        """As in the loop."""
        kind, device = AUTOCAST[self.job.precision], self.task.workers.device
        return nullcontext() if kind is None else torch.autocast(device.type, dtype=kind)


class Bound:
    """The least that a step of ``ours`` must compute, ``steps`` times per call."""

    def __init__(self, ours: OurTraining, steps: int) -> None:
        objective = build_objective(ours.job, None).to(ours.task.workers.device).train()
        self._student, self._teacher = objective.student, objective.teacher
        self._crops, self._autocast, self._steps = ours.crops(), ours.autocast, steps
        self._temps = ours.job.dino.student_temp, ours.job.dino.teacher_temp
        weights = [weight for weight in self._student.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.04, fused=True)

    def __call__(self) -> None:
        for _ in range(self._steps):
            with self._autocast():
                loss = self._loss()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(
                    [*self._teacher.parameters()], [*self._student.parameters()], 0.004
                )

    def _loss(self) -> Tensor:
        num_images = len(self._crops.global_B3HW[0])
        with torch.no_grad():
            teacher_BK = self._teacher(torch.cat([*self._crops.global_B3HW]))
        sizes = [part for part in self._crops if part]
        student_BD = torch.cat([self._student.features(torch.cat([*part])) for part in sizes])
        student_BK = self._student.head(student_BD)
        return _plain_loss(
            student_BK.unflatten(0, (-1, num_images)),
            teacher_BK.unflatten(0, (-1, num_images)),
            *self._temps,
        )


def _plain_loss(
    student_VBK: Tensor, teacher_GBK: Tensor, student_temp: float, teacher_temp: float
) -> Tensor:
    """Algorithm 1's, over all pairs of unequal views; nothing is centred."""
    log_VBK = (student_VBK.float() / student_temp).log_softmax(dim=-1)
    target_GBK = (teacher_GBK.float() / teacher_temp).softmax(dim=-1)
    terms = [
        -(target_BK * log_BK).sum(dim=-1).mean()
        for own, target_BK in enumerate(target_GBK)
        for view, log_BK in enumerate(log_VBK)
        if view != own
    ]
    return torch.stack(terms).mean()


def step_against_bound(settings: Settings, root: Path) -> list[Ratio]:
    """(a)"""
    device = torch.device(settings.device)
    job = settings.job(root, settings.batch_size)
    ours = OurTraining(job, Workers(0, 1, device), settings.steps)
    pieces = _pieces(ours)

    def often(piece: Callable[[], object]) -> Callable[[], object]:
        return lambda: [piece() for _ in range(settings.steps)]

    ways: dict[str, Callable[[], object]] = {
        "ours": ours,
        "bound": Bound(ours, settings.steps),
        **{name: often(piece) for name, piece in pieces.items()},
    }
    seconds = take_turns(ways, settings.rounds, device)
    # The same images in both: their speeds' ratio is the seconds' ratio turned over.
    return [
        ratio("a: our images/s / the bound's", seconds["bound"], seconds["ours"], ">= 0.9"),
        *(ratio(f"a: {name} / our step", seconds[name], seconds["ours"]) for name in pieces),
    ]


def _pieces(ours: OurTraining) -> dict[str, Callable[[], object]]:
    """Shares of our step, each on inputs of the right shape."""
    objective, device = ours.task.objective, ours.task.workers.device
    student, teacher = objective.student, objective.teacher
    images, num_views = ours.batch.num_images, NUM_GLOBAL + ours.task.crops.num_local
    temps = {
        "student_temp": objective.config.student_temp,
        "teacher_temp": ours.task.teacher_temp(0),
    }
    width: Any = student.backbone.num_features
    features_BD = torch.randn(num_views * images, width, device=device, requires_grad=True)
    weights = [weight for weight in student.head.parameters() if weight.requires_grad]
    with torch.no_grad(), ours.autocast():
        outputs_VBK = student.head(features_BD).unflatten(0, (num_views, images))
    leaf_VBK = outputs_VBK.clone().requires_grad_()

    def loss(student_VBK: Tensor, teacher_GBK: Tensor) -> Tensor:
        return dino_loss(student_VBK, teacher_GBK, objective.center.center_K, **temps).loss

    def loss_alone() -> None:
        torch.autograd.grad(loss(leaf_VBK, outputs_VBK[:NUM_GLOBAL]), [leaf_VBK])

    def heads_and_loss() -> None:
        with ours.autocast():
            with torch.no_grad():
                teacher_BK = teacher.head(features_BD[: NUM_GLOBAL * images])
            student_VBK = student.head(features_BD).unflatten(0, (num_views, images))
            value = loss(student_VBK, teacher_BK.unflatten(0, (NUM_GLOBAL, images)))
        torch.autograd.grad(value, [features_BD, *weights])

    return {
        "drawing and making the views": ours.crops,
        "heads and loss, forward and backward": heads_and_loss,
        "the loss alone, forward and backward": loss_alone,
    }


def views_against_torchvision(settings: Settings, root: Path) -> list[Ratio]:
    """(b)"""
    device = torch.device(settings.device)
    job = settings.job(root, settings.batch_size)
    task = OurTraining(job, Workers(0, 1, torch.device("cpu")), steps=1)
    images_B3HW, crops = task.batch.images_B3HW, task.task.crops
    size = (images_B3HW.shape[2], images_B3HW.shape[3])
    recipes = [_recipe(crops, number) for number in range(NUM_GLOBAL + crops.num_local)]
    generator = torch.Generator().manual_seed(0)

    def ours() -> None:
        drawn = draw_views(len(images_B3HW), size, crops, generator)
        make_views(images_B3HW.to(device), drawn, crops)

    def one_by_one(images: Sequence[Any]) -> None:
        made = [[recipe(image) for recipe in recipes] for image in images]
        for views in zip(*made, strict=True):
            torch.stack(views)

    pictures = [v2.functional.to_pil_image(image_3HW) for image_3HW in images_B3HW]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = take_turns(
        {
            "ours": ours,
            "tensors": lambda: one_by_one([*images_B3HW]),
            "Pillow's": lambda: one_by_one(pictures),
        },
        settings.view_rounds,
        device,
    )
    torch.set_num_threads(num_threads)
    return [
        ratio(f"b: our views/s / torchvision's, {kind}", seconds[kind], seconds["ours"])
        for kind in ("tensors", "Pillow's")
    ]


def _recipe(crops: CropsConfig, number: int) -> v2.Transform:
    """What makes view ``number`` of an image, with torchvision's own parts."""
    is_global, kind = number < NUM_GLOBAL, min(number, NUM_GLOBAL)
    jitter = v2.ColorJitter(crops.brightness, crops.contrast, crops.saturation, crops.hue)
    blur = v2.GaussianBlur(_BLUR_KERNEL, crops.blur_sigma)
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                crops.global_size if is_global else crops.local_size,
                scale=crops.global_scale if is_global else crops.local_scale,
                ratio=crops.ratio,
                interpolation=v2.InterpolationMode.BICUBIC,
            ),
            v2.RandomHorizontalFlip(crops.hflip),
            v2.RandomApply([jitter], crops.jitter_prob),
            v2.RandomGrayscale(crops.gray_prob),
            v2.RandomApply([blur], crops.blur_prob[kind]),
            v2.RandomSolarize(128, crops.solarize_prob[kind]),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(crops.mean, crops.std),
        ]
    )


def job_of(settings: Settings, root: Path) -> Job:
    """(c)"""
    flags: dict[str, object] = {
        "preset": settings.preset,
        "images": root,
        "epochs": settings.job_epochs,
        "optim.warmup-epochs": 0,
        "loader-workers": settings.loader_workers,
        "precision": settings.precision,
    }
    if settings.name is not None:
        flags["model.name"] = settings.name
    return Job(
        script="cluster/training.py",
        flags=flags,
        batch_size=settings.batch_size,
        threads=settings.job_threads,
        use_gpu=settings.device == "cuda",
    )


@dataclass(frozen=True)
class Load:
    """(d)"""

    settings: Settings
    root: Path

    def training(self, workers: Workers) -> LoopTraining:
        """That of one of ``workers``."""
        job = self.settings.job(self.root, self.settings.local_batch * workers.size)
        return OurTraining(
            job.model_copy(update={"precision": "fp32"}), workers, self.settings.local_steps
        )


def main(settings: Settings) -> None:
    """Measure the parts asked for, print the ratios and keep them."""
    torch.set_num_threads(settings.threads)
    ratios: list[Ratio] = []
    with TemporaryDirectory() as folder:
        root = Path(folder)
        job = settings.job(root, settings.batch_size)
        plant_pictures(
            root,
            num_images=max(settings.job_images, settings.batch_size, 2 * settings.local_batch),
            side=job.crops.source_side,
            num_classes=1,
        )
        # The one that has the cores to itself least is measured last.
        if "a" in settings.parts:
            ratios += step_against_bound(settings, root)
        if "b" in settings.parts:
            ratios += views_against_torchvision(settings, root)
        if "d" in settings.parts:
            load = Load(settings, root)
            ratios += two_against_one(load.training, settings.local_rounds)
        if "c" in settings.parts:
            ratios += ray_against_plain(job_of(settings, root), settings.job_rounds)
    crops = job.crops
    title = (
        f"{job.model.name}, 2 views of {crops.global_size} px and {crops.num_local} of "
        f"{crops.local_size}, batch {settings.batch_size}, {settings.precision}"
    )
    print_and_keep(title, ratios, settings, settings.output, torch.device(settings.device))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
