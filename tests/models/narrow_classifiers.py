"""Narrow networks of all families, as descriptions of exports."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.models.backbones import build_model
from pipeline.models.exporting import (
    ClassifierDescription,
    Preprocessing,
)
from pipeline.models.grid_classifier import GridClassifier
from pipeline.storage import Location

CLASSES = ("cat", "dög", "bird", "fish", "frog")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VIT = "vit_tiny_patch16_224"


def recipe(side: int = 32, **changes: Any) -> Preprocessing:
    return Preprocessing(image_size=side, mean=IMAGENET[0], std=IMAGENET[1], **changes)


def describe(architecture: str, **changes: Any) -> ClassifierDescription:
    return ClassifierDescription(
        architecture=architecture, classes=CLASSES, preprocessing=recipe(), **changes
    )


DESCRIPTIONS = {
    "vit": describe(VIT, image_size=32, patch_size=8, options={"embed_dim": 24, "depth": 2}),
    "swin": describe(
        "swin_tiny_patch4_window7_224",
        image_size=32,
        patch_size=2,
        drop_path=0.2,
        stages=(-2, -1),
        options={"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
    ),
    "resnet": describe(
        "resnet18", image_size=32, patch_size=1, options={"channels": (8, 16, 24, 32)}
    ),
    "cvt": describe(
        "cvt_13",
        image_size=32,
        patch_size=2,
        options={"dims": (16, 32, 48), "depths": (1, 1, 1), "heads": (1, 2, 3)},
    ),
    "t2t": describe(
        "t2t_vit_14",
        image_size=32,
        patch_size=2,
        tap="pre_norm",
        options={"dim": 48, "depth": 2, "heads": 3, "token_dim": 16},
    ),
}


def build(description: ClassifierDescription, seed: int = 0) -> GridClassifier:
    """A network in which no tensor is as it was built: as if it had been trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(
            description.architecture,
            num_classes=len(description.classes),
            image_size=description.image_size,
            patch_size=description.patch_size,
            drop_path=description.drop_path,
            stages=description.stages,
            tap=description.tap,
            options=description.options,
        )
        with torch.no_grad():
            for tensor in (*model.network.parameters(), *model.network.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


def at(folder: Path) -> Location:
    return Location.parse(str(folder))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int = 40, width: int = 56, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)
