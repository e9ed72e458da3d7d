"""What may be chosen about a classifier, what it becomes in each network, and our own networks.

``patch_size`` is the stride of a network's FIRST layer, in pixels; later stages halve as always:

| network | published | what a smaller one does |
|---|---|---|
| ViT and its relatives, ConvNeXt, ... (timm's ``patch_size``) | 16, 14, 4 | smaller patches |
| Swin v1, v2 | 4 | smaller patches; the window is fitted so that it divides every stage |
| CvT | 4 | first convolution 3 x 3 with that stride |
| T2T-ViT | 4 | first soft split 3 x 3 with that stride |
| ResNet and its relatives | 4 (2, then a max-pool) | 1 or 2: 3 x 3 with that stride, no max-pool |

To give another family this knob: a case in ``timm_arguments`` (or ``cut_stem``, where the network
must be changed after it was built). To add a classifier that timm does not have: its name in
``OWN_CLASSIFIERS``, a case in ``build_own`` and one in ``fetch_own``; where published weights carry
other names than its own, a case in ``classifier_weights.py``.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from torch import nn

from pipeline.errors import ConfigError, WeightsError
from pipeline.models.cvt import OFFICIAL_LAYOUT, PAPER_LAYOUT, CvtLayout, cvt_13, cvt_13_paper
from pipeline.models.grid_classifier import StagedNetwork
from pipeline.models.hub import fetch_from_hub, fetch_url
from pipeline.models.t2t_vit import T2T_VIT_14, T2tLayout, t2t_vit_14

Layout = TypeVar("Layout", CvtLayout, T2tLayout)
STANDARD_SIDE = 224
"""Pixels of an image's side where neither the user nor the network says otherwise."""

# What constructors take and build_model decides, with the way to turn it.
_NOT_FREE = {
    "img_size": "model.image_size",
    "patch_size": "model.patch_size",
    "drop_path_rate": "model.drop_path",
    "num_classes": "the data's classes",
    "in_chans": "nothing: images are RGB",
}
_NEVER = ("self", "args", "kwargs", "device", "dtype", *_NOT_FREE)


class ModelOptions(TypedDict, total=False):
    """Keyword arguments of ``build_model``; each may be left out, or None."""

    image_size: int | tuple[int, int] | None
    """Side, or rows and columns, of the images in pixels; None takes the published size."""

    patch_size: int | None
    """Stride of the first layer, see above; None takes the published one."""

    drop_path: float | None
    """Stochastic depth of the last block, in [0, 1), rising from 0 over the blocks (CvT: of its
    last stage); None takes the architecture's default: timm's constructor's (Swin 0.1, others
    mostly 0), 0 for CvT and T2T-ViT."""

    stages: Sequence[int]
    """Whose grids are given, see ``GridClassifier``."""

    tap: str | None
    """``grid_classifier.Tap``; None takes post_norm for T2T-ViT (as the DRLoc paper's code) and
    pre_norm for all others."""

    options: Mapping[str, Any] | None
    """Further arguments of timm's constructor, or of ``CvtLayout`` or ``T2tLayout``."""


def check_ranges(num_classes: int, choices: ModelOptions) -> None:
    """Raise ConfigError for numbers no network can take."""
    if num_classes < 2:
        raise ConfigError(f"the data must have at least 2 classes, got {num_classes}")
    patch_size, drop_path = choices.get("patch_size"), choices.get("drop_path")
    if patch_size is not None and patch_size < 1:
        raise ConfigError(f"model.patch_size must be at least 1, got {patch_size}")
    if drop_path is not None and not 0 <= drop_path < 1:
        raise ConfigError(f"model.drop_path must be in [0, 1), got {drop_path}")
    if min(image_size(choices, (1, 1))) < 1:
        raise ConfigError(f"model.image_size must be at least 1, got {choices['image_size']}")


def image_size(choices: ModelOptions, published: tuple[int, int]) -> tuple[int, int]:
    """``(rows, columns)`` of the images in pixels."""
    chosen = choices.get("image_size")
    if chosen is None:
        return published
    return (chosen, chosen) if isinstance(chosen, int) else (chosen[0], chosen[1])


def timm_arguments(
    name: str, skeleton: nn.Module, choices: ModelOptions, size: tuple[int, int]
) -> dict[str, Any]:
    """Arguments for timm's constructor of ``skeleton``, which is the network as published.

    Raises:
        ConfigError: the network has no such knob.
    """
    legal = _constructor_names(type(skeleton))
    arguments = dict(choices.get("options") or {})
    _require_known(name, arguments, sorted(legal - set(_NEVER)))
    if drop_path := choices.get("drop_path"):
        _require_knob(name, "model.drop_path", drop_path, "drop_path_rate" in legal)
    if choices.get("drop_path") is not None and "drop_path_rate" in legal:
        arguments["drop_path_rate"] = drop_path
    if choices.get("image_size") is not None and "img_size" in legal:
        arguments["img_size"] = size
    patch_size = choices.get("patch_size")
    if patch_size is not None and "patch_size" in legal:
        arguments["patch_size"] = patch_size
    elif patch_size is not None:
        _require_knob(name, "model.patch_size", patch_size, has_resnet_stem(skeleton))
    _require_whole_patches(name, skeleton, arguments, size)
    windowed = "window_size" in legal and "window_size" not in arguments
    if windowed and hasattr(skeleton, "layers") and hasattr(skeleton, "patch_embed"):
        arguments["window_size"] = _fitted_window(skeleton, arguments, size)
    return arguments


def layout_for(name: str, published: Layout, choices: ModelOptions) -> Layout:
    """The layout of one of our own networks, changed as chosen.

    Raises:
        ConfigError: there is no such field, or the sizes do not go together.
    """
    arguments = dict(choices.get("options") or {})
    _require_known(name, arguments, [field.name for field in dataclasses.fields(published)])
    patch_size = choices.get("patch_size")
    if patch_size is not None and patch_size != published.strides[0]:
        if patch_size > published.strides[0]:
            raise ConfigError(
                f"model.patch_size of {name} must be in [1, {published.strides[0]}], "
                f"got {patch_size}"
            )
        arguments = {
            "kernels": (3, *published.kernels[1:]),
            "strides": (patch_size, *published.strides[1:]),
            "paddings": (1, *published.paddings[1:]),
            **arguments,
        }
    try:
        return dataclasses.replace(published, **arguments)
    except TypeError as fault:
        raise ConfigError(
            f"model.options of {name} must be numbers, or lists of them per stage, got "
            f"{arguments} ({fault})"
        ) from fault


def has_resnet_stem(network: nn.Module) -> bool:
    """Whether the network begins as a ResNet: ``conv1``, then ``maxpool``."""
    return hasattr(network, "conv1") and hasattr(network, "maxpool")


def cut_stem(network: Any, stride: int) -> None:
    """Give a ResNet a first convolution of 3 x 3 with ``stride`` 1 or 2, and no max-pool, in place.

    The usual stem for images of 64 px and less; a stride of 4 is the published stem.

    Raises:
        ConfigError: another stride.
    """
    if stride == 4:
        return
    if stride not in (1, 2):
        raise ConfigError(f"model.patch_size of a ResNet must be 1, 2 or 4, got {stride}")
    # Stems of three convolutions (ResNet-D) are 3 x 3 already.
    deep = isinstance(network.conv1, nn.Sequential)
    first = network.conv1[0] if deep else network.conv1
    conv = nn.Conv2d(3, first.out_channels, 3, stride, padding=1, bias=False)
    conv = conv.to(device=first.weight.device, dtype=first.weight.dtype)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if deep:
        network.conv1[0] = conv
    else:
        network.conv1 = conv
    network.maxpool = nn.Identity()


def _constructor_names(kind: type) -> set[str]:
    """Names of the constructor's arguments, those it passes on to its base classes too."""
    names: set[str] = set()
    for base in kind.__mro__:
        # A class without one has object's, which takes everything: its bases are asked next.
        parameters = inspect.signature(vars(base).get("__init__", object.__init__)).parameters
        names |= parameters.keys()
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            break
    return names


def _fitted_window(skeleton: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> int:
    """The window nearest to the published one that divides the grid of every stage.

    Grids no larger than the window are attended to whole. Where none near it fits (odd sizes), the
    published window stays and timm pads.
    """
    published: int = skeleton.layers[0].blocks[0].window_size[0]
    patch_size = arguments.get("patch_size", skeleton.patch_embed.patch_size[0])
    num_stages = len(arguments.get("depths", skeleton.layers))
    sides: list[int] = []
    for pixels in size:
        side = pixels // patch_size
        for _ in range(num_stages):
            sides.append(side)
            side = (side + 1) // 2
    fitting = [
        window
        for window in range(published // 2 + 1, published + 2)
        if all(side <= window or side % window == 0 for side in sides)
    ]
    return min(fitting, key=lambda window: (abs(window - published), -window), default=published)


def _require_whole_patches(
    name: str, skeleton: Any, arguments: Mapping[str, Any], size: tuple[int, int]
) -> None:
    """Networks would leave out the pixels that make no whole patch, without a word."""
    published: Any = getattr(getattr(skeleton, "patch_embed", None), "patch_size", None)
    chosen = {"img_size", "patch_size"} & arguments.keys()
    if not chosen or not isinstance(published, tuple):
        return
    side = arguments.get("patch_size", published[0])
    if size[0] % side or size[1] % side:
        raise ConfigError(
            f"model.image_size of {name} must be a multiple of its model.patch_size ({side}), "
            f"got {size[0]} x {size[1]}"
        )


def _require_known(name: str, given: Mapping[str, Any], legal: Sequence[str]) -> None:
    for unknown in sorted(set(given) - set(legal)):
        if unknown in _NOT_FREE:
            raise ConfigError(
                f"model.options cannot set {unknown} of {name}; it follows {_NOT_FREE[unknown]}"
            )
        raise ConfigError(
            f"model.options of {name} must be among {', '.join(sorted(legal))}; got {unknown}"
        )


def _require_knob(name: str, option: str, value: object, present: bool) -> None:
    if not present:
        raise ConfigError(
            f"{option} has no effect on {name}, got {value}; leave it out, or take another "
            "network (Swin, ViT, CvT, T2T-ViT, ConvNeXt and ResNet have it)"
        )


OWN_CLASSIFIERS = ("cvt_13", "cvt_13_paper", "t2t_vit_14")
"""Their names."""

_CVT_13_HUB = "microsoft/cvt-13"
_T2T_VIT_14_URL = (
    "https://github.com/yitu-opensource/T2T-ViT/releases/download/main/81.5_T2T_ViT_14.pth.tar"
)


def build_own(
    name: str, num_classes: int, choices: ModelOptions, size: tuple[int, int]
) -> StagedNetwork:
    """The network of that name for images of ``size`` (rows, columns) pixels.

    Raises:
        ConfigError: an option does not exist or does not go with the others.
    """
    drop_path = choices.get("drop_path") or 0.0
    match name:
        case "cvt_13":
            layout = layout_for(name, OFFICIAL_LAYOUT, choices)
            return cvt_13(num_classes, layout, drop_path=drop_path)
        case "cvt_13_paper":
            layout = layout_for(name, PAPER_LAYOUT, choices)
            return cvt_13_paper(num_classes, layout, drop_path=drop_path)
        case "t2t_vit_14":
            t2t_layout = layout_for(name, T2T_VIT_14, choices)
            if min(t2t_layout.grid(size)) < 1:
                raise ConfigError(
                    f"images of {size[0]} x {size[1]} px are too small for {name}; give a larger "
                    "model.image_size or a smaller model.patch_size"
                )
            return t2t_vit_14(num_classes, t2t_layout, image_size=size, drop_path=drop_path)
        case _:
            raise ValueError(f"name must be one of {', '.join(OWN_CLASSIFIERS)}, got {name}")


def fetch_own(name: str) -> Path:
    """The file of the authors' weights, in a cache of this machine.

    Raises:
        WeightsError: there are none, or they cannot be fetched.
    """
    match name:
        case "cvt_13":
            return fetch_from_hub(name, _CVT_13_HUB, None)
        case "t2t_vit_14":
            return fetch_url(name, _T2T_VIT_14_URL)
        case _:
            raise WeightsError(
                f"nobody publishes weights of {name}; give a file with model.checkpoint, or take "
                "cvt_13"
            )
