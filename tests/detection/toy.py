"""Small pictures with one textured object on smooth noise, and what a detector makes of them.

Shape letters:  H, W rows and columns   N boxes
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_iou

from pipeline.detection.detector import Detector
from pipeline.training.optim import parameter_groups, sgd

Picture = tuple[Tensor, dict[str, Tensor]]


def pictures(num: int, seed: int, *, side: int | None = None) -> list[Picture]:
    """``num`` pictures of 128 to 160 pixels (or ``side``) and their targets."""
    generator = np.random.default_rng(seed)
    return [_picture(generator, side, seed * 1000 + index) for index in range(num)]


def _picture(generator: np.random.Generator, side: int | None, key: int) -> Picture:
    height, width = (
        (side, side) if side else (int(one) for one in generator.integers(128, 161, size=2))
    )
    background = _smooth(generator, height, width)
    largest = min(height, width, 112) - 15
    object_height, object_width = (int(one) for one in generator.integers(36, largest, size=2))
    top = int(generator.integers(0, height - object_height))
    left = int(generator.integers(0, width - object_width))
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, object_height), torch.linspace(-1, 1, object_width), indexing="ij"
    )
    ellipse = bool(generator.integers(2))
    inside = rows**2 + columns**2 <= 1 if ellipse else torch.ones_like(rows, dtype=torch.bool)
    period = float(generator.uniform(3, 6))
    stripes = 0.5 + 0.5 * torch.sin(
        (torch.arange(object_height)[:, None] + torch.arange(object_width)) * (6.28 / period)
    )
    colour = torch.tensor(generator.uniform(0.3, 1, size=(3, 1, 1)), dtype=torch.float32)
    region = background[:, top : top + object_height, left : left + object_width]
    region[:, inside] = (colour * stripes)[:, inside]
    box = torch.tensor([[left, top, left + object_width, top + object_height]]).float()
    labels = torch.ones(1, dtype=torch.int64)
    return background, {"boxes": box, "labels": labels, "key": torch.tensor(key)}


def _smooth(generator: np.random.Generator, height: int, width: int) -> Tensor:
    coarse = torch.tensor(generator.uniform(0, 1, size=(1, 3, 6, 6)), dtype=torch.float32)
    fine = torch.tensor(generator.normal(0, 0.02, size=(3, height, width)), dtype=torch.float32)
    size = (height, width)
    smooth = functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)[0]
    return (smooth * 0.6 + 0.2 + fine).clamp(0, 1)


def fit(detector: Detector, data: Sequence[Picture], *, steps: int, batch: int, lr: float) -> None:
    """Plain training: SGD, ten steps of warm-up, a tenth of the rate from 75 % and from 92 % on."""
    optimizer = sgd(parameter_groups(detector, weight_decay=1e-4), lr=lr, momentum=0.9)
    order = np.random.default_rng(0)
    detector.train()
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / 10)
        rate *= 0.1 ** ((step >= 0.75 * steps) + (step >= 0.92 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = order.choice(len(data), size=batch, replace=len(data) < batch)
        taken: list[Picture] = [data[index] for index in chosen]
        targets: list[dict[str, Tensor]] = [
            target | {"key": target["key"] * 10_000 + step} for _, target in taken
        ]
        losses: dict[str, Tensor] = detector([image for image, _ in taken], targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def detect(detector: Detector, data: Sequence[Picture]) -> list[dict[str, Tensor]]:
    """Detections of each picture, alone."""
    detector.eval()
    return [detector([image])[0] for image, _ in data]


def average_precision(detections: Sequence[dict[str, Tensor]], data: Sequence[Picture]) -> float:
    """AP at IoU .5, the area under the precision envelope; one object per picture."""
    hits: list[tuple[float, bool]] = []
    for found, (_, target) in zip(detections, data, strict=True):
        taken = False
        # In the order of the scores, as the detector gives them.
        overlaps = box_iou(found["boxes"], target["boxes"])[:, 0].tolist()
        for score, overlap in zip(found["scores"].tolist(), overlaps, strict=True):
            hits.append((score, not taken and overlap >= 0.5))
            taken = taken or overlap >= 0.5
    right = np.cumsum([hit for _, hit in sorted(hits, key=lambda one: -one[0])])
    if not len(right):
        return 0.0
    precision: Any = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
    return float((precision * np.diff(right, prepend=0)).sum() / len(data))
