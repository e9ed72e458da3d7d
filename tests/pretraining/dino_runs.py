"""A DINO run small enough for a test: put together as a job does, on pictures of noise.

Shape letters:  K prototypes
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipeline.config.classification import OptimizerKind
from pipeline.config.pretraining import CropsConfig, DINOConfig
from pipeline.config.settings import LoaderConfig
from pipeline.data.loader import ShardedBatchSampler, train_loader
from pipeline.pretraining.images import random_square
from pipeline.pretraining.network import DINONetwork
from pipeline.pretraining.task import DINOObjective, DINOTask
from pipeline.training.loop import Hooks, LoopSettings, LoopState, StepKey, train
from pipeline.training.optim import build_optimizer, parameter_groups
from pipeline.training.schedules import cosine
from pipeline.training.workers import Workers

ALONE = Workers(0, 1, torch.device("cpu"))
NUM_IMAGES = 22
BATCH = 7
"""Odd: two workers' slices are uneven, and so are parts."""

STEPS_PER_EPOCH = NUM_IMAGES // BATCH
PROTOTYPES = 11
CROPS = CropsConfig(num_local=2, global_size=16, local_size=8)


class Noise:
    """Pictures of noise, each of a colour of its own, and wider than high."""

    def __init__(self) -> None:
        self.targets = np.zeros(NUM_IMAGES, np.int64)

    def __len__(self) -> int:
        return NUM_IMAGES

    def image(self, index: int) -> Image.Image:
        draw = np.random.default_rng(index)
        colour, pixels = draw.integers(0, 200, 3), draw.integers(0, 56, (20, 26, 3))
        return Image.fromarray((colour + pixels).astype(np.uint8))

    def name(self, index: int) -> str:
        return str(index)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a test varies."""

    accumulate: int = 1
    seed: int = 3
    weights_seed: int = 1
    drop_path: float = 0.0
    norm_last_layer: bool = True
    freeze_last_layer: int = 1
    crops: CropsConfig = CROPS
    optimizer: OptimizerKind = "sgd"
    lr: float = 0.3
    precision: str = "fp32"
    total_epochs: int = 3
    detect_anomaly: bool = False


def an_objective(choice: Choice) -> DINOObjective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(choice.weights_seed)
        vit = VisionTransformer(
            img_size=16,
            patch_size=4,
            embed_dim=24,
            depth=2,
            num_heads=2,
            num_classes=0,
            drop_path_rate=choice.drop_path,
        )
        config = DINOConfig(
            out_dim=PROTOTYPES,
            hidden_dim=16,
            bottleneck_dim=8,
            norm_last_layer=choice.norm_last_layer,
            freeze_last_layer=choice.freeze_last_layer,
            center_momentum=0.8,
        )
        student = DINONetwork(vit, config)
        # A head as it is drawn passes almost no gradient on when it is this narrow.
        for weight in student.parameters():
            if weight.requires_grad:
                weight.data += 0.2 * torch.randn_like(weight)
    return DINOObjective(student, config)


def teacher_temp(epoch: int) -> float:
    return 0.05 + 0.02 * epoch


def teacher_momentum(step: int, total_epochs: int = Choice.total_epochs) -> float:
    """Far from 1 at first, so that a teacher that does not move is seen."""
    return cosine(step, start=0.7, end=1.0, total_steps=total_epochs * STEPS_PER_EPOCH)


def a_task(choice: Choice, workers: Workers = ALONE) -> DINOTask:
    sampler = ShardedBatchSampler(
        NUM_IMAGES,
        batch_size=BATCH,
        rank=workers.rank,
        world_size=workers.size,
        seed=choice.seed,
    )
    return DINOTask(
        objective=an_objective(choice),
        loader=train_loader(
            Noise(),
            partial(random_square, side=18),
            sampler=sampler,
            config=LoaderConfig(loader_workers=0),
        ),
        crops=choice.crops,
        teacher_temp=teacher_temp,
        teacher_momentum=partial(teacher_momentum, total_epochs=choice.total_epochs),
        workers=workers,
        seed=choice.seed,
        accumulate=choice.accumulate,
    )


@dataclass
class Run:
    """A training, and what was seen of it."""

    choice: Choice
    workers: Workers = ALONE
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    """The objective's state before the first step, and after each."""

    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        choice = self.choice
        self.task = a_task(choice, self.workers)
        groups = parameter_groups(self.task.objective, weight_decay=0.04)
        # torch's fused SGD cannot have momentum for weights that join later.
        optimizer = build_optimizer(groups, kind=choice.optimizer, lr=choice.lr, momentum=0.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.state = LoopState(self.task.objective, optimizer, None, scaler)

    def until(self, num_epochs: int) -> "Run":
        """Train up to so many epochs."""
        choice = self.choice
        steps = choice.total_epochs * STEPS_PER_EPOCH
        settings = LoopSettings(
            num_epochs,
            partial(cosine, start=choice.lr, end=choice.lr / 3, total_steps=steps),
            seed=choice.seed,
            weight_decay=partial(cosine, start=0.04, end=0.4, total_steps=steps),
            clip=3.0,
            precision=choice.precision,
            detect_anomaly=choice.detect_anomaly,
        )
        hooks = Hooks(
            on_epoch_end=lambda epoch, numbers: self.history.append(numbers),
            on_step=self._keep,
            before_update=self.task.before_update,
            after_update=self.task.after_update,
        )
        if not self.weights:
            self._keep(StepKey(0, 0), 0)
        train(self.task, self.state, settings, self.workers, hooks)
        return self

    def _keep(self, key: StepKey, num_images: int) -> None:
        self.weights.append(copy.deepcopy(self.task.objective.state_dict()))


def of(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of ``student`` or ``teacher``, named without that."""
    return {
        name.removeprefix(f"{part}."): value
        for name, value in state.items()
        if name.startswith(f"{part}.")
    }


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def watched(run: Run, name: str, see: Callable[..., Any]) -> None:
    """Have ``see(module, inputs, output)`` called after each forward pass of a part."""
    run.task.objective.get_submodule(name).register_forward_hook(see)
