"""Cross-entropy on labels, with DRLoc on the network's own grids beside it: the task of the loop.

    total = cross-entropy + lambda(epoch) * drloc        (Liu et al., NeurIPS 2021, Eq. 3)

Turning DRLoc on changes nothing else: its pairs come from a generator of their own, its head is
initialised apart, and at lambda 0 neither exists. The pairs are drawn for the whole global batch,
and each worker takes its share, so the number of workers does not change what is asked.

To add another term beside the labels: compute it in ``SupervisedObjective.forward`` and give it a
name in ``losses_of``.

Shape letters:  B images   H, W pixels   K classes   M pairs per image
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.classification.augment import mix
from pipeline.config.classification import AugmentConfig
from pipeline.data.loader import Batch, BatchLoader
from pipeline.losses.multi_stage import DRLocObjective
from pipeline.losses.pairs import pair_generator
from pipeline.models.grid_classifier import GridClassifier
from pipeline.training.loop import Losses, Part, StepKey
from pipeline.training.workers import Workers


class ClassInputs(NamedTuple):
    """What one forward pass is computed from, on the device."""

    images_B3HW: Tensor
    targets_BK: Tensor
    """Probabilities, after mixing and smoothing."""

    pairs: tuple[Tensor, ...]
    """``(B, M, 2, 2)`` per grid; none without DRLoc."""


class SupervisedObjective(nn.Module):
    """The classifier and, where DRLoc is on, its heads: everything that is trained."""

    def __init__(self, classifier: GridClassifier, drloc: DRLocObjective | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.drloc = drloc

    def forward(
        self, images_B3HW: Tensor, targets_BK: Tensor, pairs: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """The means over the images: cross_entropy, and with DRLoc drloc and drloc_error_cells."""
        logits_BK, grids = self.classifier(images_B3HW)
        found = {"cross_entropy": F.cross_entropy(logits_BK.float(), targets_BK)}
        if self.drloc is not None:
            found["drloc"], found["drloc_error_cells"] = self.drloc(grids, pairs)
        return found


def losses_of(found: Mapping[str, Tensor], drloc_weight: float) -> Losses:
    """The terms that add up to the loss, of what ``SupervisedObjective`` gives."""
    if "drloc" not in found:
        return Losses({"cross_entropy": found["cross_entropy"]})
    return Losses(
        terms={
            "cross_entropy": found["cross_entropy"],
            "drloc_weighted": found["drloc"] * drloc_weight,
        },
        values={
            "drloc": found["drloc"].detach(),
            "drloc_error_cells": found["drloc_error_cells"].detach(),
        },
    )


@dataclass
class SupervisedTask:
    """The loop's task: labelled batches in, cross-entropy and weighted DRLoc out."""

    objective: SupervisedObjective
    loader: BatchLoader
    augment: AugmentConfig
    """How batches are mixed; images come varied from the loader."""

    num_classes: int
    drloc_weight: Callable[[int], float]
    """lambda of an epoch."""

    workers: Workers
    seed: int
    accumulate: int = 1
    channels_last: bool = False
    _epoch: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    def begin_epoch(self, epoch: int) -> Iterable[Batch]:
        self._epoch = epoch
        self.loader.set_epoch(epoch)
        return self.loader

    def parts(self, batch: Batch, key: StepKey) -> Sequence[Part]:
        """This worker's slice, mixed as a whole, then cut: so that cutting changes nothing."""
        device = self.workers.device
        images_B3HW, targets_BK = mix(
            batch.images_B3HW.to(device, non_blocking=True),
            batch.targets_B.to(device, non_blocking=True),
            self.augment,
            num_classes=self.num_classes,
            # Not the rank's own: partners are neighbours, so all workers together mix as one would.
            key=(self.seed, key.step),
        )
        if self.channels_last:
            images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
        num_parts = min(self.accumulate, len(images_B3HW))
        of_each = zip(
            images_B3HW.tensor_split(num_parts),
            targets_BK.tensor_split(num_parts),
            *(pairs_BM22.tensor_split(num_parts) for pairs_BM22 in self._pairs(batch, key)),
            strict=True,
        )
        parts, end = [], 0
        for images, targets, *pairs in of_each:
            inputs, start, end = ClassInputs(images, targets, tuple(pairs)), end, end + len(images)
            names = self._names(batch, start, end)
            parts.append(Part(inputs, len(images), batch.num_global, names))
        return parts

    def _names(self, batch: Batch, start: int, end: int) -> Sequence[str]:
        """Of the images, and of the neighbours that are mixed into them from other parts."""
        together = 2 if self.augment.mixup or self.augment.cutmix else 1
        return batch.names[start - start % together : end + end % together]

    def _pairs(self, batch: Batch, key: StepKey) -> tuple[Tensor, ...]:
        if self.objective.drloc is None:
            return ()
        generator = pair_generator(self.seed, 0, key.step, self.workers.device)
        drawn = self.objective.drloc.draw(batch.num_global, generator)
        mine = slice(batch.first, batch.first + batch.num_images)
        return tuple(pairs_BM22[mine] for pairs_BM22 in drawn)

    def losses(self, network: nn.Module, part: Part) -> Losses:
        return losses_of(network(*part.inputs), self.drloc_weight(self._epoch))

    def constants(self, epoch: int) -> Mapping[str, float]:
        return {"drloc/weight": self.drloc_weight(epoch)} if self.objective.drloc else {}
