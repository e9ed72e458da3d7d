"""Training the detector on pseudo-boxes: the task of the loop.

Whatever is drawn of an image (its size, flip, the anchors and regions it is trained on) follows
from the seed, the step and its place in the global batch, so workers and parts change none of it.
An epoch is a window of steps, not a pass over the images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.detection.box_loader import BoxBatch, BoxLoader, BoxSample
from pipeline.detection.detector import Detector
from pipeline.training.loop import Losses, Part, StepKey
from pipeline.training.workers import Workers

Canvas = tuple[int, int]
"""Height and width."""


class BoxInputs(NamedTuple):
    """What one forward pass is computed from, as ``Detector.forward`` takes it."""

    images: list[Tensor]
    """``(3, H, W)`` in [0, 1], on the device."""

    targets: list[dict[str, Tensor]]
    canvas: Canvas
    """What the images are padded to at least."""


def losses_of(network: nn.Module, inputs: BoxInputs) -> Losses:
    """The four losses; ``network`` is a ``Detector`` in training mode, or a wrapper of it."""
    found: dict[str, Tensor] = network(*inputs)
    return Losses(found)


@dataclass
class DetectionTask:
    """Images and boxes in, Faster R-CNN's four losses out."""

    objective: Detector
    loader: BoxLoader
    workers: Workers
    accumulate: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    def begin_epoch(self, epoch: int) -> Iterable[BoxBatch]:
        self.loader.set_epoch(epoch)
        return self.loader

    def parts(self, batch: BoxBatch, key: StepKey) -> Sequence[Part]:
        """This worker's images, cut into parts."""
        samples = batch.samples
        canvas = canvas_of(samples, self.workers)
        count = min(self.accumulate, len(samples))
        cuts = [len(samples) * number // count for number in range(count + 1)]
        return [
            Part(
                inputs_of(samples[start:end], canvas, self.workers.device),
                end - start,
                batch.num_global,
                [sample.name for sample in samples[start:end]],
            )
            for start, end in pairwise(cuts)
        ]

    def losses(self, network: nn.Module, part: Part) -> Losses:
        return losses_of(network, part.inputs)

    def constants(self, epoch: int) -> Mapping[str, float]:
        return {}


def canvas_of(samples: Sequence[BoxSample], workers: Workers) -> Canvas:
    """The sides of the largest images of the global batch.

    Norms see the padding, so every worker, and every part, must pad alike.
    """
    sides = [[sample.image_3HW.shape[axis] for sample in samples] for axis in (1, 2)]
    height, width = workers.largest([max(side, default=0) for side in sides])
    return height, width


def inputs_of(samples: Sequence[BoxSample], canvas: Canvas, device: torch.device) -> BoxInputs:
    """The samples as the detector takes them, on the device."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    images = [moved(sample.image_3HW).float() / 255 for sample in samples]
    targets: list[dict[str, Any]] = [
        {
            "boxes": moved(sample.boxes_N4),
            "labels": moved(sample.labels_N),
            "scores": moved(sample.scores_N),
            # It seeds generators on the CPU.
            "key": torch.tensor(sample.key),
        }
        for sample in samples
    ]
    return BoxInputs(images, targets, canvas)
