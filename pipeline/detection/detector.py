"""The detector: how it is built of the parts beside this file, and its first weights.

    detector = build_detector(default_options("c4", norm="pooled"), read_state_dict(path))
    losses = detector(images, targets)  # in training; in evaluation detector(images)

Detectron2's R50-C4 with LOST's norm after ``layer4`` is ``default_options("c4")``; ``nano`` is its
narrow sister for tests; ``fpn`` also stands on timm's networks. To add a kind: a function beside
``_c4``, and see ``options.py``.

Shape letters:  H, W rows and columns   N boxes
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from pipeline.detection.c4 import PYRAMID_CHANNELS, STRIDES, Res5Head, ResNetPlan, Trunk
from pipeline.detection.c4 import pyramid as build_pyramid
from pipeline.detection.heads import AlignedPool, BoxHeads, BoxPredictor, LossRules
from pipeline.detection.options import FPN_STRIDES, DetectorOptions, default_options
from pipeline.detection.proposals import FixedStrideAnchors, ProposalHead, ProposalNetwork
from pipeline.detection.timm_pyramid import TIMM, TimmPyramid
from pipeline.models.checkpoints import fit_state_dict
from pipeline.models.features import NORMALIZATIONS

__all__ = ["Detector", "DetectorOptions", "build_detector", "default_options", "initialise"]

_FPN_WIDTH = 1024


class Detector(GeneralizedRCNN):  # type: ignore[misc]
    """Images to boxes, or with targets and in training mode to four losses."""

    options: DetectorOptions

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        canvas: tuple[int, int] | None = None,
    ) -> Any:
        """Losses by name, scalars, in training; else each image's detections.

        A loss is the mean over the images (with ``roi_normaliser`` image), so parts of a batch add
        up to the whole, each multiplied by its share of images. A loss that is not finite is given
        as it is: the training loop stops at it.

        Args:
            images: ``(3, H, W)`` float in [0, 1], resized as wanted, sizes may differ.
            targets: for each image ``boxes`` ``(N, 4)`` float32 xyxy pixels, ``labels`` ``(N,)``
                int64 from 1; N may be 0. With ``weight_by_score`` ``scores`` ``(N,)`` in [0, 1].
                A ``key``, one int64, decides what is drawn at random of this image; without it
                torch's global generator does.
            canvas: height and width that the images are padded to at least: those of the largest
                ones of all workers; None pads to the largest here.

        Returns:
            ``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier``, ``loss_box_reg``; or a
            list of ``boxes`` in the pixels of the image given, ``scores`` (descending) and
            ``labels``.
        """
        self.transform.canvas = canvas
        # Targets have no part in detections; torchvision would hand them on.
        return super().forward(images, targets if self.training else None)


def build_detector(
    options: DetectorOptions,
    weights: Mapping[str, Tensor] | None = None,
    source: str = "the initial weights",
) -> Detector:
    """A detector in training mode, its ResNet's weights as given or random.

    Random numbers come from torch's global generator.

    Args:
        options: what to build.
        weights: of its backbone, see ``initialise``.
        source: where they come from, for the message.

    Raises:
        ConfigError: the backbone is no network of timm's, or unfit for a pyramid.
        WeightsError: the weights do not fit.
    """
    parts = _fpn(options) if options.kind == "fpn" else _c4(options)
    rpn = _proposal_network(options, parts)
    detector = Detector(parts.backbone, rpn, _box_heads(options, parts), _Normalise(options))
    detector.options = options
    if weights is not None:
        initialise(detector, weights, source)
    return detector


def initialise(detector: Detector, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Give the detector its backbone's weights, a ResNet's ``layer4`` to the head of a C4.

    The weights' classifier is left out, and what they lack (proposals, extra norm, predictor,
    pyramid) stays as it is.

    Args:
        detector: changed in place, its frozen layers too.
        state_dict: of a ResNet under torchvision's names: DINO's ResNet-50, or one trained on
            labels. Of a network of timm's under timm's.
        source: where it comes from, for the message.

    Raises:
        WeightsError: a tensor is missing, has no place, another shape, or is not finite; the
            detector is untouched then.
    """
    if isinstance(detector.backbone, TimmPyramid):
        detector.backbone.initialise(dict(state_dict), source)
        return
    pyramidal = detector.options.kind == "fpn"
    trunk = detector.backbone.body if pyramidal else detector.backbone
    resnet = nn.Module()
    for name in ("conv1", "bn1", *STRIDES):
        in_head = name == "layer4" and not pyramidal
        holder = detector.roi_heads.box_head if in_head else trunk
        resnet.add_module(name, holder.get_submodule(name))
    places = resnet.state_dict()
    fitting = {
        name: tensor
        for name, tensor in state_dict.items()
        # Frozen norms do not count batches.
        if name in places or not name.endswith(".num_batches_tracked")
    }
    fit_state_dict(resnet, fitting, source)


@dataclass(frozen=True)
class _Parts:
    """In what the kinds differ."""

    backbone: nn.Module
    channels: int
    anchors: FixedStrideAnchors
    pool: AlignedPool
    head: nn.Module
    head_channels: int


def _plan(options: DetectorOptions) -> ResNetPlan:
    return ResNetPlan(options.backbone, options.norm, options.width, options.stem_width)


def _c4(options: DetectorOptions) -> _Parts:
    plan = _plan(options)
    trunk = Trunk(plan, freeze_at=options.freeze_at)
    stride = STRIDES["layer3"]
    head = Res5Head(plan, extra_norm=options.extra_norm)
    return _Parts(
        backbone=trunk,
        channels=trunk.out_channels,
        anchors=FixedStrideAnchors([options.anchor_sizes], options.anchor_ratios, [stride]),
        pool=AlignedPool({"0": stride}, options.pool_size, options.sampling_ratio),
        head=head,
        head_channels=head.out_channels,
    )


def _fpn(options: DetectorOptions) -> _Parts:
    backbone: nn.Module
    if options.on_timm:
        backbone = TimmPyramid(options.backbone.removeprefix(TIMM), options.norm)
    else:
        backbone = build_pyramid(_plan(options), freeze_at=options.freeze_at)
    channels = PYRAMID_CHANNELS
    strides = {str(level): stride for level, stride in enumerate(STRIDES.values())}
    sizes = [(size,) for size in options.anchor_sizes]
    return _Parts(
        backbone=backbone,
        channels=channels,
        anchors=FixedStrideAnchors(sizes, options.anchor_ratios, FPN_STRIDES),
        pool=AlignedPool(strides, options.pool_size, options.sampling_ratio),
        head=TwoMLPHead(channels * options.pool_size**2, _FPN_WIDTH),
        head_channels=_FPN_WIDTH,
    )


def _proposal_network(options: DetectorOptions, parts: _Parts) -> ProposalNetwork:
    return ProposalNetwork(
        parts.anchors,
        ProposalHead(parts.channels, parts.anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=options.rpn_iou_high,
        bg_iou_thresh=options.rpn_iou_low,
        batch_size_per_image=options.rpn_batch,
        positive_fraction=options.rpn_positive_fraction,
        pre_nms_top_n={"training": options.rpn_pre_nms_train, "testing": options.rpn_pre_nms_test},
        post_nms_top_n={
            "training": options.rpn_post_nms_train,
            "testing": options.rpn_post_nms_test,
        },
        nms_thresh=options.rpn_nms,
    )


def _box_heads(options: DetectorOptions, parts: _Parts) -> BoxHeads:
    return BoxHeads(
        LossRules(options.roi_normaliser, options.droploss, options.weight_by_score),
        box_roi_pool=parts.pool,
        box_head=parts.head,
        box_predictor=BoxPredictor(parts.head_channels, options.num_classes + 1),
        fg_iou_thresh=options.roi_iou,
        bg_iou_thresh=options.roi_iou,
        batch_size_per_image=options.roi_batch,
        positive_fraction=options.roi_positive_fraction,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=options.score_threshold,
        nms_thresh=options.nms,
        detections_per_img=options.max_detections,
    )


class _Normalise(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Mean and deviation of the pixels, and padding; the data set resizes."""

    def __init__(self, options: DetectorOptions) -> None:
        mean, deviation = NORMALIZATIONS[options.normalize]
        # The sizes are those of a resize that does not take place.
        super().__init__(1, 1, mean, deviation, size_divisible=options.size_divisible)
        self.canvas: tuple[int, int] | None = None

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def max_by_axis(self, the_list: list[list[int]]) -> list[int]:
        """The shape of the batch's images, before it is made divisible."""
        canvas = [] if self.canvas is None else [[3, *self.canvas]]
        largest: list[int] = super().max_by_axis([*the_list, *canvas])
        return largest
