"""Region proposals trained as Detectron2 trains them, their anchors, and what is trained on.

Torchvision's region proposal network has a smooth L1 loss and divides by the anchors drawn; here it
is L1 and a constant, so that the loss of a batch is the mean of its images' losses. Torchvision
rounds anchors to whole pixels, and takes for a stride the quotient of padded side and grid, which
is 15 and not 16 for most images that are not padded to a multiple of 16; here they are unrounded,
at strides that do not depend on the padding.

Shape letters:  A anchors (of all levels)   C anchors of a cell   N candidates: anchors or regions
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from pipeline.data.seeding import key_of

IGNORED = -1


class ProposalHead(RPNHead):  # type: ignore[misc]
    """Torchvision's head; its outputs are float32 also under autocast, as boxes come of them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and box codes of each level."""
        logits, codes = super().forward(x)
        return [one.float() for one in logits], [one.float() for one in codes]


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """Torchvision's region proposal network with Detectron2's losses and drawing by keys."""

    def __init__(self, anchors: nn.Module, head: nn.Module, **settings: Any) -> None:
        """Take torchvision's arguments."""
        super().__init__(anchors, head, **settings)
        self.batch_per_image: int = settings["batch_size_per_image"]
        self.positive_fraction: float = settings["positive_fraction"]

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """1, 0 or -1 (not trained on) for each anchor, and the box it should become.

        Anchors that were not drawn are ignored here already, where each image's key is at hand.
        """
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        drawn = [
            labels_A.masked_fill(~self._draw(labels_A, target), IGNORED)
            for labels_A, target in zip(labels, targets, strict=True)
        ]
        return drawn, boxes

    def _draw(self, labels_A: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        generator = sampling_generator(target, "anchors")
        return draw_balanced(labels_A, self.batch_per_image, self.positive_fraction, generator)

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and L1 distance, both summed over anchors, over (anchors drawn * images).

        As a constant the number that *may* be drawn is meant, so images count alike.
        """
        wanted_A = torch.cat(labels)
        drawn_A, positive_A = wanted_A != IGNORED, wanted_A == 1
        divisor = self.batch_per_image * len(labels)
        cross_entropy = functional.binary_cross_entropy_with_logits(
            objectness.flatten()[drawn_A], wanted_A[drawn_A], reduction="sum"
        )
        distance = functional.l1_loss(
            pred_bbox_deltas[positive_A],
            torch.cat(regression_targets)[positive_A],
            reduction="sum",
        )
        return cross_entropy / divisor, distance / divisor


def sampling_generator(target: Mapping[str, Tensor], purpose: str) -> torch.Generator | None:
    """The generator that the image's ``key`` decides; None, the global one, where it has none."""
    if "key" not in target:
        return None
    seed = key_of(purpose, int(target["key"]))
    return torch.Generator().manual_seed(seed)


def draw_balanced(
    labels_N: Tensor, num: int, positive_fraction: float, generator: torch.Generator | None
) -> Tensor:
    """``(N,)`` bool: at most ``num`` drawn, of them at most ``positive_fraction`` positive.

    Where positives lack negatives take their place, but not the other way round.

    Args:
        labels_N: at least 1 positive, 0 negative, -1 never drawn.
        num: candidates to draw.
        positive_fraction: in [0, 1].
        generator: of the CPU, whatever the device: all devices draw alike.
    """
    drawn_N = torch.zeros_like(labels_N, dtype=torch.bool)
    positives, negatives = (labels_N >= 1).nonzero()[:, 0], (labels_N == 0).nonzero()[:, 0]
    num_positive = min(len(positives), int(num * positive_fraction))
    num_negative = min(len(negatives), num - num_positive)
    for candidates, taken in ((positives, num_positive), (negatives, num_negative)):
        order = torch.randperm(len(candidates), generator=generator)[:taken]
        drawn_N[candidates[order.to(candidates.device)]] = True
    return drawn_N


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
