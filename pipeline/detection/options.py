"""What a detector is to be: every number of it, in plain values, and the kinds' own defaults.

To add a kind: its name in ``DetectorKind``, a line in ``_CHANGES``, a case in
``detector.build_detector``.
"""

from dataclasses import dataclass
from typing import Any, Final, get_args

from pipeline.config.detection import DetectorKind, Norm
from pipeline.detection.c4 import BLOCKS
from pipeline.detection.heads import Normaliser
from pipeline.detection.timm_pyramid import TIMM
from pipeline.errors import ConfigError
from pipeline.models.features import NORMALIZATIONS

FPN_STRIDES: Final = (4, 8, 16, 32, 64)
"""Of a pyramid's five maps; the last is only proposed from."""


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """All of a detector but its weights, in plain values; the defaults are those of ``c4``.

    Other kinds want other numbers: take ``default_options``. It is what a detector's config.json
    holds, every number resolved; users set a part of it in ``DetectorConfig``, whose fields are
    handed on by their names (``setup.options_of``).
    """

    kind: DetectorKind = "c4"
    num_classes: int = 1
    """Of objects; background comes on top."""

    backbone: str = "resnet50"
    """One of ``BLOCKS``, or with fpn ``timm/`` and a name of timm's."""

    normalize: str = "imagenet"
    """Mean and deviation of the pixels, by their name in ``NORMALIZATIONS``."""

    width: int = 64
    """Channels inside the first stage's blocks of a ResNet."""

    stem_width: int = 64
    norm: Norm = "batch"
    """``pooled``: over all workers' images; ``frozen``: fixed gains and statistics everywhere."""

    extra_norm: bool = True
    """A norm after ``layer4``; only where that is the head."""

    freeze_at: int = 2
    """Groups of layers that stay as they are: 1 the stem, 2 ``layer1`` too, ... 0 none."""

    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    """Sides of the square of equal area, pixels; a pyramid has one for each of its five maps."""

    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width."""

    rpn_iou_low: float = 0.3
    rpn_iou_high: float = 0.7
    rpn_batch: int = 256
    """Anchors trained on per image."""

    rpn_positive_fraction: float = 0.5
    rpn_pre_nms_train: int = 12000
    rpn_pre_nms_test: int = 6000
    rpn_post_nms_train: int = 2000
    rpn_post_nms_test: int = 1000
    rpn_nms: float = 0.7
    roi_iou: float = 0.5
    roi_batch: int = 512
    """Regions trained on per image."""

    roi_positive_fraction: float = 0.25
    roi_normaliser: Normaliser = "image"
    """What the regions' losses are means over; see ``LossRules``."""

    pool_size: int = 14
    sampling_ratio: int = 0
    """Points per pooled cell and axis; 0 as many as needed."""

    droploss: float | None = None
    """IoU, CutLER's is 0.01; None leaves DropLoss out."""

    weight_by_score: bool = False
    score_threshold: float = 0.01
    nms: float = 0.4
    max_detections: int = 100
    size_divisible: int = 1
    """Batches are padded to multiples of this many pixels."""

    def __post_init__(self) -> None:
        # Lists come from JSON.
        object.__setattr__(self, "anchor_sizes", tuple(self.anchor_sizes))
        object.__setattr__(self, "anchor_ratios", tuple(self.anchor_ratios))
        self._check_names()
        self._check_timm()
        last_group = 5 if self.kind == "fpn" else 4
        _check(self, "freeze_at", 0, last_group)
        for name, (low, high) in _RANGES.items():
            if getattr(self, name) is not None:
                _check(self, name, low, high)
        self._check_anchors()
        if self.rpn_iou_low > self.rpn_iou_high:
            raise ConfigError(
                f"rpn_iou_low must be at most rpn_iou_high, got {self.rpn_iou_low} and "
                f"{self.rpn_iou_high}"
            )
        if self.kind == "fpn" and self.extra_norm:
            raise ConfigError("extra_norm needs layer4 as the head: turn it off with kind fpn")

    @property
    def on_timm(self) -> bool:
        """Whether the backbone is one of timm's; which ones there are is found out later."""
        return self.backbone.startswith(TIMM)

    def _check_timm(self) -> None:
        """What is known of our own ResNets alone must be left as it is with another network."""
        if not self.on_timm:
            return
        if self.kind != "fpn":
            raise ConfigError(
                f"backbone {self.backbone} needs kind fpn, got {self.kind}: give --detector.kind "
                f"fpn, or one of {', '.join(BLOCKS)}"
            )
        if self.freeze_at:
            raise ConfigError(
                f"freeze_at must be 0 with backbone {self.backbone}, got {self.freeze_at}: only a "
                "ResNet of ours has groups to freeze"
            )
        if (self.width, self.stem_width) != (64, 64):
            raise ConfigError(
                f"width and stem_width have no effect on backbone {self.backbone}: leave them at 64"
            )
        if self.size_divisible % 32:
            raise ConfigError(
                f"size_divisible must be a multiple of 32 with backbone {self.backbone}, got "
                f"{self.size_divisible}"
            )

    def _check_names(self) -> None:
        legal = {
            "kind": get_args(DetectorKind),
            "backbone": (*BLOCKS, *([self.backbone] if self.on_timm else [])),
            "normalize": tuple(NORMALIZATIONS),
            "norm": get_args(Norm),
            "roi_normaliser": get_args(Normaliser),
        }
        for name, values in legal.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}"
                )

    def _check_anchors(self) -> None:
        for name in ("anchor_sizes", "anchor_ratios"):
            values = getattr(self, name)
            if not values or not all(0 < value < float("inf") for value in values):
                raise ConfigError(f"{name} must be one or more numbers above 0, got {values}")
        if self.kind == "fpn" and len(self.anchor_sizes) != len(FPN_STRIDES):
            raise ConfigError(
                f"anchor_sizes must be {len(FPN_STRIDES)} with kind fpn, one for each map, got "
                f"{len(self.anchor_sizes)}"
            )


_MANY: Final = 1_000_000
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "num_classes": (1, _MANY),
    "width": (1, 4096),
    "stem_width": (1, 4096),
    "rpn_iou_low": (0, 1),
    "rpn_iou_high": (0, 1),
    "rpn_batch": (1, _MANY),
    "rpn_positive_fraction": (0, 1),
    "rpn_pre_nms_train": (1, _MANY),
    "rpn_pre_nms_test": (1, _MANY),
    "rpn_post_nms_train": (1, _MANY),
    "rpn_post_nms_test": (1, _MANY),
    "rpn_nms": (0, 1),
    "roi_iou": (0, 1),
    "roi_batch": (1, _MANY),
    "roi_positive_fraction": (0, 1),
    "pool_size": (2, 64),
    "sampling_ratio": (0, 16),
    "droploss": (0, 1),
    "score_threshold": (0, 1),
    "nms": (0, 1),
    "max_detections": (1, _MANY),
    "size_divisible": (1, 1024),
}

_CHANGES: Final[dict[str, dict[str, Any]]] = {
    "c4": {},
    "fpn": {
        "extra_norm": False,
        "rpn_pre_nms_train": 2000,
        "rpn_pre_nms_test": 1000,
        "rpn_post_nms_train": 1000,
        "pool_size": 7,
        "size_divisible": 32,
    },
    "nano": {
        "backbone": "resnet10",
        "width": 16,
        "stem_width": 16,
        "freeze_at": 0,
        "anchor_sizes": (16, 32, 64, 96, 128),
        "rpn_batch": 64,
        "rpn_pre_nms_train": 500,
        "rpn_pre_nms_test": 300,
        "rpn_post_nms_train": 100,
        "rpn_post_nms_test": 50,
        "roi_batch": 16,
        "pool_size": 7,
    },
}


def default_options(kind: DetectorKind, **changes: Any) -> DetectorOptions:
    """The options that suit a kind, with ``changes``.

    Raises:
        ConfigError: a kind, name or value that is not allowed.
    """
    if kind not in _CHANGES:
        raise ConfigError(f"kind must be one of {', '.join(_CHANGES)}, got {kind!r}")
    if unknown := sorted(changes.keys() - DetectorOptions.__dataclass_fields__.keys()):
        raise ConfigError(f"a detector has no option {', '.join(unknown)}")
    of_kind = _CHANGES[kind]
    if str(changes.get("backbone", "")).startswith(TIMM):
        of_kind = of_kind | {"freeze_at": 0}
    return DetectorOptions(kind=kind, **(of_kind | changes))


def _check(options: DetectorOptions, name: str, low: float, high: float) -> None:
    value = getattr(options, name)
    whole = DetectorOptions.__dataclass_fields__[name].type is int
    if not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} must be {kind} from {low} to {high}, got {value}")
