"""Anchors where Detectron2 has them: unrounded, at strides that do not depend on the padding.

Torchvision rounds anchors to whole pixels, and takes for a stride the quotient of padded side and
grid, which is 15 and not 16 for most images that are not padded to a multiple of 16.

Shape letters:  A anchors   C anchors of a cell
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList


class FixedStrideAnchors(AnchorGenerator):  # type: ignore[misc]
    """Every size at every ratio around (column * stride, row * stride) of each level's cells."""

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float],
        strides: Sequence[int],
    ) -> None:
        """Sizes (sides of the square of equal area, pixels) and stride of each level.

        Args:
            sizes: per level.
            ratios: height over width, the same on all levels.
            strides: pixels per cell of each level.

        Raises:
            ValueError: there are not as many strides as levels.
        """
        if len(sizes) != len(strides):
            raise ValueError(
                f"each level needs a stride, got {len(strides)} for {len(sizes)} levels"
            )
        super().__init__(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """``(C, 4)`` around (0, 0), in Detectron2's order: all ratios of the first size first."""
        # In double: a float32 root would be off by a last digit where ratios are no powers of 2.
        exact: Any = {"dtype": torch.float64, "device": "cpu"}
        sizes = torch.tensor(scales, **exact)[:, None]
        roots = torch.tensor(aspect_ratios, **exact).sqrt()[None, :]
        half_widths, half_heights = (sizes / roots / 2).flatten(), (sizes * roots / 2).flatten()
        corners = (-half_widths, -half_heights, half_widths, half_heights)
        return torch.stack(corners, dim=1).to(dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """``(A, 4)`` float32 for each image, level by level, row by row."""
        device = feature_maps[0].device
        # Never in the features' own type: bfloat16 would place anchors 4 pixels apart at 800.
        self.set_cell_anchors(torch.float32, device)
        grids: list[Any] = [feature_map.shape[-2:] for feature_map in feature_maps]
        strides = [
            [torch.tensor(stride, device=device), torch.tensor(stride, device=device)]
            for stride in self.strides
        ]
        anchors_A4 = torch.cat(self.grid_anchors(grids, strides))
        return [anchors_A4] * len(image_list.image_sizes)
