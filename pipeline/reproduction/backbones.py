"""The backbones of the localization tables: what they are called, and which files hold them.

To add one: a line in ``BACKBONES``, and its rows in reproduction/tables.py.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Backbone:
    """A network that yields patch features.

    Attributes:
        words: for people.
        name: of the network and its published weights, as --backbone.name takes it.
        files: by which names its weights are known, to be found below --data-root.
        settings: what else label_images is told of it.
        decode: how its images are read.
        stands_in: of no paper: small enough for a laptop, shown at --scale small.
        shipped: its weights come with this package.
    """

    words: str
    name: str
    files: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    stands_in: bool = False
    shipped: bool = False


# LOST's networks see whole images; ours would scale down what is longer.
_WHOLE = {"max_side": 4096}

BACKBONES = {
    "vit-s16": Backbone(
        "ViT-S/16 DINO",
        "vit_small_patch16_224.dino",
        ("dino_deitsmall16_pretrain.pth", "vit_small_patch16_224.dino.safetensors"),
        decode=_WHOLE,
    ),
    "vit-s8": Backbone(
        "ViT-S/8 DINO (300 epochs)",
        "vit_small_patch8_224.dino_300ep",
        ("dino_deitsmall8_300ep_pretrain.pth",),
        decode=_WHOLE,
    ),
    "vit-b16": Backbone(
        "ViT-B/16 DINO",
        "vit_base_patch16_224.dino",
        ("dino_vitbase16_pretrain.pth", "vit_base_patch16_224.dino.safetensors"),
        decode=_WHOLE,
    ),
    "resnet50-dino": Backbone(
        "ResNet-50 DINO", "resnet50.dino", ("dino_resnet50_pretrain.pth",), decode=_WHOLE
    ),
    "resnet50": Backbone(
        "ResNet-50 ImageNet",
        "resnet50.tv_in1k",
        ("resnet50-0676ba61.pth", "resnet50.tv_in1k.safetensors"),
        decode=_WHOLE,
    ),
    "vgg16": Backbone(
        "VGG16 ImageNet",
        "vgg16.tv_in1k",
        ("vgg16-397923af.pth", "vgg16.tv_in1k.safetensors"),
        decode=_WHOLE,
    ),
    "deit-s16": Backbone(
        "DeiT-S/16 (with labels)",
        "deit_small_patch16_224.fb_in1k",
        ("deit_small_patch16_224-cd65a155.pth", "deit_small_patch16_224.fb_in1k.safetensors"),
        decode=_WHOLE,
    ),
    "vit-ti16": Backbone(
        "ViT-Ti/16 (with labels), block 5",
        "vit_tiny_patch16_224",
        ("vit_tiny_patch16_224_in1k_supervised.safetensors",),
        # Its last keys find nothing; values of a middle block do (docs/log.md).
        {"feature": "value", "block": 5, "normalize": "half"},
        stands_in=True,
    ),
    "vit-nano8": Backbone(
        "ViT-nano/8 DINO, block 3",
        "vit_nano_patch8.dino",
        (),
        {"feature": "value", "block": 3},
        # As it was trained: on small images.
        {"max_side": 224},
        stands_in=True,
        shipped=True,
    ),
}
