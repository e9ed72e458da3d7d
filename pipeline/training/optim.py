"""Which parameters learn how fast, which are decayed, and the optimiser that does it.

The learning rate of a group is the schedule's times the group's ``lr_scale``. Scales come from a
function that maps parameter names to them: ``layerwise_scales`` or ``backbone_scales`` here, or one
of your own. To add an optimiser: a function, a case in ``build_optimizer``, its name in
``OptimizerKind``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from pipeline.config.classification import OptimizerKind

ParameterGroup = dict[str, Any]

NEVER_DECAYED = (
    "bias",
    "relative_position_bias_table",
    "pos_embed",
    "pos_embedding",
    "cls_token",
)
"""Endings of parameter names that are not decayed, whatever their shape."""

# A weight of these is a matrix, also where one of its sides is 1.
_MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    lr_scales: Mapping[str, float] | None = None,
    decay_biases: bool = False,
) -> list[ParameterGroup]:
    """The trainable parameters, grouped by weight decay and learning-rate scale.

    Not decayed are: parameters with one side longer than 1 at most (biases, gains, also those of a
    channel norm of shape (1, C, 1, 1)), names ending in ``NEVER_DECAYED``, and what the module or a
    part of it lists in ``no_weight_decay()``.

    Args:
        module: everything that is trained, heads of losses included.
        weight_decay: of the decayed groups.
        lr_scales: scale by parameter name; 1 for names it lacks.
        decay_biases: decay all but the gains and biases of norms, as Detectron2 does.

    Raises:
        ValueError: nothing is trainable, or ``lr_scales`` names a parameter there is not.
    """
    names = {name for name, _ in module.named_parameters()}
    scales = dict(lr_scales or {})
    if unknown := sorted(scales.keys() - names):
        raise ValueError(f"lr_scales names parameters that do not exist: {', '.join(unknown[:3])}")
    exempt = _names_in_norms(module) if decay_biases else _exempt_names(module)
    groups: dict[tuple[bool, float], ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = name not in exempt
        scale = scales.get(name, 1.0)
        group = groups.setdefault(
            (decays, scale),
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": scale,
                "decays": decays,
            },
        )
        # With names, so that a checkpoint tells which state belongs to which parameter.
        group["params"].append((name, parameter))
    if not groups:
        raise ValueError("the module must have trainable parameters, it has none")
    return list(groups.values())


def _names_in_norms(module: nn.Module) -> set[str]:
    """Full names of the parameters of norms."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if isinstance(part, _NORMS)
        for name, _ in part.named_parameters(recurse=False)
    }


def _exempt_names(module: nn.Module) -> set[str]:
    """Full names of the parameters that are not decayed."""
    exempt: set[str] = set()
    for prefix, part in module.named_modules():
        own = f"{prefix}." if prefix else ""
        listed = getattr(part, "no_weight_decay", None)
        if callable(listed):
            exempt.update(own + name for name in listed())
        for name, parameter in part.named_parameters(recurse=False):
            matrix = isinstance(part, _MATRIX_LAYERS) and name == "weight"
            flat = parameter.squeeze().ndim <= 1 and not matrix
            if flat or name.endswith(NEVER_DECAYED):
                exempt.add(own + name)
    return exempt


def layerwise_scales(
    names: Iterable[str], layers: Sequence[str | tuple[str, ...]], decay: float
) -> dict[str, float]:
    """Learning-rate scales that fall by ``decay`` per layer from the output to the input.

    The last of L layers gets ``decay``, the first ``decay ** L``; what is in no layer (the
    classifier, a loss's head) 1. The longest prefix wins, so a part of a layer may be moved.

    Args:
        names: of all parameters.
        layers: prefixes of names from input to output, each whole up to a dot
            (``network.blocks.1`` is not ``network.blocks.11``); a tuple where several parts share
            a layer.
        decay: in (0, 1].

    Raises:
        ValueError: ``decay`` is outside its range, or a prefix belongs to no parameter.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"the layer-wise decay must be in (0, 1], got {decay}")
    scale_of = {
        prefix: decay ** (len(layers) - place)
        for place, layer in enumerate(layers)
        for prefix in ((layer,) if isinstance(layer, str) else layer)
    }
    longest_first = sorted(scale_of, key=len, reverse=True)
    names = list(names)
    _check_prefixes(names, longest_first)
    return {
        name: scale_of[prefix]
        for name in names
        # None or the longest.
        for prefix in [p for p in longest_first if _is_within(name, p)][:1]
    }


def backbone_scales(
    names: Iterable[str], head_prefixes: Sequence[str], scale: float
) -> dict[str, float]:
    """One learning-rate scale for everything that is not within ``head_prefixes``.

    T2T-ViT's transfer recipe: the backbone learns at 0.01 of the classifier's rate.

    Raises:
        ValueError: ``scale`` is negative, or a prefix belongs to no parameter.
    """
    if scale < 0:
        raise ValueError(f"the backbone's learning-rate scale must be at least 0, got {scale}")
    names = list(names)
    _check_prefixes(names, head_prefixes)
    return {
        name: scale
        for name in names
        if not any(_is_within(name, prefix) for prefix in head_prefixes)
    }


def _is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _check_prefixes(names: Sequence[str], prefixes: Iterable[str]) -> None:
    for prefix in prefixes:
        if not any(_is_within(name, prefix) for name in names):
            raise ValueError(f"no parameter is within {prefix!r}; the first is {names[:1]}")


def build_optimizer(
    groups: Sequence[ParameterGroup],
    *,
    kind: OptimizerKind,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.9,
) -> Optimizer:
    """AdamW (``betas``) or SGD (``momentum``) over ``parameter_groups``, its rate set to ``lr``.

    Raises:
        ValueError: there is no such optimiser.
    """
    match kind:
        case "adamw":
            optimizer: Optimizer = adamw(groups, lr=lr, betas=betas)
        case "sgd":
            optimizer = sgd(groups, lr=lr, momentum=momentum)
        case _:
            raise ValueError(f"the optimiser must be adamw or sgd, got {kind!r}")
    set_learning_rate(optimizer, lr)
    return optimizer


def adamw(groups: Sequence[ParameterGroup], *, lr: float, betas: tuple[float, float]) -> AdamW:
    """AdamW with epsilon 1e-8, every backbone's own recipe."""
    return AdamW(_copies(groups), lr=lr, betas=betas, fused=_fused(groups))


def sgd(groups: Sequence[ParameterGroup], *, lr: float, momentum: float) -> SGD:
    """SGD with plain (not Nesterov's) momentum: T2T-ViT's transfer recipe."""
    return SGD(_copies(groups), lr=lr, momentum=momentum, fused=_fused(groups))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Have every group learn at ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def set_weight_decay(optimizer: Optimizer, weight_decay: float) -> None:
    """Have every group that decays at all decay so."""
    for group in optimizer.param_groups:
        if group["decays"]:
            group["weight_decay"] = weight_decay


def scaled_lr(lr: float, batch: int, reference_batch: int) -> float:
    """``lr`` given for ``reference_batch``, for the global batch ``batch``: the linear rule.

    Goyal et al., "Accurate, Large Minibatch SGD", 2017.

    Raises:
        ValueError: a batch is below 1.
    """
    if min(batch, reference_batch) < 1:
        raise ValueError(f"batches must be at least 1, got {batch} and {reference_batch}")
    return lr * batch / reference_batch


def _copies(groups: Sequence[ParameterGroup]) -> list[ParameterGroup]:
    """Optimisers write into the groups they are given."""
    return [dict(group) for group in groups]


def _fused(groups: Sequence[ParameterGroup]) -> bool | None:
    """Whether one kernel may update everything; None leaves the choice to torch.

    Fused AdamW on a CPU takes a quarter of the time of the loop that torch would choose there.
    """
    parameters: list[torch.Tensor] = [
        parameter for group in groups for _, parameter in group["params"]
    ]
    able = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return True if able else None
