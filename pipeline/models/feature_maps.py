"""A convolutional network's maps: at strides 4, 8, 16 and 32, or one of them as patch features.

The networks come from ``backbones.build_feature_maps``; patch features are normalised as LOST does
it. To add a network: any module that gives ``(B, D, H, W)`` at a known stride can be wrapped in
``ConvFeatures``; give ``backbones.build_backbone`` a name for it.

Shape letters:  B images   C, D channels   H, W rows and columns of the map
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.features import FeatureExtractor, PatchFeatures

STRIDES = (4, 8, 16, 32)
"""Image pixels per cell of each map."""

# Sides of the image that a network is tried with: unlike, so that rows and columns are told apart.
_HEIGHT, _WIDTH = 64, 96

Layout: TypeAlias = bool
"""Whether a map's channels come last."""


class FeatureMaps(nn.Module):
    """Four maps of an image under the names ``0`` to ``3``, channels first."""

    def __init__(
        self, network: nn.Module, channels: Sequence[int], channels_last: Sequence[Layout]
    ) -> None:
        """Take a network that gives a list of four maps.

        Args:
            network: normalised images ``(B, 3, H, W)`` in.
            channels: of each map.
            channels_last: of each map, see ``layouts``.
        """
        super().__init__()
        self.network = network
        self.channels = tuple(channels)
        self.channels_last = tuple(channels_last)

    def forward(self, images_B3HW: Tensor) -> OrderedDict[str, Tensor]:
        """``(B, C, H / stride, W / stride)`` each, in the order of ``STRIDES``."""
        maps = zip(self.network(images_B3HW), self.channels_last, strict=True)
        return OrderedDict(
            (str(level), found.permute(0, 3, 1, 2).contiguous() if last else found)
            for level, (found, last) in enumerate(maps)
        )


def layouts(network: nn.Module, channels: Sequence[int]) -> list[Layout]:
    """Where each map has its channels, found out with an image that is not square.

    Args:
        network: as for ``FeatureMaps``; on the meta device this costs nothing.
        channels: of each map.

    Raises:
        ValueError: a map has another shape than its stride and its channels make it.
    """
    device = next(network.parameters()).device
    with torch.no_grad():
        maps = network(torch.zeros(1, 3, _HEIGHT, _WIDTH, device=device))
    found = []
    for map_, stride, width in zip(maps, STRIDES, channels, strict=True):
        grid = (_HEIGHT // stride, _WIDTH // stride)
        shapes = {(1, width, *grid): False, (1, *grid, width): True}
        if tuple(map_.shape) not in shapes:
            raise ValueError(f"a map of stride {stride} has the shape {tuple(map_.shape)}")
        found.append(shapes[tuple(map_.shape)])
    return found


def under_names(
    state: Mapping[str, Tensor], whole: Iterable[str], names: Iterable[str]
) -> dict[str, Tensor]:
    """The tensors of a whole network under the names they have where only its maps are computed.

    There timm writes ``stages_0.x`` for ``stages.0.x``, or puts ``model.`` before all. Tensors of
    layers after the last map are left out; those the whole network lacks too keep their names.

    Args:
        state: of the whole network.
        whole: names of all its tensors.
        names: those that are wanted.
    """
    places = {_flat(name): name for name in names}
    left_out = {_flat(name) for name in whole} - places.keys()
    return {
        places.get(_flat(name), name): tensor
        for name, tensor in state.items()
        if _flat(name) not in left_out
    }


def _flat(name: str) -> str:
    return name.removeprefix("model.").replace(".", "_")


# Channels of VGG16's convolutions, one tuple per stage; a max-pool halves the map between stages.
_VGG16_STAGES = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)


class ConvFeatures(FeatureExtractor):
    """The last map of a convolutional network, normalised over the whole map of each image."""

    def __init__(self, network: nn.Module, *, stride: int = 16) -> None:
        """Wrap ``network``, which must give ``(B, D, H / stride, W / stride)``."""
        super().__init__()
        self.network = network
        self.patch_size = stride

    def forward(self, images_B3HW: Tensor) -> PatchFeatures:
        """Features of the map's cells; see the base class.

        Raises:
            ValueError: the sides are no multiples of the stride, or the network has another one.
        """
        grid = self.patch_grid(images_B3HW)
        map_BDHW = self.network(images_B3HW)
        if map_BDHW.shape[-2:] != grid:
            raise ValueError(
                f"the network must give a {grid[0]} x {grid[1]} map at stride {self.patch_size}, "
                f"got {map_BDHW.shape[-2]} x {map_BDHW.shape[-1]}"
            )
        tokens_BHWD = normalize_map(map_BDHW.float().permute(0, 2, 3, 1).contiguous())
        return PatchFeatures(tokens_BHWD, stride=self.patch_size)


def normalize_map(map_BHWD: Tensor) -> Tensor:
    """Each image's map minus its one mean, over its one deviation: scalars of all H * W * D values.

    LOST builds a fresh LayerNorm over ``(positions, channels)`` per image; it is what makes dot
    products of ReLU features negative at all, and so gives them a background.
    """
    return functional.layer_norm(map_BHWD, map_BHWD.shape[1:], eps=1e-5)


class Vgg16Map(nn.Module):
    """VGG16 up to relu5_3: ``(B, 512, H / 16, W / 16)``; names of weights as in timm.

    Built here because both libraries allocate the 480 MB classifier along with the convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, widths in enumerate(_VGG16_STAGES):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """The map after the last ReLU, before the last max-pool."""
        map_BDHW: Tensor = self.features(images_B3HW)
        return map_BDHW
