"""The classifiers timm does not have, by name: how to build them, where weights are published.

To add one: its name in ``OWN_CLASSIFIERS``, a case in ``build_own`` and one in ``fetch_own``; where
published weights carry other names than its own, a case in ``classifier_weights.py``.
"""

from pathlib import Path

from pipeline.errors import ConfigError, WeightsError
from pipeline.models.cvt import OFFICIAL_LAYOUT, PAPER_LAYOUT, cvt_13, cvt_13_paper
from pipeline.models.grid_classifier import StagedNetwork
from pipeline.models.hub import fetch_from_hub, fetch_url
from pipeline.models.model_options import ModelOptions, layout_for
from pipeline.models.t2t_vit import T2T_VIT_14, t2t_vit_14

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
