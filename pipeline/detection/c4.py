"""The convolutions: a ResNet's stages, cut where the regions are pooled, or under a pyramid.

In Detectron2's C4 the regions are pooled from the fourth group of layers (``layer3``, stride 16),
and the fifth (``layer4``) is the head that every region passes through. Names of weights are
torchvision's. To add a ResNet: a line in ``BLOCKS``.

Shape letters:  B images   R regions   C channels   H, W rows and columns
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d

from pipeline.config.detection import Norm
from pipeline.detection.batch_norm import PooledBatchNorm2d

BackboneName = Literal["resnet10", "resnet18", "resnet34", "resnet50"]
NormLayer: TypeAlias = Callable[[int], nn.Module]

BLOCKS: Final[dict[str, tuple[Any, tuple[int, int, int, int]]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
"""Kind of block and number of blocks of each stage."""

NORM_LAYERS: Final[dict[str, NormLayer]] = {
    "batch": nn.BatchNorm2d,
    "pooled": PooledBatchNorm2d,
    "frozen": FrozenBatchNorm2d,
}

PYRAMID_CHANNELS: Final = 256
"""Of every map of a pyramid."""

STRIDES: Final = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
"""Image pixels per cell after each stage."""


@dataclass(frozen=True)
class ResNetPlan:
    """Which ResNet: the published ones have both widths 64."""

    name: str = "resnet50"
    """One of ``BLOCKS``."""

    norm: Norm = "batch"
    width: int = 64
    """Channels inside the blocks of the first stage; doubled by each further one."""

    stem_width: int = 64
    """Channels of the first convolution."""

    def stage(self, number: int) -> nn.Sequential:
        """``layer<number>``, 1 to 4."""
        block, counts = BLOCKS[self.name]
        norm = NORM_LAYERS[self.norm]
        planes, before = self.width << (number - 1), self.channels(number - 1)
        channels, stride = self.channels(number), 1 if number == 1 else 2
        shortcut = None
        if stride != 1 or before != channels:
            shortcut = nn.Sequential(conv1x1(before, channels, stride), norm(channels))
        blocks = [block(before, planes, stride, shortcut, norm_layer=norm)]
        blocks += [block(channels, planes, norm_layer=norm) for _ in range(1, counts[number - 1])]
        return nn.Sequential(*blocks)

    def channels(self, number: int) -> int:
        """What ``layer<number>`` gives; 0 is the stem."""
        if number == 0:
            return self.stem_width
        expansion: int = BLOCKS[self.name][0].expansion
        return (self.width << (number - 1)) * expansion


class Trunk(nn.Module):
    """A ResNet's stem and first stages, without their weights' history: initialised at random."""

    def __init__(self, plan: ResNetPlan, *, num_stages: int = 3, freeze_at: int = 0) -> None:
        """Build ``layer1`` to ``layer<num_stages>``, and freeze the first ``freeze_at`` groups.

        Args:
            plan: which ResNet.
            num_stages: 3 for C4, 4 under a pyramid.
            freeze_at: 0 nothing, 1 the stem, 2 ``layer1`` too, and so on.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(3, plan.stem_width, 7, stride=2, padding=3, bias=False)
        self.bn1 = NORM_LAYERS[plan.norm](plan.stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.num_stages = num_stages
        for number in range(1, num_stages + 1):
            self.add_module(f"layer{number}", plan.stage(number))
        self.out_channels = plan.channels(num_stages)
        initialise_convolutions(self)
        _freeze(self, freeze_at)

    def forward(self, images_B3HW: Tensor) -> OrderedDict[str, Tensor]:
        """The last stage's map under the name ``0``, ``(B, C, H / stride, W / stride)``."""
        maps_BCHW: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images_B3HW))))
        for number in range(1, self.num_stages + 1):
            maps_BCHW = self.get_submodule(f"layer{number}")(maps_BCHW)
        return OrderedDict([("0", maps_BCHW)])


class Res5Head(nn.Module):
    """Pooled regions through ``layer4``; a further norm after its last ReLU, then the mean.

    The norm is LOST's ``Res5ROIHeadsExtraNorm``; nothing follows it but the mean over cells.
    """

    def __init__(self, plan: ResNetPlan, *, extra_norm: bool = True) -> None:
        super().__init__()
        self.layer4 = plan.stage(4)
        self.out_channels = plan.channels(4)
        self.norm = NORM_LAYERS[plan.norm](self.out_channels) if extra_norm else nn.Identity()
        initialise_convolutions(self)

    def forward(self, regions_RCHW: Tensor) -> Tensor:
        """``(R, C)``."""
        cells_RCHW: Tensor = self.norm(self.layer4(regions_RCHW))
        return cells_RCHW.mean(dim=(2, 3))


def pyramid(plan: ResNetPlan, *, freeze_at: int) -> nn.Module:
    """Torchvision's feature pyramid on a ResNet: maps ``0`` to ``3`` and ``pool``, strides 4 to 64.

    Lin et al., "Feature Pyramid Networks", CVPR 2017.
    """
    trunk = Trunk(plan, num_stages=4, freeze_at=freeze_at)
    levels = {layer: str(level) for level, layer in enumerate(STRIDES)}
    channels = [plan.channels(number) for number in range(1, 5)]
    neck: nn.Module = BackboneWithFPN(trunk, levels, channels, out_channels=PYRAMID_CHANNELS)
    return neck


def initialise_convolutions(module: nn.Module) -> None:
    """He et al.'s normal initialisation by fan-out, as for all ResNets."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def _freeze(trunk: Trunk, freeze_at: int) -> None:
    """Fix the weights of the first groups, and both the gains and the statistics of their norms."""
    stages = [f"layer{number}" for number in range(1, trunk.num_stages + 1)]
    groups: list[Iterable[str]] = [("conv1", "bn1"), *((stage,) for stage in stages)]
    for group in groups[:freeze_at]:
        for name in group:
            part = trunk.get_submodule(name)
            part.requires_grad_(False)
            trunk.add_module(name, _frozen(part))


def _frozen(module: nn.Module) -> nn.Module:
    """The module with its batch norms turned into fixed ones, which have buffers only."""
    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        fixed: nn.Module = FrozenBatchNorm2d(module.num_features, eps=module.eps)
        fixed.load_state_dict(module.state_dict())
        return fixed
    for name, part in module.named_children():
        module.add_module(name, _frozen(part))
    return module
