"""Which networks there are by name, and where their weights lie: timm's, LOST's, and our own.

To name weights that timm does not list: a line in ``_PUBLISHED_ELSEWHERE``. To add a ViT of another
shape than timm's: one in ``OWN_VITS``. To bring weights along: a folder in ``weights/`` beside this
file, with its model card, and a line in ``_SHIPPED``.
"""

import difflib
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from pipeline.config.labelling import Feature
from pipeline.errors import ConfigError, WeightsError
from pipeline.models.features import NORMALIZATIONS
from pipeline.models.hub import fetch_from_hub, fetch_url
from pipeline.models.model_options import OWN_CLASSIFIERS

CNNS = ("resnet50.dino", "resnet50.tv_in1k", "vgg16.tv_in1k")
"""Backbones that are no ViTs; they have one feature, their last map at stride 16."""

OWN_VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_nano_patch8": ("vit_tiny_patch16_224", {"patch_size": 8, "img_size": 64, "depth": 6}),
}
"""ViTs of other shapes than timm's: its nearest architecture, and what is different."""

# Weights that come with this package, each beside its card.
_SHIPPED = {
    "vit_nano_patch8.dino": Path(__file__).parent / "weights/vit_nano_patch8/teacher.safetensors"
}

SUITED: dict[str, tuple[Feature, int]] = {"vit_nano_patch8.dino": ("value", 3)}
"""Feature and block of networks that no rule of ``backbones.with_recipe`` serves (model card)."""

# Weights of the LOST and DINO papers that timm has no tag for: timm's architecture, and the file.
# (timm's own vit_small_patch8_224.dino is a longer training than the 300 epochs LOST used.)
_DINO = "https://dl.fbaipublicfiles.com/dino"
_PUBLISHED_ELSEWHERE = {
    "vit_small_patch8_224.dino_300ep": (
        "vit_small_patch8_224",
        f"{_DINO}/dino_deitsmall8_300ep_pretrain/dino_deitsmall8_300ep_pretrain.pth",
    ),
    "resnet50.dino": (
        "resnet50",
        f"{_DINO}/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
    ),
}


def architecture(name: str) -> tuple[str, dict[str, Any]]:
    """What timm calls the network, and the arguments that make it this one."""
    if name in _PUBLISHED_ELSEWHERE:
        return _PUBLISHED_ELSEWHERE[name][0], {}
    return OWN_VITS.get(name.partition(".")[0], (_timm_name(name), {}))


def published_normalization(name: str) -> str | None:
    """The name of the normalisation (``NORMALIZATIONS``) the published weights were trained with.

    None where timm does not say, or says another one.
    """
    ours = name in _PUBLISHED_ELSEWHERE or name in _SHIPPED
    published: Any = None if ours else get_pretrained_cfg(_timm_name(name))
    if published is None:
        return None
    for known, (mean, _) in NORMALIZATIONS.items():
        if tuple(published.mean) == mean:
            return known
    return None


def require_backbone(name: str) -> None:
    """Raise ConfigError with the nearest names unless timm or we know this backbone."""
    if name in CNNS or _is_known(name):
        return
    vits = {n for kind in ("vit_*", "deit*") for n in [*timm.list_models(kind)]}
    tagged = {n for kind in ("vit_*", "deit*") for n in timm.list_pretrained(kind)}
    known = sorted({*vits, *tagged, *CNNS, *OWN_VITS, *_SHIPPED, *_PUBLISHED_ELSEWHERE})
    raise ConfigError(
        f"backbone.name must be a timm ViT or one of {', '.join(CNNS)}, got {name}; "
        + _hint(name, known, "timm.list_models('vit_*')")
    )


def require_classifier(name: str) -> None:
    """Raise ConfigError with the nearest names unless timm or we know this classifier."""
    if name in OWN_CLASSIFIERS or _is_known(name):
        return
    known = [*timm.list_models(), *timm.list_pretrained(), *OWN_CLASSIFIERS, *OWN_VITS, *_SHIPPED]
    raise ConfigError(
        f"model.name must be a timm classifier or one of {', '.join(OWN_CLASSIFIERS)}, got {name}; "
        + _hint(name, known, "timm.list_models()")
    )


def require_timm(name: str) -> None:
    """Raise ConfigError with the nearest names unless timm knows this network, and its tag."""
    base, _, tag = name.partition(".")
    if timm.is_model(base) and (not tag or name in get_arch_pretrained_cfgs(base)):
        return
    known = [*timm.list_models(), *timm.list_pretrained()]
    raise ConfigError(
        f"backbone must be timm/ and a name of timm's, got timm/{name}; "
        + _hint(name, known, "timm.list_models()")
    )


def fetch(name: str) -> Path:
    """The file of published weights: in this package, or in a cache of this machine.

    Raises:
        WeightsError: nobody publishes them, or they cannot be fetched.
    """
    if name in _SHIPPED:
        return _SHIPPED[name]
    if name in _PUBLISHED_ELSEWHERE:
        return fetch_url(name, _PUBLISHED_ELSEWHERE[name][1])
    published: Any = None if name in OWN_VITS else get_pretrained_cfg(_timm_name(name))
    if published is not None and published.hf_hub_id:
        return fetch_from_hub(name, published.hf_hub_id, published.hf_hub_filename)
    if published is not None and published.url and not published.custom_load:
        return fetch_url(name, published.url)
    raise WeightsError(
        f"nobody publishes weights for {name} that can be used here; "
        "give a name with a tag, or a file (--backbone.checkpoint; training: --model.checkpoint)"
    )


def _timm_name(name: str) -> str:
    """``name``, with the image size that timm's names end in where it was left out."""
    base, dot, tag = name.partition(".")
    whole = f"{base}_224"
    return whole + dot + tag if not timm.is_model(base) and timm.is_model(whole) else name


def _is_known(name: str) -> bool:
    if name in _PUBLISHED_ELSEWHERE or name in OWN_VITS or name in _SHIPPED:
        return True
    whole = _timm_name(name)
    base, _, tag = whole.partition(".")
    return timm.is_model(base) and (not tag or whole in get_arch_pretrained_cfgs(base))


def _hint(name: str, known: list[str], listing: str) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"see {listing}"
