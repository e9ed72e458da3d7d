"""Weights of one classifier fitted into another, for fine-tuning: all must match but the head.

To accept weights under other names: a function from tensors by name to tensors by name, called in
``_network_names``. Timm's own conversions are used without importing it.

Shape letters:  D channels   N positions, the class token's first   H, W rows and columns
"""

import inspect
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import WeightsError
from pipeline.models.checkpoints import fit_state_dict, patch_side
from pipeline.models.cvt import Cvt
from pipeline.models.grid_classifier import GridClassifier
from pipeline.models.t2t_vit import PUBLISHED_SCALE, T2tVit

_logger = logging.getLogger(__name__)

# From the names of transformers' CvtForImageClassification to the authors', applied in order.
_CVT_NAMES = (
    (r"^cvt\.encoder\.stages\.(\d+)\.", r"stage\1."),
    (r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (
        r"\.attention\.attention\.convolution_projection_([qkv])\w*\.convolution_projection\.",
        r".attn.conv_proj_\1.",
    ),
    (r"(conv_proj_[qkv])\.convolution\.", r"\1.conv."),
    (r"(conv_proj_[qkv])\.normalization\.", r"\1.bn."),
    (r"\.attention\.attention\.projection_([qkv])\w*\.", r".attn.proj_\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def fit_classifier(model: GridClassifier, state: dict[str, Tensor], source: str) -> None:
    """Copy ``state`` into the network of ``model``, in place.

    A classifying layer whose shape differs (another number of classes) or that the file lacks keeps
    its fresh values, and the log says so. Everything else must match in name and shape.

    Args:
        model: The classifier.
        state: Tensors by name, as ``read_state_dict`` gives them: of a ``GridClassifier``, of its
            network, or as the authors published them. Positions and relative-position tables of
            another image size are resampled as timm does; patches of another size are not.
        source: Where they come from, for messages.

    Raises:
        WeightsError: something else is missing, has no place or another shape, or is not finite;
            the network is untouched then.
    """
    state = _network_names(_bare(state), model.network, source)
    expected = model.network.state_dict()
    fitted = dict(state)
    for prefix in model.head_prefixes:
        head = prefix.removeprefix("network.") + "."
        ours = {name: tensor for name, tensor in expected.items() if name.startswith(head)}
        if any(name not in state or state[name].shape != ours[name].shape for name in ours):
            _logger.info("the layer %s starts anew: %s has no such one", head[:-1], source)
            fitted |= ours
    fit_state_dict(model.network, fitted, source)


def _bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the ``network.`` that a ``GridClassifier`` puts before every name."""
    if not all(name.startswith("network.") for name in state):
        return state
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def _network_names(
    network_state: dict[str, Tensor], network: nn.Module, source: str
) -> dict[str, Tensor]:
    """The weights under the network's own names, whoever published them."""
    match network:
        case Cvt():
            return {_cvt_name(name): tensor for name, tensor in network_state.items()}
        case T2tVit():
            return _t2t_weights(network_state, network, source)
        case _:
            return timm_weights(network_state, network, source)


def _t2t_weights(state: dict[str, Tensor], network: T2tVit, source: str) -> dict[str, Tensor]:
    """T2T-ViT's weights, complete: the authors' file does not tell their attention scale."""
    state = {"attention_scale": torch.tensor(PUBLISHED_SCALE), **state}
    positions_1ND = state.get("pos_embed")
    if positions_1ND is not None and positions_1ND.ndim == 3:
        state["pos_embed"] = _resampled(positions_1ND, network.grid, source)
    return state


def timm_weights(state: dict[str, Tensor], network: nn.Module, source: str) -> dict[str, Tensor]:
    """The weights as timm's own filter for this network gives them.

    Raises:
        WeightsError: they are so unlike the network's that the filter fails.
    """
    convert = _timm_filter(network)
    # timm would also resample the patches of another size without a word.
    if convert is None or patch_side(state) != patch_side(network.state_dict()):
        return state
    try:
        with warnings.catch_warnings():
            # torch complains about the speed and style of timm's resampling: not ours to mend.
            warnings.simplefilter("ignore", UserWarning)
            return convert(dict(state), network)
    except Exception as fault:  # names of another network bring about any fault
        raise WeightsError(
            f"{source} does not fit the network ({type(fault).__name__}: "
            f"{' '.join(str(fault).split())[:120]}); give weights of the same model.name"
        ) from fault


def _timm_filter(
    network: nn.Module,
) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """What timm calls ``checkpoint_filter_fn``, beside the network's class; None where it lacks."""
    for kind in type(network).__mro__:
        convert: Any = getattr(sys.modules[kind.__module__], "checkpoint_filter_fn", None)
        if convert is not None and "model" in inspect.signature(convert).parameters:
            found: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = convert
            return found
    return None


def _cvt_name(name: str) -> str:
    for pattern, replacement in _CVT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _resampled(positions_1ND: Tensor, grid: tuple[int, int], source: str) -> Tensor:
    """Positions for ``grid``, the class token's kept; they come from a square."""
    num_patches = positions_1ND.shape[1] - 1
    if num_patches == grid[0] * grid[1]:
        return positions_1ND
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise WeightsError(
            f"{source} holds positions of {num_patches} tokens, which form no square and cannot be "
            f"resampled to {grid[0]} x {grid[1]}; set model.image_size to that of the file"
        )
    square_1DHW = positions_1ND[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
    patches_1DHW = functional.interpolate(
        square_1DHW.float(), size=grid, mode="bicubic", align_corners=False
    )
    patches_1ND = patches_1DHW.flatten(2).transpose(1, 2).to(positions_1ND.dtype)
    return torch.cat([positions_1ND[:, :1], patches_1ND], dim=1)
