"""What becomes of a region: aligned pooling, the two outputs, and Detectron2's losses on them.

To try another treatment of noisy boxes: a function like ``not_dropped``, a field of ``LossRules``
and a line in ``BoxHeads._weights``.

Shape letters:  R regions   K foreground classes + 1 (0 is background)   T targets   C channels
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou, roi_align

from pipeline.detection.proposals import draw_balanced, sampling_generator

# A region of 224 x 224 pixels is pooled from the map of stride 16 = 2**4; "Feature Pyramid
# Networks", Eq. 1.
_CANONICAL_SIDE, _CANONICAL_LEVEL = 224, 4

Normaliser = Literal["image", "batch"]


@dataclass(frozen=True)
class LossRules:
    """How the regions' losses are weighed."""

    normaliser: Normaliser = "image"
    """``image``: the mean over images of the mean over each one's regions, so that a batch may be
    divided at will; ``batch``: the mean over all regions of the call, as in Detectron2. They differ
    only where an image offers fewer regions than are to be drawn."""

    droploss: float | None = None
    """Leave out what a region's class costs where its predicted box overlaps no target more."""

    weight_by_score: bool = False
    """Whether what an object's class costs is multiplied by the score of the target."""


class AlignedPool(nn.Module):
    """ROIAlign without the half-pixel shift, adaptively sampled, from one map or a pyramid's.

    Torchvision's ``MultiScaleRoIAlign`` always shifts by half a cell.
    """

    def __init__(self, strides: Mapping[str, int], size: int, sampling_ratio: int = 0) -> None:
        """Pool ``size x size`` cells.

        Args:
            strides: of the maps pooled from, by name, ascending powers of 2.
            size: cells of a side.
            sampling_ratio: points per cell and axis; 0 as many as the region has pixels there.
        """
        super().__init__()
        self.strides = dict(strides)
        self.size = size
        self.sampling_ratio = sampling_ratio

    def forward(
        self,
        features: Mapping[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        """``(R, C, size, size)``, the regions of all images in their order."""
        if len(self.strides) == 1:
            (name,) = self.strides
            return self._pool(features[name], _with_image(boxes), self.strides[name])
        regions_R5, level_R = _with_image(boxes), self._levels(torch.cat(boxes))
        channels = next(iter(features.values())).shape[1]
        shape = (regions_R5.shape[0], channels, self.size, self.size)
        pooled = features[next(iter(self.strides))].new_zeros(shape)
        for level, (name, stride) in enumerate(self.strides.items()):
            here = (level_R == level).nonzero()[:, 0]
            cells = self._pool(features[name], regions_R5[here], stride)
            pooled = pooled.index_copy(0, here, cells.to(pooled.dtype))
        return pooled

    def _pool(self, map_BCHW: Tensor, regions_R5: Tensor, stride: int) -> Tensor:
        cells: Tensor = roi_align(
            map_BCHW,
            regions_R5.to(map_BCHW.dtype),
            self.size,
            spatial_scale=1 / stride,
            sampling_ratio=self.sampling_ratio,
            aligned=True,
        )
        return cells

    def _levels(self, boxes_R4: Tensor) -> Tensor:
        """Which map each region is pooled from: one further per doubling of its side."""
        sides_R = (boxes_R4[:, 2:] - boxes_R4[:, :2]).prod(dim=1).sqrt()
        level_R = (_CANONICAL_LEVEL + (sides_R / _CANONICAL_SIDE + 1e-8).log2()).floor()
        first = min(self.strides.values()).bit_length() - 1
        return (level_R - first).clamp(0, len(self.strides) - 1).long()


class BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """A class and a box code per class; float32 also under autocast, as boxes come of it."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, regions_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(R, K)`` and codes ``(R, 4 K)``."""
        logits_RK, codes = super().forward(regions_RC)
        return logits_RK.float(), codes.float()


@dataclass(frozen=True)
class RegionsOfImage:
    """The regions of one image that are trained on."""

    boxes_R4: Tensor
    labels_R: Tensor
    """0 is background."""

    matched_R: Tensor
    """Index of the target with the largest overlap; without meaning for background."""

    target: Mapping[str, Tensor]


class BoxHeads(RoIHeads):  # type: ignore[misc]
    """Torchvision's heads for boxes, trained with Detectron2's losses and drawing by keys."""

    def __init__(self, rules: LossRules, **settings: Any) -> None:
        """Take torchvision's arguments."""
        super().__init__(**settings)
        self.rules = rules
        self.batch_per_image: int = settings["batch_size_per_image"]
        self.positive_fraction: float = settings["positive_fraction"]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image and no loss; in training losses and no detection.

        Raises:
            ValueError: in training there are no targets, or no scores that are to weigh.
        """
        if not self.training:
            detections: list[dict[str, Tensor]]
            detections, _ = super().forward(features, proposals, image_shapes)
            return detections, {}
        if targets is None:
            raise ValueError("targets are needed in training, got None")
        regions = self.draw(proposals, targets)
        boxes = [image.boxes_R4 for image in regions]
        pooled = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
        logits_RK, codes = self.box_predictor(pooled)
        codes_RK4 = codes.reshape(len(logits_RK), -1, 4)
        return [], self.losses(logits_RK, codes_RK4, regions)

    @torch.no_grad()
    def draw(
        self, proposals: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> list[RegionsOfImage]:
        """The regions trained on: of the proposals and the targets' own boxes, drawn by class."""
        boxes = [target["boxes"].float() for target in targets]
        candidates = self.add_gt_proposals(list(proposals), boxes)
        matched, labels = self.assign_targets_to_proposals(
            candidates, boxes, [target["labels"] for target in targets]
        )
        regions = []
        for image, target in enumerate(targets):
            generator = sampling_generator(target, "regions")
            taken = draw_balanced(
                labels[image], self.batch_per_image, self.positive_fraction, generator
            )
            regions.append(
                RegionsOfImage(
                    candidates[image][taken], labels[image][taken], matched[image][taken], target
                )
            )
        return regions

    def losses(
        self, logits_RK: Tensor, codes_RK4: Tensor, regions: Sequence[RegionsOfImage]
    ) -> dict[str, Tensor]:
        """Cross-entropy of all regions, and L1 distance of the boxes of those that hold an object.

        Both are divided by the number of regions (``LossRules.normaliser``), of objects or not.
        """
        labels_R = torch.cat([image.labels_R for image in regions])
        share_R = region_shares([len(image.labels_R) for image in regions], self.rules.normaliser)
        share_R = share_R.to(logits_RK.device)
        cross_entropy_R = functional.cross_entropy(logits_RK, labels_R, reduction="none")
        counted = self._weights(logits_RK.detach(), codes_RK4.detach(), regions) * share_R
        objects = (labels_R > 0).nonzero()[:, 0]
        distance_R = functional.l1_loss(
            codes_RK4[objects, labels_R[objects]], self._wanted_codes(regions), reduction="none"
        ).sum(dim=1)
        return {
            "loss_classifier": (cross_entropy_R * counted).sum(),
            "loss_box_reg": (distance_R * share_R[objects]).sum(),
        }

    def _wanted_codes(self, regions: Sequence[RegionsOfImage]) -> Tensor:
        """What the box code of each region that holds an object should be."""
        wanted = []
        for image in regions:
            holds = image.labels_R > 0
            boxes = image.target["boxes"].float()[image.matched_R[holds]]
            wanted.append(self.box_coder.encode_single(boxes, image.boxes_R4[holds]))
        return torch.cat(wanted)

    @torch.no_grad()
    def _weights(
        self, logits_RK: Tensor, codes_RK4: Tensor, regions: Sequence[RegionsOfImage]
    ) -> Tensor:
        """What the class of each region counts, before it is divided by anything."""
        weight_R = torch.ones_like(logits_RK[:, 0])
        if self.rules.weight_by_score:
            weight_R *= torch.cat([target_scores(image) for image in regions])
        if self.rules.droploss is not None:
            boxes_R4 = self.likeliest_boxes(logits_RK, codes_RK4, regions)
            split = torch.split(boxes_R4, [len(image.labels_R) for image in regions])
            weight_R *= torch.cat(
                [
                    not_dropped(predicted_R4, image.target["boxes"], self.rules.droploss)
                    for predicted_R4, image in zip(split, regions, strict=True)
                ]
            )
        return weight_R

    def likeliest_boxes(
        self, logits_RK: Tensor, codes_RK4: Tensor, regions: Sequence[RegionsOfImage]
    ) -> Tensor:
        """``(R, 4)``: the box predicted for each region's likeliest foreground class, unclipped."""
        best_R = 1 + logits_RK[:, 1:].argmax(dim=1)
        codes_R4 = codes_RK4[torch.arange(len(best_R), device=best_R.device), best_R]
        regions_R4 = torch.cat([image.boxes_R4 for image in regions])
        boxes_R4: Tensor = self.box_coder.decode_single(codes_R4, regions_R4)
        return boxes_R4


def region_shares(counts: Sequence[int], normaliser: Normaliser) -> Tensor:
    """``(R,)``: what each region counts in a mean, given how many regions each image has."""
    if normaliser == "batch":
        return torch.full((sum(counts),), 1.0 / max(sum(counts), 1))
    shares = [torch.full((count,), 1.0 / (max(count, 1) * len(counts))) for count in counts]
    return torch.cat(shares)


def not_dropped(predicted_R4: Tensor, targets_T4: Tensor, max_iou: float) -> Tensor:
    """``(R,)`` 1 where the predicted box overlaps some target by more than ``max_iou``, else 0.

    DropLoss of Wang et al., "Cut and Learn", CVPR 2023, section 3.3: no pseudo-box near is no proof
    that there is no object. Where there is no target at all every region is dropped.
    """
    if not len(targets_T4):
        return predicted_R4.new_zeros(len(predicted_R4))
    iou_RT: Tensor = box_iou(predicted_R4, targets_T4.float())
    return (iou_RT.amax(dim=1) > max_iou).float()


def target_scores(image: RegionsOfImage) -> Tensor:
    """``(R,)``: the score of the target each region holds, 1 for background.

    Raises:
        ValueError: the targets have no scores.
    """
    if "scores" not in image.target:
        raise ValueError("weight_by_score needs scores in every target, and one has none")
    weight_R = torch.ones(len(image.labels_R), device=image.labels_R.device)
    holds = image.labels_R > 0
    weight_R[holds] = image.target["scores"].float()[image.matched_R[holds]]
    return weight_R


def _with_image(boxes: list[Tensor]) -> Tensor:
    """``(R, 5)``: each box after the index of its image."""
    return torch.cat(
        [
            torch.cat([torch.full_like(of_image[:, :1], index), of_image], dim=1)
            for index, of_image in enumerate(boxes)
        ]
    )
