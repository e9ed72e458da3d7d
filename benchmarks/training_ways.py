"""The same network trained in two ways, ours and timm's, on batches in memory or from a folder.

Shape letters:  B images   H, W pixels   K classes
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.classification.augment import train_transform
from pipeline.classification.task import SupervisedObjective, SupervisedTask
from pipeline.config import AugmentConfig, DRLocConfig
from pipeline.config.classification import Pooling
from pipeline.config.settings import LoaderConfig
from pipeline.data.labelled_folders import read_folder
from pipeline.data.loader import (
    Batch,
    BatchLoader,
    ShardedBatchSampler,
    train_loader,
)
from pipeline.losses.multi_stage import DRLocObjective
from pipeline.models.backbones import build_model
from pipeline.training.loop import AUTOCAST, Hooks, LoopSettings, LoopState, Task, train
from pipeline.training.optim import build_optimizer, parameter_groups
from pipeline.training.schedules import warmup_cosine
from pipeline.training.workers import Workers

LR, WEIGHT_DECAY, CLIP = 1e-4, 0.05, 5.0
MIXUP, CUTMIX, SMOOTHING = 0.8, 1.0, 0.1
TOTAL_STEPS, WARMUP_STEPS = 100_000, 1_000
NUM_PAIRS = 64
# The usual one less its mstd0.5, with which timm asks Pillow 13 for colours of 0 bits, and fails.
_RAND_AUGMENT = "rand-m9-inc1"


@dataclass(frozen=True)
class Network:
    """What is trained; both ways start from the same weights."""

    name: str
    image_size: int
    num_classes: int
    device: torch.device
    precision: str = "fp32"
    channels_last: bool = False

    def build(self, *, drloc: bool) -> SupervisedObjective:
        """The classifier, with DRLoc's head on its last grid if asked for."""
        torch.manual_seed(0)
        classifier = build_model(
            self.name, num_classes=self.num_classes, image_size=self.image_size, drop_path=0.1
        )
        shapes = classifier.grid_shapes((self.image_size, self.image_size))
        # As a job does: grids of 14 x 14 become 7 x 7.
        kind: Pooling = "mean_2x2" if max(shapes[0][1:]) >= 14 else "none"
        config = DRLocConfig(num_pairs=NUM_PAIRS)
        head = DRLocObjective(shapes, config, pooling=kind) if drloc else None
        objective = SupervisedObjective(classifier, head).to(self.device)
        if self.channels_last:
            objective = objective.to(memory_format=torch.channels_last)
        return objective

    def noise(self, num_images: int) -> tuple[Tensor, Tensor]:
        """``(images_B3HW, targets_B)`` on the device."""
        generator = torch.Generator().manual_seed(0)
        images_B3HW = torch.randn(
            num_images, 3, self.image_size, self.image_size, generator=generator
        )
        targets_B = torch.randint(self.num_classes, (num_images,), generator=generator)
        if self.channels_last:
            images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
        return images_B3HW.to(self.device), targets_B.to(self.device)


class RepeatedBatch:
    """An epoch is the same batch, ``steps`` times: no loader stands in the way."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self._batch, self._steps = batch, steps

    def set_epoch(self, epoch: int) -> None:
        """All epochs are alike."""

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        return iter([self._batch] * self._steps)

    def as_loader(self) -> BatchLoader:
        """For whoever wants the class and only uses what is here."""
        return cast(BatchLoader, self)


class LoopTraining:
    """Our loop on a task, an epoch per call."""

    def __init__(
        self,
        task: Task,
        state: LoopState,
        settings: LoopSettings,
        workers: Workers,
        hooks: Hooks | None = None,
    ) -> None:
        """``hooks``: what happens in a step; the end of an epoch is told here."""
        self._task, self._state, self._settings = task, state, settings
        self._workers = workers
        self._hooks = replace(hooks or Hooks(self._keep), on_epoch_end=self._keep)
        self.numbers: dict[str, float] = {}
        """Of the last epoch, as the loop tells them."""

    def __call__(self) -> None:
        settings = replace(self._settings, num_epochs=self._state.next_epoch + 1)
        train(self._task, self._state, settings, self._workers, self._hooks)

    def _keep(self, epoch: int, numbers: dict[str, float]) -> None:
        self.numbers = numbers


class OurTraining(LoopTraining):
    """Our loop and our step with labels, an epoch per call."""

    def __init__(
        self,
        network: Network,
        loader: BatchLoader,
        *,
        drloc: bool = False,
        workers: Workers | None = None,
    ) -> None:
        workers = workers or Workers(0, 1, network.device)
        self.objective = network.build(drloc=drloc)
        task = SupervisedTask(
            objective=self.objective,
            loader=loader,
            augment=AugmentConfig(mixup=MIXUP, cutmix=CUTMIX, label_smoothing=SMOOTHING),
            num_classes=network.num_classes,
            drloc_weight=lambda epoch: 0.5,
            workers=workers,
            seed=0,
            channels_last=network.channels_last,
        )
        groups = parameter_groups(self.objective, weight_decay=WEIGHT_DECAY)
        optimizer = build_optimizer(groups, kind="adamw", lr=LR)
        scaler = torch.amp.GradScaler(network.device.type, enabled=network.precision == "fp16")
        settings = LoopSettings(1, _rate, seed=0, clip=CLIP, precision=network.precision)
        super().__init__(
            task, LoopState(self.objective, optimizer, None, scaler), settings, workers
        )


def _rate(step: int) -> float:
    return warmup_cosine(step, peak=LR, total_steps=TOTAL_STEPS, warmup_steps=WARMUP_STEPS)


class TimmTraining:
    """timm's own parts in the order of timm's train.py, an epoch per call.

    Plain ``forward``, SoftTargetCrossEntropy, timm's AdamW, clipping and schedule; its progress
    lines, and the waits for the device that they cost, are left out, which favours timm.
    """

    def __init__(
        self, network: Network, batches: Iterable[tuple[Tensor, Tensor]], *, mixed: bool
    ) -> None:
        """``mixed``: whether the batches come with Mixup done, as by timm's collate function."""
        from timm.data.mixup import Mixup
        from timm.loss import SoftTargetCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler

        # A copy of the very network: the same weights, and nothing of ours around it.
        self._network = copy.deepcopy(network.build(drloc=False).classifier.network).train()
        self._batches = batches
        self._mix: Callable[..., Any] | None = None if mixed else Mixup(**_timm_mixing(network))
        self._loss = SoftTargetCrossEntropy()
        self._optimizer = create_optimizer_v2(
            self._network, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY
        )
        self._schedule = CosineLRScheduler(
            self._optimizer,
            t_initial=TOTAL_STEPS,
            warmup_t=WARMUP_STEPS,
            warmup_lr_init=0.0,
            t_in_epochs=False,
        )
        self._device, self._precision = network.device, network.precision
        self._channels_last = network.channels_last
        self._updates = 0
        if self._precision == "fp16":
            raise ValueError("precision must be fp32 or bf16 here, got fp16")

    def __call__(self) -> None:
        from timm.utils import dispatch_clip_grad

        for images_B3HW, targets in self._batches:
            if self._mix is not None:
                images_B3HW, targets = self._mix(images_B3HW, targets)
            if self._channels_last:
                images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
            with self._autocast():
                loss: Tensor = self._loss(self._network(images_B3HW), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            dispatch_clip_grad(self._network.parameters(), CLIP)
            self._optimizer.step()
            self._updates += 1
            self._optimizer.zero_grad()
            self._schedule.step_update(self._updates)

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = AUTOCAST[self._precision]
        return nullcontext() if kind is None else torch.autocast(self._device.type, dtype=kind)


def _timm_mixing(network: Network) -> dict[str, Any]:
    return {
        "mixup_alpha": MIXUP,
        "cutmix_alpha": CUTMIX,
        "label_smoothing": SMOOTHING,
        "num_classes": network.num_classes,
    }


def plant_pictures(root: Path, *, num_images: int, side: int, num_classes: int) -> None:
    """JPEGs of smooth noise, ``root/train/<class>/<number>.jpg``: as much work as photographs."""
    generator = np.random.default_rng(0)
    for number in range(num_images):
        folder = root / "train" / f"class_{number % num_classes:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (side // 6, side // 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:05d}.jpg", quality=90)


def our_loader(root: Path, network: Network, batch_size: int, num_workers: int) -> BatchLoader:
    """Our batches of the folder's images, decoded anew in every epoch."""
    images = read_folder(str(root)).train
    augment = AugmentConfig(crop="random_resized", rand_augment=_RAND_AUGMENT)
    return train_loader(
        images,
        train_transform(augment, network.image_size),
        sampler=ShardedBatchSampler(len(images), batch_size=batch_size, group=2),
        config=LoaderConfig(loader_workers=num_workers),
        device_type=network.device.type,
    )


def timm_loader(
    root: Path, network: Network, batch_size: int, num_workers: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """timm's, as its train.py sets it up: prefetcher on, Mixup done by the collate function."""
    from timm.data import FastCollateMixup, create_dataset, create_loader

    loader: Iterable[tuple[Tensor, Tensor]] = create_loader(
        create_dataset("", str(root), split="train", is_training=True),
        input_size=(3, network.image_size, network.image_size),
        batch_size=batch_size,
        is_training=True,
        auto_augment=_RAND_AUGMENT,
        re_prob=0.25,
        re_mode="pixel",
        interpolation="bicubic",
        num_workers=num_workers,
        collate_fn=FastCollateMixup(**_timm_mixing(network)),
        pin_memory=network.device.type == "cuda",
        device=network.device,
        persistent_workers=num_workers > 0,
    )
    return loader


def head_shares(network: Network, num_images: int) -> dict[str, Callable[[], object]]:
    """What DRLoc adds to a step, piece by piece, on a grid of the right shape."""
    objective = network.build(drloc=True)
    head, device = objective.drloc, network.device
    assert head is not None
    side = network.image_size
    ((depth, height, width),) = objective.classifier.grid_shapes((side, side))
    grid_BCHW = torch.randn(num_images, depth, height, width, device=device, requires_grad=True)
    generator = torch.Generator(device)
    pairs = head.draw(num_images, generator)
    parameters = list(head.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(
        parameter_groups(head, weight_decay=WEIGHT_DECAY), kind="adamw", lr=LR
    )

    def forward_and_backward() -> None:
        torch.autograd.grad(head([grid_BCHW], pairs).loss, [grid_BCHW, *parameters])

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    return {
        "drawing pairs": lambda: head.draw(num_images, generator),
        "the head, forward and backward": forward_and_backward,
        "clipping and AdamW of the head": update,
    }
