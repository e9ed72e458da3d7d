"""Logits and grids of any classifier in one pass, without knowing what they are for.

``GridClassifier`` wraps timm's networks (through ``forward_intermediates``) and our own
(``StagedNetwork``). To add a network of our own: subclass ``StagedNetwork`` in a file of its own
and give it a name in ``models/model_options.py``; to add a place to tap: a name in ``Tap`` and a
case in ``forward``.

Shape letters:  B images   H, W rows and columns (pixels of images, cells of grids)   C channels of
a grid   N tokens   K classes
"""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pipeline.config.classification import Tap
from pipeline.errors import ConfigError


class LogitsAndGrids(NamedTuple):
    """``logits_BK``, and a grid ``(B, C, H, W)`` per stage asked for, in that order."""

    logits_BK: Tensor
    grids: tuple[Tensor, ...]


class StagedNetwork(nn.Module):
    """A network of our own: it has ``num_stages`` stages, and a map after each."""

    num_stages: int
    head: nn.Module

    def forward_stages(self, images_B3HW: Tensor, stages: Sequence[int]) -> tuple[Tensor, ...]:
        """What the head classifies, then the map ``(B, C, H, W)`` of each of ``stages``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_stages")

    def forward_head(self, features: Tensor) -> Tensor:
        """``(B, K)`` logits of the first that ``forward_stages`` gives."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_head")

    def get_classifier(self) -> nn.Module:
        """The layer that has as many outputs as there are classes."""
        return self.head

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """``(B, K)`` logits."""
        return self.forward_head(self.forward_stages(images_B3HW, ())[0])


class GridClassifier(nn.Module):
    """A classifier that also gives the grids of its stages; ``network`` is the bare one.

    All trainable parameters take part in the logits, so DistributedDataParallel needs no
    ``find_unused_parameters``. Works in channels_last, under autocast (grids come in its type) and
    compiled.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        stages: Sequence[int] = (-1,),
        tap: str = "pre_norm",
        layers: Sequence[Sequence[str]] = (),
    ) -> None:
        """Wrap ``network``.

        Args:
            network: A timm classifier, or one of ours.
            stages: Which stages' grids (of networks without stages: which blocks'), in rising
                order; negative counts from the last.
            tap: Where the grid of the last stage is taken (``Tap``). Other grids are always as they
                leave their stage: no norm was trained for them.
            layers: Names of the network's parameters per layer, from input to output, without the
                head's; empty makes one layer of all.

        Raises:
            ConfigError: stages or tap are outside their range, or the network gives no grids.
        """
        super().__init__()
        _check_taps(stages, tap)
        if not isinstance(network, StagedNetwork) and not hasattr(network, "forward_intermediates"):
            raise ConfigError(
                f"model.name must be a network whose grids can be had (forward_intermediates), "
                f"{type(network).__name__} has none; take another one"
            )
        self.network = network
        self.stages = tuple(stages)
        self.tap = tap
        self._layers = tuple(tuple(layer) for layer in layers)

    def forward(self, images_B3HW: Tensor) -> LogitsAndGrids:
        """Logits, equal to the network's own, and the grids, from one pass.

        Raises:
            ConfigError: the tap is post_norm and the network has no map after its final norm.
        """
        network: Any = self.network
        if isinstance(network, StagedNetwork):
            features, *grids = network.forward_stages(images_B3HW, self.stages)
        else:
            # Without timm's norm=True: it would run the norm a second time, for every stage.
            features, grids = network.forward_intermediates(
                images_B3HW,
                indices=list(self.stages),
                norm=False,
                output_fmt="NCHW",
                intermediates_only=False,
            )
        if self.tap == "post_norm":
            grids = [*grids[:-1], final_map(features, grids[-1])]
        return LogitsAndGrids(network.forward_head(features), tuple(grids))

    @torch.no_grad()
    def grid_shapes(self, image_size: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
        """``(C, H, W)`` of each grid for images of ``(rows, columns)`` pixels.

        Nothing is computed and nothing changes (weights, buffers, mode, random state): a copy
        without memory, on the meta device, is run.

        Raises:
            ConfigError: the network cannot take images of that size, or has no such stage or tap.
        """
        skeleton = _without_memory(self).eval()
        images_13HW = torch.empty(1, 3, *image_size, device="meta")
        try:
            grids = skeleton(images_13HW).grids
        except ConfigError:
            raise
        except Exception as fault:  # networks complain about sizes in every way there is
            raise ConfigError(
                f"{type(self.network).__name__} cannot take images of {image_size[0]} x "
                f"{image_size[1]} px and give the grids of stages {list(self.stages)}: "
                f"{' '.join(str(fault).split())[:160] or type(fault).__name__}; change "
                "model.image_size, model.patch_size or drloc.stages"
            ) from fault
        return tuple((grid.shape[1], grid.shape[2], grid.shape[3]) for grid in grids)

    def no_weight_decay(self) -> set[str]:
        """Names (``network.`` in front) of parameters that the network's authors do not decay."""
        network: Any = self.network
        listed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
        present = {name for name, _ in network.named_parameters()}
        return {f"network.{name}" for name in listed if name in present}

    @property
    def head_prefixes(self) -> tuple[str, ...]:
        """Names of the classifying layers, as ``network.head``: parameters are within them."""
        network: Any = self.network
        classifier = network.get_classifier()
        heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
        identities = {id(head) for head in heads}
        named = self.named_modules()
        return tuple(name for name, module in named if id(module) in identities)

    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the parameters per layer, from input to output; the head's are in none.

        For learning rates that fall layer by layer (from output to input).
        """
        heads = tuple(f"{prefix}." for prefix in self.head_prefixes)
        every = [name for name, _ in self.network.named_parameters()]
        layers = [
            tuple(f"network.{name}" for name in layer if not f"network.{name}".startswith(heads))
            for layer in self._layers or [every]
        ]
        return tuple(layer for layer in layers if layer)


def final_map(features: Any, grid_BCHW: Tensor) -> Tensor:
    """The network's final features laid out as ``grid_BCHW``, the map of its last block.

    Raises:
        ConfigError: they are no map or tokens of that grid and width.
    """
    _, channels, rows, columns = grid_BCHW.shape
    if isinstance(features, Tensor) and features.ndim == 4:
        if features.shape[1:] == grid_BCHW.shape[1:]:
            return features
        if features.shape[1:] == (rows, columns, channels):
            return features.permute(0, 3, 1, 2)
    if isinstance(features, Tensor) and features.ndim == 3:
        num_prefix = features.shape[1] - rows * columns
        if num_prefix >= 0 and features.shape[2] == channels:
            patches_BNC = features[:, num_prefix:]
            return patches_BNC.transpose(1, 2).reshape(-1, channels, rows, columns)
    raise ConfigError(
        "model.tap must be pre_norm for this network, got post_norm: it has no map of its last "
        "grid after its final norm"
    )


def _check_taps(stages: Sequence[int], tap: str) -> None:
    rising = all(first < second for first, second in pairwise(stages))
    if not stages or not rising or (stages[0] < 0) != (stages[-1] < 0):
        raise ConfigError(
            "drloc.stages must be rising numbers, all counted from the first (0, 1, ...) or all "
            f"from the last (..., -2, -1), got {list(stages)}"
        )
    if tap not in get_args(Tap):
        raise ConfigError(f"model.tap must be one of {', '.join(get_args(Tap))}, got {tap}")
    if tap == "post_norm" and stages[-1] != -1:
        raise ConfigError(
            f"model.tap post_norm needs drloc.stages to end with -1, got {list(stages)}; "
            "take pre_norm, or count the stages from the last"
        )


def _without_memory(module: GridClassifier) -> GridClassifier:
    """A copy whose parameters and buffers are on the meta device."""
    ghosts: dict[int, Any] = {
        id(tensor): nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
        for tensor in module.parameters()
    }
    ghosts |= {id(tensor): torch.empty_like(tensor, device="meta") for tensor in module.buffers()}
    return copy.deepcopy(module, ghosts)
