"""A pyramid on any of timm's networks that has maps at strides 4 to 32.

Batch norms become the detector's own: pooled over workers, or fixed; other norms stay as they are.
The network itself comes from ``pipeline.models.backbones``, which is imported late: a detector on a
ResNet needs no timm.

Shape letters:  B images   C channels   H, W rows and columns
"""

from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline.config.detection import Norm
from pipeline.detection.c4 import NORM_LAYERS, PYRAMID_CHANNELS
from pipeline.errors import ConfigError
from pipeline.models.checkpoints import fit_state_dict

TIMM: Final = "timm/"
"""What the names of these backbones begin with."""


class TimmPyramid(nn.Module):
    """Images to the maps ``0`` to ``3`` and ``pool``, strides 4 to 64, as torchvision's pyramid."""

    def __init__(self, name: str, norm: Norm) -> None:
        """Build the network at random, and its pyramid.

        Args:
            name: after ``timm/``.
            norm: what its batch norms become.

        Raises:
            ConfigError: there is no such network, or it is unfit for this.
        """
        from pipeline.models.backbones import build_feature_maps

        super().__init__()
        self.name = name
        self.body = build_feature_maps(name)
        _replace_norms(self.body, norm, name)
        self.out_channels = PYRAMID_CHANNELS
        self.fpn = FeaturePyramidNetwork(
            list(self.body.channels), self.out_channels, LastLevelMaxPool()
        )

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """The maps by name; sides must be multiples of 32."""
        maps: dict[str, Tensor] = self.fpn(self.body(images_B3HW))
        return maps

    def initialise(self, state_dict: dict[str, Tensor], source: str) -> None:
        """Give the network its weights, under timm's names.

        Raises:
            WeightsError: they do not fit; nothing is changed then.
        """
        from pipeline.models.backbones import feature_map_weights
        from pipeline.models.checkpoints import Weights

        network = self.body.network
        places = dict(_places(network))
        state = feature_map_weights(self.name, Weights(state_dict, "", source), places)
        fitting = {
            places.get(name, name): tensor
            for name, tensor in state.items()
            # Frozen norms do not count batches.
            if name in places or not name.endswith(".num_batches_tracked")
        }
        fit_state_dict(network, fitting, source)


class NormThenAct(nn.Module):
    """The norm of a layer in which timm has a norm and an activation in one."""

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.drop = drop
        self.act = act

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """``(B, C, H, W)``."""
        out_BCHW: Tensor = self.act(self.drop(self.norm(maps_BCHW)))
        return out_BCHW


def _replace_norms(module: nn.Module, norm: Norm, name: str) -> None:
    """Make the batch norms what ``norm`` says, weights and statistics as they are."""
    old = [one for one in module.modules() if isinstance(one, nn.BatchNorm2d)]
    if norm == "frozen" and not old:
        raise ConfigError(
            f"norm frozen needs a backbone with batch norm, which timm/{name} is without; "
            "give --detector.norm pooled"
        )
    if norm == "batch":
        return
    for owner in list(module.modules()):
        for child, part in list(owner.named_children()):
            if isinstance(part, nn.BatchNorm2d):
                owner.add_module(child, _replaced(part, norm, name))


def _replaced(part: nn.BatchNorm2d, norm: Norm, name: str) -> nn.Module:
    both: Any = part
    acts = hasattr(part, "drop") and hasattr(part, "act")
    plain = type(part) is nn.BatchNorm2d or acts
    if not plain or part._forward_hooks or part.weight is None:
        raise ConfigError(
            f"norm must be batch with timm/{name}, whose {type(part).__name__} cannot be replaced, "
            f"got {norm}; give --detector.norm batch"
        )
    new = NORM_LAYERS[norm](part.num_features)
    new.eps = part.eps  # type: ignore[assignment]
    if norm == "pooled":
        new.momentum = part.momentum  # type: ignore[assignment]
    new.load_state_dict(part.state_dict(), strict=norm != "frozen")
    return NormThenAct(new, both.drop, both.act) if acts else new


def _places(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Each tensor's name before norms were replaced, and its name now."""
    split = {f"{at}.norm" for at, one in network.named_modules() if isinstance(one, NormThenAct)}
    for name in network.state_dict():
        owner, _, tensor = name.rpartition(".")
        before = f"{owner.removesuffix('.norm')}.{tensor}" if owner in split else name
        yield before, name
