"""Feature maps of convolutional networks as patch features, normalised as LOST does it.

To add a network: any module that gives ``(B, D, H, W)`` at a known stride can be wrapped in
``ConvFeatures``; give ``backbones.build_backbone`` a name for it.

Shape letters:  B images   H, W rows and columns of the map   D channels
"""

from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.features import FeatureExtractor, PatchFeatures

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
