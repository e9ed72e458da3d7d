"""The jobs that train a class-agnostic detector (CAD) on pseudo-boxes, and detect with it."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.labelling import BulkJob, ComputeConfig, Difficult, ImagesConfig
from pipeline.config.settings import (
    Below1,
    Count,
    Fraction,
    LoaderConfig,
    NonNegative,
    Positive,
    PositiveInt,
    Probability,
    Settings,
    TrainingJob,
    flatten,
)

DetectorKind = Literal["c4", "fpn", "nano"]
Norm = Literal["batch", "pooled", "frozen"]

Side = Annotated[int, Field(ge=16, le=16_384)]


class DetectorConfig(Settings):
    """Which detector, and where its weights start; None is the kind's own value."""

    kind: DetectorKind = "c4"
    """c4 as LOST trains it; fpn is faster and sees smaller objects; nano is for trying things."""

    backbone: str | None = None
    """resnet50, resnet34, resnet18 or resnet10; with fpn also timm/NAME, such as
    timm/convnext_tiny."""

    init: str = "dino"
    """dino, imagenet (both ResNet-50, from the hub), timm (the published weights of timm/NAME),
    none, a file of the backbone's weights, or the folder of a detector to go on from."""

    norm: Norm = "pooled"
    """Batch norm of each worker, over all workers' images (SyncBN), or fixed; other norms of
    timm/NAME stay as they are."""

    freeze_at: Annotated[int, Field(ge=0, le=5)] | None = None
    """Groups of layers that do not learn: 1 the stem, 2 layer1 too; none where weights start from
    scratch."""

    roi_batch: PositiveInt | None = None
    """Regions trained on per image."""

    anchor_sizes: tuple[Positive, ...] | None = None
    """Sides of anchors in pixels."""

    droploss: Probability | None = None
    """Forgive what overlaps no pseudo-box: regions whose predicted box has at most this IoU with
    all of them do not count as background (CutLER: 0.01)."""

    weight_by_score: bool = False
    """Weigh regions by the score of their pseudo-box."""

    score_threshold: Probability | None = None
    """Detections below this are not told."""

    nms: Probability | None = None
    """Of two detections that overlap more than this IoU the better one stays."""

    @model_validator(mode="after")
    def _weights_belong_to_the_backbone(self) -> "DetectorConfig":
        on_timm = (self.backbone or "").startswith("timm/")
        if on_timm and self.kind != "fpn":
            raise ValueError(
                f"--detector.backbone {self.backbone} needs --detector.kind fpn, got {self.kind}"
            )
        if on_timm and self.init in ("dino", "imagenet"):
            raise ValueError(
                f"--detector.init {self.init} is a ResNet-50: with --detector.backbone "
                f"{self.backbone} give timm, none, or a file"
            )
        if self.init == "timm" and not on_timm:
            raise ValueError(
                "--detector.init timm needs --detector.backbone timm/NAME, got "
                f"{self.backbone or 'none'}"
            )
        return self


class BoxDataConfig(Settings):
    """How images with boxes are read."""

    min_score: Probability | None = None
    """Leave out pseudo-boxes of a lower score."""

    short_sides: Annotated[tuple[Side, ...], Field(min_length=1)] = tuple(range(480, 801, 32))
    """Shorter side of an image, drawn anew each time."""

    max_side: Side = 1333
    """Longer side at most."""

    test_short_side: Side = 800
    """Shorter side when detecting."""

    flip: Probability = 0.5
    """Probability of a mirrored image."""

    aspect_buckets: bool = True
    """Have images of one orientation meet in a batch."""

    max_bad_fraction: Probability = 0.05
    """Unreadable images are replaced by others, and told; more than these end the run."""


class DetectorOptimConfig(Settings):
    """How the weights move: SGD, a warm-up, and a tenth of the rate at each milestone."""

    lr: Positive = 0.02
    """Peak learning rate for reference_batch images."""

    reference_batch: PositiveInt | None = 16
    """The batch that --optim.lr and --steps are meant for: both are scaled linearly to
    --batch-size. None takes them as they are."""

    warmup_steps: Count = 100
    """Steps from a thousandth of the rate to all of it."""

    milestones: tuple[Fraction, ...] = (0.75, 11 / 12)
    """Shares of the run after which the rate falls to a tenth."""

    momentum: Below1 = 0.9
    """Of SGD."""

    weight_decay: NonNegative = 1e-4
    """On all but the norms."""

    clip: NonNegative = 0.0
    """Norm that the gradient of the whole batch is clipped to; 0 does not clip."""

    accumulate: PositiveInt = 1
    """Parts that each worker's share of a batch is computed in."""


class DetectionProbeConfig(Settings):
    """Photos whose objects are known, to measure AP50 and CorLoc on while training."""

    images: str | None = None
    """Folder, glob, list or table of them."""

    ground_truth: str | None = None
    """Their boxes: a COCO file or a folder of VOC XML."""

    difficult: Difficult = "drop"
    """What VOC's difficult objects are in AP: not there (as in the papers), neither right nor
    wrong, or objects."""

    num_images: PositiveInt | None = None
    """The first so many of them; None is all."""

    every: PositiveInt = 5
    """Windows between measurements; after the last one it is always measured."""

    @model_validator(mode="after")
    def _boxes_belong_to_photos(self) -> "DetectionProbeConfig":
        if (self.images is None) != (self.ground_truth is None):
            raise ValueError("--probe.images and --probe.ground-truth belong together: give both")
        return self


class SelfTrainingConfig(Settings):
    """How a round's detections become labels of the next one."""

    min_score: Probability = 0.5
    """Detections of at least this score are boxes of the next round."""

    iou: Fraction = 0.5
    """First labels that overlap such a detection by at least this IoU give way to it."""


class TrainDetectorJob(TrainingJob):
    """Train a class-agnostic Faster R-CNN on the boxes of a pseudo-label table."""

    kind: ClassVar = "detector"

    places: ClassVar = {
        "labels": "file or folder",
        "add_labels": "file or folder",
        "detector.init": "weights",
        "probe.images": "images",
        "probe.ground_truth": "file or folder",
    }

    labels: str
    """Pseudo-label table (folder); its images are found through its URIs."""

    export: str | None = None
    """Also write model.safetensors, config.json and model.onnx here."""

    onnx: bool = True
    """Make the export hold an ONNX file, compared with the detector before it is kept."""

    add_labels: str | None = None
    """Table of detections on the same images, to be merged with the labels."""

    batch_size: PositiveInt = 16
    """Images per step over all workers together."""

    steps: PositiveInt = 24_000
    """Steps, for a batch of --optim.reference-batch images."""

    windows: PositiveInt = 24
    """The run is cut into so many; each ends with a checkpoint."""

    rounds: PositiveInt = 1
    """Rounds of self-training: each next one learns from the detections of the one before too."""

    round: PositiveInt = 1
    """Which round this is; --rounds counts them."""

    precise_bn: Count = 200
    """Batches that the statistics of batch norm are measured on before detecting; 0 takes the
    running ones."""

    loader_workers: Count | None = None
    """Processes per worker that decode; 0 does it in the training process. None is 4, or as many as
    there are cores."""

    detector: DetectorConfig = DetectorConfig()
    data: BoxDataConfig = BoxDataConfig()
    optim: DetectorOptimConfig = DetectorOptimConfig()
    probe: DetectionProbeConfig = DetectionProbeConfig()
    self_training: SelfTrainingConfig = SelfTrainingConfig()

    @model_validator(mode="after")
    def _settings_agree(self) -> "TrainDetectorJob":
        self.require_agreeing_workers()
        if self.round > self.rounds:
            raise ValueError(f"--round must be at most --rounds {self.rounds}, got {self.round}")
        self.require_work_for_all(self.batch_size, self.optim.accumulate)
        return self

    @property
    def loader(self) -> LoaderConfig:
        """How batches come, of which one half stands here and the other in ``data``."""
        return LoaderConfig(
            loader_workers=self.loader_workers, max_bad_fraction=self.data.max_bad_fraction
        )

    @property
    def lr(self) -> float:
        """The peak rate at this batch."""
        return self.optim.lr * self.batch_size / (self.optim.reference_batch or self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a window at this batch; the last step of the run is the end of a window."""
        steps = self.steps * (self.optim.reference_batch or self.batch_size) / self.batch_size
        return max(1, round(steps / self.windows))

    @property
    def num_epochs(self) -> int:
        """See the base class: windows."""
        return self.windows

    @property
    def slug(self) -> str:
        """Labels, detector, seed and round."""
        table = self.labels.rstrip("/").rpartition("/")[2]
        again = f"-round{self.round}" if self.round > 1 else ""
        return f"detector-{table}-{self.detector.kind}-seed{self.seed}{again}"

    def what_decides_the_weights(self) -> dict[str, Any]:
        """See the base class."""
        named = {
            "labels", "add_labels", "batch_size", "steps", "windows", "round", "seed", "precision",
        }  # fmt: skip
        groups = {"detector", "data", "optim", "self_training"}
        decides = self.model_dump(mode="json", include=named | groups)
        if self.add_labels is None:
            del decides["self_training"]
        return flatten(decides)


class DetectImagesConfig(ImagesConfig):
    """What is done to an image's bytes before the detector resizes it to its own size."""

    max_side: Annotated[int, Field(ge=64, le=16_384)] = 2666
    """Longer images are first scaled down to this; less than the detector's own longest side costs
    detail. Boxes stay in original pixels."""


class DetectComputeConfig(ComputeConfig):
    """How the work is cut up and placed; none of it changes a box (but precision does)."""

    batch_size: PositiveInt | None = None
    """Images per forward pass at most (of one size as the detector sees them); None is 4 on a GPU,
    and 1 on a CPU, which gains nothing by more."""

    block_size: PositiveInt = 16
    """Images per unit of work: what a kill can cost, and what is decoded in one go."""


class DetectJob(BulkJob):
    """Find the objects of every image of a collection with a trained detector."""

    places: ClassVar = {
        "images": "images",
        "labels": "file or folder",
        "detector": "file or folder",
    }

    images: str | None = None
    """A folder, a glob, a .txt or .parquet list of URIs, or Parquet with image bytes; local paths,
    s3:// or gs://."""

    labels: str | None = None
    """Or the images of a pseudo-label table (folder), found through its URIs; they keep their
    image_id, so that the rows of both tables match."""

    detector: str
    """Folder (or URI) of a detector, as jobs/train_detector.py writes it."""

    score_threshold: Probability | None = None
    """Detections below this are not told; None is the detector's own."""

    max_detections: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Boxes per image at most; None is the detector's own."""

    decode: DetectImagesConfig = DetectImagesConfig()
    compute: DetectComputeConfig = DetectComputeConfig()

    @model_validator(mode="after")
    def _images_come_from_one_place(self) -> "DetectJob":
        if (self.images is None) == (self.labels is None):
            raise ValueError("give either --images or --labels: one of them names the images")
        return self

    def what_decides_the_boxes(self, detector: dict[str, Any]) -> dict[str, Any]:
        """The part of the configuration that a resumed run must share, as flat JSON values.

        Args:
            detector: all that decides what it finds, as JSON values, limits of this job included.
        """
        source = {"images": self.images} if self.labels is None else {"labels": self.labels}
        groups = {
            **source,
            "detector": detector,
            "decode": self.decode.model_dump(mode="json"),
            "precision": self.compute.precision,
        }
        return flatten(groups)


def presets() -> dict[str, dict[str, Any]]:
    """Presets of train_detector by name; ``sane`` is what the defaults are."""
    return {
        "sane": {},
        # LOST, batch 16 over 8 GPUs with SyncBN; its 24K steps, also of VOC07's 10K.
        "lost": {
            "batch_size": 16,
            "optim": {"lr": 0.02, "reference_batch": None, "milestones": [0.75, 11 / 12]},
            "detector": {"kind": "c4", "norm": "pooled", "init": "dino"},
        },
        # What fitted on one small GPU: two images a step, at the rate that was meant for 16.
        "solost-repro": {
            "batch_size": 2,
            "steps": 10_000,
            "windows": 10,
            "optim": {"lr": 0.02, "reference_batch": None, "milestones": []},
            "detector": {"kind": "c4", "norm": "batch", "init": "dino"},
        },
        "fast-fpn": {"detector": {"kind": "fpn"}},
        "nano": {
            "batch_size": 4,
            "steps": 600,
            "windows": 6,
            "precise_bn": 20,
            "optim": {"lr": 0.04, "reference_batch": None, "warmup_steps": 10},
            "detector": {"kind": "nano", "init": "none"},
            "data": {
                "short_sides": [96, 112, 128], "max_side": 224, "test_short_side": 128,
            },
        },
    }  # fmt: skip
