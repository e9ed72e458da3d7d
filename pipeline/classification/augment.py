"""What happens to an image between the decoder and the network, and to a batch of labels.

``train_transform`` and ``eval_transform`` turn one image into a normalised tensor, ``mix`` is Mixup
and CutMix on a batch. To add an augmentation: a field of ``AugmentOptions`` and a step in
``train_transform``. Steps may draw from the global generators: the loaders seed them per image.

This and models/backbones.py are the only files that import timm.

Shape letters:  B images   H, W rows and columns in pixels   K classes
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pipeline.data.loader import Transform
from pipeline.data.seeding import seeded
from pipeline.errors import ConfigError

# timm skips what it cannot read in such a string, so that a typing error would go unnoticed.
_RAND_AUGMENT = re.compile(r"rand(-(m\d+|n\d+|mmax\d+|inc[01]|(p|mstd)\d+(\.\d+)?|tweights))*")


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """How training images are varied and all images are brought to size; defaults of Swin."""

    image_size: int = 224
    """Side in pixels that the network gets."""

    crop: Literal["random_resized", "pad"] = "random_resized"
    """pad: a crop from the image with a black border of an eighth, for small images (CIFAR)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """random_resized only: share of the image's area that a crop takes."""

    hflip: bool = True
    """False where a mirrored image means something else, such as digits."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """In timm's notation; None for none."""

    color_jitter: float = 0.4
    """Brightness, contrast and saturation; as in timm without effect beside RandAugment."""

    random_erasing: float = 0.25
    """Probability that a rectangle of the image becomes noise."""

    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """random: one of the two per training image; bicubic in evaluation."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    crop_pct: float = 224 / 256
    """random_resized only: share of the shorter side that the centre crop of evaluation keeps."""


def train_transform(options: AugmentOptions) -> Transform:
    """The random transform of training images, put together by timm.

    Raises:
        ConfigError: ``rand_augment`` is not in timm's notation.
    """
    _check_rand_augment(options.rand_augment)
    steps = create_transform(
        options.image_size,
        is_training=True,
        scale=options.scale,
        hflip=0.5 if options.hflip else 0.0,
        color_jitter=options.color_jitter or None,
        auto_augment=options.rand_augment,
        interpolation=options.interpolation,
        mean=options.mean,
        std=options.std,
        re_prob=options.random_erasing,
        re_mode="pixel",
        re_count=1,
    ).transforms
    _mend_posterize(steps)
    match options.crop:
        case "random_resized":
            return _one_after_another(steps)
        case "pad":
            # timm has no such crop: it takes the place of the first step, the resized one.
            crop = transforms.RandomCrop(options.image_size, padding=options.image_size // 8)
            return _one_after_another([_whole_image(options), crop, *steps[1:]])


def _mend_posterize(steps: list[Any]) -> None:
    """Have RandAugment's highest magnitude work, at which timm keeps 0 bits of each colour.

    Pillow since 13 refuses to; before it gave black, as in the runs that papers report.
    """
    for operation in (operation for step in steps for operation in getattr(step, "ops", ())):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


def eval_transform(options: AugmentOptions) -> Transform:
    """The fixed transform of evaluation: a centre crop, or with ``pad`` the image to its border."""
    if options.crop == "pad":
        to_tensor = [transforms.ToTensor(), transforms.Normalize(options.mean, options.std)]
        return _one_after_another([_whole_image(options), *to_tensor])
    cropping = create_transform(
        options.image_size,
        interpolation=_fixed_interpolation(options).value,
        mean=options.mean,
        std=options.std,
        crop_pct=options.crop_pct,
    )
    return _one_after_another(cropping.transforms)


def _one_after_another(steps: list[Any]) -> Transform:
    transform: Transform = transforms.Compose(steps)
    return transform


def _whole_image(options: AugmentOptions) -> transforms.Resize:
    """All of the image in a square; one that has that size already stays untouched."""
    side = options.image_size
    return transforms.Resize((side, side), interpolation=_fixed_interpolation(options))


def _fixed_interpolation(options: AugmentOptions) -> InterpolationMode:
    bilinear = options.interpolation == "bilinear"
    return InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC


def _check_rand_augment(text: str | None) -> None:
    if text is not None and not _RAND_AUGMENT.fullmatch(text):
        raise ConfigError(
            "rand_augment must be parts of rand, mN, nN, pX, mstdX, mmaxN, inc0 or inc1, tweights, "
            f"joined by '-', such as rand-m9-mstd0.5-inc1, or none; got {text!r}"
        )


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """How batches are mixed; with both alphas 0 the labels are smoothed and nothing else."""

    num_classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1


def mix(
    images_B3HW: Tensor, labels_B: Tensor, options: MixOptions, *, key: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """``(images_B3HW, targets_BK)``: timm's Mixup or CutMix, one draw for the batch, on its device.

    Neighbours are mixed with each other: images 0 and 1, 2 and 3, and so on. (timm pairs the first
    with the last.) So slices of whole pairs, mixed with equal keys, give together what the batch
    gives at once. The last image of an odd batch meets itself: it stays as it is.

    Args:
        images_B3HW: Not changed.
        labels_B: int64 classes.
        options: The alphas, the smoothing and the number of classes.
        key: What the draw follows from. (seed, epoch, step, rank): each rank draws its own, as
            everywhere. (seed, epoch, step): a run does not depend on the number of ranks.
    """
    if not options.mixup and not options.cutmix:
        return images_B3HW, mixup_target(
            labels_B, options.num_classes, smoothing=options.label_smoothing
        )
    mixer = Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        label_smoothing=options.label_smoothing,
        num_classes=options.num_classes,
    )
    there, back = _neighbours_at_opposite_ends(len(labels_B), images_B3HW.device)
    # timm draws from numpy's global stream: nobody else shall notice, nor have any say.
    with seeded("mix", *key):
        mixed_B3HW, targets_BK = mixer(images_B3HW[there], labels_B[there])
    return mixed_B3HW[back], targets_BK[back]


def _neighbours_at_opposite_ends(num_images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two orders: neighbours to where timm looks for partners (2 4 | 5 3 for 2 3 4 5), and back.

    The first is even in length, as timm wants: the last of an odd batch comes twice.
    """
    evens = torch.arange(0, num_images, 2)
    odds = (evens + 1).clamp(max=num_images - 1)
    there = torch.cat([evens, odds.flip(0)])
    image = torch.arange(num_images)
    back = torch.where(image % 2 == 0, image // 2, len(there) - 1 - image // 2)
    return there.to(device), back.to(device)
