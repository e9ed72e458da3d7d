"""What a run will cost: hours and disk, before it is started; a guess with its basis told.

To have another network reckoned with: a line in ``_NETWORKS``.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.data.classification_sets import SIZES
from pipeline.reproduction.backbones import BACKBONES
from pipeline.reproduction.cells import ClassifierRecipe, Cost

# Multiplications of one image (1e9) and weights (1e6), counted by torch's FlopCounterMode.
_NETWORKS = {
    "swin": (4.49, 27.6),
    "cvt": (4.54, 19.6),
    "t2t": (4.78, 21.2),
    "resnet50": (4.09, 23.7),
    "small-swin": (0.0143, 0.50),
    "small-cvt": (0.0150, 0.56),
    "small-t2t": (0.0110, 0.44),
    "small-resnet50": (0.0256, 0.31),
}
_FLOWERS17 = (1020, 340, 17)
_FORWARD_AND_BACKWARD = 3
_BYTES, _MB = 4, 1e6
# The last two checkpoints and the best one hold the weights and AdamW's two moments.
_COPIES = 3 * 3 + 1


@dataclass(frozen=True)
class Speed:
    """Operations a second, in 1e12.

    Attributes:
        training: of small classifiers, whose many small products keep a core half idle.
        forward: of a backbone that boxes are made with.
    """

    training: float
    forward: float


ONE_GPU = Speed(7.5, 7.5)
"""Swin-T on CIFAR in the authors' own log of 2025: 3 minutes an epoch in fp32 on one GPU."""

ONE_CORE = Speed(0.016, 0.05)
"""A core of a virtual machine (AMD EPYC, fp32), as docs/reproduce.md tells."""

# Seconds a step of two images and seconds an image, as SoLOST's logs tell of an 11 GB card; nano's
# on one core.
_DETECTOR_SECONDS = {"c4": (0.717, 0.071), "nano": (0.12, 0.10)}


def classifier_cost(recipe: ClassifierRecipe, values: dict[str, Any], speed: Speed) -> Cost:
    """Of one training run with these settings."""
    gmacs, millions = _NETWORKS[recipe.network]
    num_train, num_test, classes = SIZES.get(recipe.data, _FLOWERS17)
    data = values["data"]
    held = 0.0 if data.get("select_on_test") else data.get("validation_fraction", 0.1)
    num_validation = num_test if data.get("select_on_test") else held * num_train
    few = data.get("train_per_class")
    num_trained = num_train * (1 - held) if few is None else min(num_train, few * classes)
    epochs = min(values.get("epochs", 100), values.get("stop_after") or values.get("epochs", 100))
    images = epochs * (_FORWARD_AND_BACKWARD * num_trained + num_validation) + 2 * num_test
    seconds = 2e9 * gmacs * images / (speed.training * 1e12)
    return Cost(seconds, _COPIES * millions * _MB * _BYTES)


def boxes_cost(backbone: str, num_images: int, speed: Speed) -> Cost:
    """Of one table of boxes."""
    # Half a kilobyte a row; starting Ray and the network takes the rest.
    seconds = 2e9 * BACKBONES[backbone].gmacs * num_images / (speed.forward * 1e12)
    return Cost(20 + seconds, 500.0 * num_images)


def detector_cost(values: dict[str, Any]) -> Cost:
    """Of training a detector."""
    kind = _kind(values)
    per_step, _ = _DETECTOR_SECONDS[kind]
    images = values.get("steps", 24_000) * values.get("batch_size", 16)
    weights = 0.35 if kind == "nano" else 33.0
    return Cost(per_step * images / 2, 7 * weights * _MB * _BYTES)


def detection_cost(values: dict[str, Any], num_images: int) -> Cost:
    """Of one table of detections."""
    _, per_image = _DETECTOR_SECONDS[_kind(values)]
    return Cost(20 + per_image * num_images, 4_000.0 * num_images)


def _kind(values: dict[str, Any]) -> str:
    return "nano" if values.get("detector", {}).get("kind") == "nano" else "c4"
