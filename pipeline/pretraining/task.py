"""Self-distillation without labels (DINO): the task of the loop.

A student sees many crops of an image, a teacher two large ones, and the student guesses what the
teacher says of every other crop (Caron et al., "Emerging Properties in Self-Supervised Vision
Transformers", ICCV 2021, Algorithm 1). The teacher is never trained: after each step it moves
towards the student, and its answers are centred and sharpened so that they do not all become one.

The crops of a step are drawn for the global batch and cut to shares, so the number of workers, and
of parts, changes none of them.

Shape letters:  B images   H, W pixels   G global views   V all views   D channels   K prototypes
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.pretraining import CropsConfig, DINOConfig
from pipeline.data.loader import Batch, BatchLoader
from pipeline.data.seeding import key_of
from pipeline.losses.dino import Center, dino_loss
from pipeline.pretraining.network import DINONetwork
from pipeline.pretraining.views import draw_views, make_views
from pipeline.training.loop import Losses, Part, StepKey
from pipeline.training.workers import Workers


class Crops(NamedTuple):
    """The views of a part's images, on the device."""

    global_B3HW: Sequence[Tensor]
    local_B3HW: Sequence[Tensor]


class DINOObjective(nn.Module):
    """Student, teacher and centre: all that a run consists of; only the student is trained."""

    def __init__(self, student: DINONetwork, config: DINOConfig) -> None:
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.center = Center(student.num_prototypes, momentum=config.center_momentum)
        self.config = config

    def train(self, mode: bool = True) -> "DINOObjective":
        """The teacher never trains."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, crops: Crops, teacher_temp: float) -> dict[str, Tensor]:
        """Means over the images: loss, teacher_entropy, divergence and feature_std."""
        num_global, num_images = len(crops.global_B3HW), len(crops.global_B3HW[0])
        with torch.no_grad():
            features_GBD = self.teacher.features(torch.cat([*crops.global_B3HW]))
            teacher_GBK = self.teacher.head(features_GBD).unflatten(0, (num_global, num_images))
            self.center.add(teacher_GBK)
        # One pass per size of crop, the head over all.
        sizes = [part for part in (crops.global_B3HW, crops.local_B3HW) if part]
        student_VBD = torch.cat([self.student.features(torch.cat([*part])) for part in sizes])
        student_VBK = self.student.head(student_VBD).unflatten(0, (-1, num_images))
        terms = dino_loss(
            student_VBK,
            teacher_GBK,
            self.center.center_K,
            student_temp=self.config.student_temp,
            teacher_temp=teacher_temp,
        )
        return {
            "loss": terms.loss,
            "teacher_entropy": terms.entropy.detach(),
            "divergence": terms.divergence.detach(),
            "feature_std": _feature_std(features_GBD),
        }

    @torch.no_grad()
    def move_teacher(self, momentum: float) -> None:
        """``teacher <- momentum * teacher + (1 - momentum) * student``, weight by weight."""
        teacher: list[Tensor] = [*self.teacher.parameters()]
        student: list[Tensor] = [*self.student.parameters()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        for own, other in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            own.copy_(other)


@dataclass
class DINOTask:
    """The loop's task: unlabelled images in, the student's cross-entropy to the teacher out."""

    objective: DINOObjective
    loader: BatchLoader
    crops: CropsConfig
    teacher_temp: Callable[[int], float]
    """Of an epoch."""

    teacher_momentum: Callable[[int], float]
    """Of a step."""

    workers: Workers
    seed: int
    accumulate: int = 1
    _epoch: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    def begin_epoch(self, epoch: int) -> Iterable[Batch]:
        self._epoch = epoch
        self.loader.set_epoch(epoch)
        return self.loader

    def parts(self, batch: Batch, key: StepKey) -> Sequence[Part]:
        """This worker's images as crops, cut into parts."""
        images_B3HW = batch.images_B3HW.to(self.workers.device, non_blocking=True)
        drawn = draw_views(
            batch.num_global,
            (images_B3HW.shape[2], images_B3HW.shape[3]),
            self.crops,
            torch.Generator().manual_seed(key_of("views", self.seed, key.step)),
        )
        parts, first = [], batch.first
        for part_B3HW in images_B3HW.tensor_split(min(self.accumulate, len(images_B3HW))):
            mine = drawn.rows(first, len(part_B3HW))
            crops = Crops(*make_views(part_B3HW, mine, self.crops))
            names = batch.names[first - batch.first :][: len(part_B3HW)]
            parts.append(Part(crops, len(part_B3HW), batch.num_global, names))
            first += len(part_B3HW)
        return parts

    def losses(self, network: nn.Module, part: Part) -> Losses:
        found: dict[str, Tensor] = network(part.inputs, self.teacher_temp(self._epoch))
        return Losses({"dino": found.pop("loss")}, found)

    def constants(self, epoch: int) -> Mapping[str, float]:
        last_step = (epoch + 1) * self.steps_per_epoch - 1
        return {
            "teacher/temperature": self.teacher_temp(epoch),
            "teacher/momentum": self.teacher_momentum(last_step),
        }

    def before_update(self, key: StepKey) -> None:
        """Early prototypes would follow noise (section 3.2 of the paper's code: epoch 1)."""
        if key.epoch < self.objective.config.freeze_last_layer:
            for weight in self.objective.student.head.last_layer.parameters():
                weight.grad = None

    def after_update(self, key: StepKey) -> None:
        self.objective.move_teacher(self.teacher_momentum(key.step))
        self.objective.center.update(self.workers.total)


def _feature_std(features_BD: Tensor) -> Tensor:
    """Mean deviation over the images of unit-length features, times sqrt(D): 1 if spread evenly,
    0 once all images look alike.
    """
    unit_BD = F.normalize(features_BD.float(), dim=1)
    return unit_BD.std(dim=0, correction=0).mean() * math.sqrt(features_BD.shape[1])
