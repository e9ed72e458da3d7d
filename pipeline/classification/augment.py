"""What happens to an image between the decoder and the network, and to a batch of targets.

``train_transform`` and ``eval_transform`` turn one image into a normalised tensor, ``mix`` is Mixup
and CutMix on a batch. To add an augmentation: a field of ``AugmentConfig`` and a step in
``train_transform``. Steps may draw from the global generators: the loaders seed them per image.

This and models/backbones.py are the only files that import timm.

Shape letters:  B images   H, W rows and columns in pixels   K classes
"""

import re
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pipeline.config.classification import AugmentConfig, Crop
from pipeline.data.loader import Transform
from pipeline.data.seeding import seeded
from pipeline.errors import ConfigError
from pipeline.models.features import NORMALIZATIONS

_INTERPOLATION = InterpolationMode.BICUBIC

# timm skips what it cannot read in such a string, so that a typing error would go unnoticed.
_RAND_AUGMENT = re.compile(r"rand(-(m\d+|n\d+|mmax\d+|inc[01]|(p|mstd)\d+(\.\d+)?|tweights))*")


SMALL_SIDE = 64
"""Up to this side images are shifted and not cropped by default, as is usual for CIFAR."""

CROP_PCT = 224 / 256
"""Share of the shorter side that the centre crop of evaluation keeps."""


def train_transform(
    config: AugmentConfig, image_size: int, *, mirror_safe: bool = True
) -> Transform:
    """The random transform of training images, put together by timm.

    Args:
        config: how they are varied.
        image_size: side in pixels that the network gets.
        mirror_safe: whether a mirrored image keeps its class, unlike a digit.

    Raises:
        ConfigError: ``rand_augment`` is not in timm's notation.
    """
    _check_rand_augment(config.rand_augment)
    mirrors = config.hflip == "always" or (config.hflip == "unless_digits" and mirror_safe)
    mean, std = NORMALIZATIONS[config.normalize]
    steps = create_transform(
        image_size,
        is_training=True,
        scale=(config.min_scale, 1.0),
        hflip=0.5 if mirrors else 0.0,
        color_jitter=config.color_jitter or None,
        auto_augment=config.rand_augment,
        interpolation=_INTERPOLATION.value,
        mean=mean,
        std=std,
        re_prob=config.random_erasing,
        re_mode="pixel",
        re_count=1,
    ).transforms
    _mend_posterize(steps)
    match crop_of(config, image_size):
        case "random_resized":
            return _one_after_another(steps)
        case "pad":
            # timm has no such crop: it takes the place of the first step, the resized one. A black
            # border of an eighth gives it room.
            crop = transforms.RandomCrop(image_size, padding=image_size // 8)
            return _one_after_another([_whole_image(image_size), crop, *steps[1:]])


def crop_of(config: AugmentConfig, image_size: int) -> Crop:
    """How training images are cut; of evaluation's, ``pad`` takes the whole, else the centre."""
    return config.crop or ("pad" if image_size <= SMALL_SIDE else "random_resized")


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


def eval_transform(config: AugmentConfig, image_size: int) -> Transform:
    """The fixed transform of evaluation: a centre crop, or with ``pad`` the image to its border."""
    mean, std = NORMALIZATIONS[config.normalize]
    if crop_of(config, image_size) == "pad":
        to_tensor = [transforms.ToTensor(), transforms.Normalize(mean, std)]
        return _one_after_another([_whole_image(image_size), *to_tensor])
    cropping = create_transform(
        image_size, interpolation=_INTERPOLATION.value, mean=mean, std=std, crop_pct=CROP_PCT
    )
    return _one_after_another(cropping.transforms)


def _one_after_another(steps: list[Any]) -> Transform:
    transform: Transform = transforms.Compose(steps)
    return transform


def _whole_image(side: int) -> transforms.Resize:
    """All of the image in a square; one that has that size already stays untouched."""
    return transforms.Resize((side, side), interpolation=_INTERPOLATION)


def _check_rand_augment(text: str | None) -> None:
    if text is not None and not _RAND_AUGMENT.fullmatch(text):
        raise ConfigError(
            "rand_augment must be parts of rand, mN, nN, pX, mstdX, mmaxN, inc0 or inc1, tweights, "
            f"joined by '-', such as rand-m9-mstd0.5-inc1, or none; got {text!r}"
        )


def mix(
    images_B3HW: Tensor,
    targets_B: Tensor,
    config: AugmentConfig,
    *,
    num_classes: int,
    key: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """``(images_B3HW, targets_BK)``: timm's Mixup or CutMix, one draw for the batch, on its device.

    Neighbours are mixed with each other: images 0 and 1, 2 and 3, and so on. (timm pairs the first
    with the last.) So slices of whole pairs, mixed with equal keys, give together what the batch
    gives at once. The last image of an odd batch meets itself: it stays as it is. With both alphas
    0 targets are smoothed and nothing else.

    Args:
        images_B3HW: Not changed.
        targets_B: int64 classes.
        config: The alphas and the smoothing.
        num_classes: K.
        key: What the draw follows from. (seed, epoch, step, rank): each rank draws its own, as
            everywhere. (seed, epoch, step): a run does not depend on the number of ranks.
    """
    if not config.mixes:
        return images_B3HW, mixup_target(targets_B, num_classes, smoothing=config.label_smoothing)
    mixer = Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )
    there, back = _neighbours_at_opposite_ends(len(targets_B), images_B3HW.device)
    # timm draws from numpy's global stream: nobody else shall notice, nor have any say.
    with seeded("mix", *key):
        mixed_B3HW, targets_BK = mixer(images_B3HW[there], targets_B[there])
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
