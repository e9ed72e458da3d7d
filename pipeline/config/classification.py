"""The job that trains a classifier with DRLoc, its knobs in groups, and the job that compares runs.

The defaults are the ``sane`` recipe: native resolution, an annealed schedule, a batch that leaves
small data sets enough steps. The papers' rows and the published recipes are in presets.py.
"""

from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from pipeline.config.settings import (
    Below1,
    Count,
    Fraction,
    LoaderConfig,
    NonNegative,
    Normalization,
    Positive,
    PositiveInt,
    Probability,
    Settings,
    TrainingJob,
    flatten,
)
from pipeline.errors import one_line

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")

DataName = Literal[
    "imagenet",
    "imagenet100",
    "cifar10",
    "cifar100",
    "svhn",
    "flowers102",
    "domainnet-clipart",
    "domainnet-infograph",
    "domainnet-painting",
    "domainnet-quickdraw",
    "domainnet-real",
    "domainnet-sketch",
    "folder",
    "parquet",
]
Tap = Literal["pre_norm", "post_norm"]
"""Where the last grid is taken: as it leaves the last block, or after the network's final norm."""

DRLocMode = Literal["l1", "ce", "cbr"]
Normalize = Literal["none", "side", "side_minus_one"]
Reduction = Literal["mean", "paper"]
Pooling = Literal["none", "mean_2x2", "overlap_3x3"]
WeightSchedule = Literal["constant", "ramp", "ramp_decay"]
OptimizerKind = Literal["adamw", "sgd"]
Crop = Literal["random_resized", "pad"]


class SplitConfig(Settings):
    """How a training set is divided."""

    train_per_class: PositiveInt | None = None
    """Train on so many labelled images of each class only; None takes all."""

    validation_fraction: Below1 = 0.1
    """Part of the training images set apart to choose the best epoch; 0 only with
    --data.select-on-test."""

    select_on_test: bool = False
    """Choose the best epoch on the test set, as the paper did: its numbers are then optimistic."""


class DataConfig(SplitConfig, LoaderConfig):
    """Which labelled images, and which of them are looked at when."""

    name: DataName
    """A known data set (its sizes are checked), 'folder' (ImageFolder layout) or 'parquet' (bytes
    and label)."""

    root: str
    """Where its files lie; for several machines, on storage they all see."""

    download: bool = False
    """Fetch the files first, where torchvision can (cifar10, cifar100, svhn, flowers102)."""

    cache_mib: Count = 1024
    """Decoded images of one size are kept in memory if they take no more than this."""

    @model_validator(mode="after")
    def _something_selects(self) -> "DataConfig":
        if self.validation_fraction == 0 and not self.select_on_test:
            raise ValueError(
                "--data.validation-fraction must be above 0 or the best epoch chosen on the test "
                "set with --data.select-on-test, got 0"
            )
        return self


class ClassifierConfig(Settings):
    """Which network, and where its weights start."""

    name: str = "swin_tiny_patch4_window7_224"
    """Any timm classifier, or cvt_13, cvt_13_paper, t2t_vit_14."""

    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Side of the square the network sees; None is the data set's own (32 for CIFAR and SVHN)."""

    patch_size: PositiveInt | None = None
    """Stride of the first layer, the stem for small images; None is the architecture's own."""

    options: str = ""
    """Further arguments of the architecture, as YAML: '{embed_dim: 48, depths: [2, 2, 2]}'."""

    drop_path: Below1 = 0.1
    """Stochastic depth: the rate of the last block."""

    tap: Tap | None = None
    """Whether DRLoc sees the last tokens before or after the final norm; None is as released."""

    pretrained: bool = False
    """Fine-tune: start from the weights timm publishes under the name (give it with its tag)."""

    checkpoint: str | None = None
    """Fine-tune: start from this .safetensors or .pth file."""

    sync_batch_norm: bool = False
    """GPU only: batch statistics over all workers."""

    @field_validator("options")
    @classmethod
    def _options_are_a_mapping(cls, text: str) -> str:
        try:
            values = yaml.safe_load(text) if text.strip() else {}
        except yaml.YAMLError as fault:
            shown = one_line(fault)
            raise ValueError(f"options must be YAML such as '{{dim: 48}}' ({shown})") from None
        if not isinstance(values, dict):
            raise ValueError("options must be names and values, such as '{embed_dim: 48}'")
        return text

    def option_values(self) -> dict[str, Any]:
        """``options`` as a mapping."""
        values: dict[str, Any] = yaml.safe_load(self.options) if self.options.strip() else {}
        return values


class DRLocConfig(Settings):
    """Dense relative localization (Liu et al., NeurIPS 2021): beside the labels, guess offsets."""

    weight: NonNegative = 0.5
    """lambda; 0 is the paired baseline: same seeds, same data order, same augmentation. The paper:
    0.5 for Swin, 0.1 for CvT and T2T, with --drloc.reduction mean and --drloc.normalize none."""

    schedule: WeightSchedule = "ramp_decay"
    """lambda over the epochs: constant (the paper's text), or rising over ramp_epochs and then kept
    or falling to 0 at the schedule's end (the released code)."""

    ramp_epochs: Count | None = None
    """Epochs over which lambda rises from 0; None is as long as the learning rate's warm-up."""

    num_pairs: PositiveInt = 64
    """m: pairs of tokens drawn for each image."""

    mode: DRLocMode = "l1"
    """Regress the offset, classify it, or classify with a variance (L_drloc, L^ce, L^reg)."""

    signed: bool = False
    """Guess signed offsets instead of distances."""

    normalize: Normalize = "none"
    """Unit of the targets: cells (released code), grid sides (Eq. 1), or sides less one."""

    reduction: Reduction = "mean"
    """Mean over images, pairs and axes (released code), or Eq. 2: the axes summed. At the same
    lambda and normalize=side, 'paper' is 2/side of 'mean' with none."""

    pooling: Pooling = "mean_2x2"
    """What makes a grid coarse that has 14 cells or more on a side: 2 x 2 mean (the paper's text),
    or 3 x 3 with stride 2 (released code). Coarser grids stay as they are."""

    stages: tuple[int, ...] = (-1,)
    """Stages whose grids get a head; the paper's multi-scale variant takes all."""

    hidden_dim: PositiveInt = 512
    """Width of the MLP."""

    num_hidden: PositiveInt = 2
    """Hidden layers of the MLP."""


class OptimConfig(Settings):
    """How the weights move."""

    kind: OptimizerKind = "adamw"
    """AdamW, or SGD with plain (not Nesterov's) momentum."""

    lr: Positive = 5e-4
    """Peak learning rate for lr_batch images."""

    lr_batch: PositiveInt | None = 512
    """The batch that lr is meant for; it is scaled linearly to the real one. None: not scaled."""

    warmup_lr: NonNegative = 5e-7
    """Learning rate of the first step; scaled like lr."""

    min_lr: NonNegative = 5e-6
    """Learning rate at the cosine's end; scaled like lr."""

    warmup_epochs: NonNegative = 10.0
    """Epochs of linear warm-up."""

    one_step_late: bool = False
    """Set each learning rate one step late, as the released code (and Swin's) does."""

    cooldown_epochs: Count = 0
    """Last epochs at min_lr; they are part of --epochs."""

    weight_decay: NonNegative = 0.05
    """Not on biases, norms, positions and class tokens."""

    betas: tuple[Below1, Below1] = (0.9, 0.999)
    """AdamW's; SGD takes the first as its momentum."""

    clip: NonNegative = 5.0
    """Norm that the gradient of the whole batch is clipped to; 0 does not clip."""

    accumulate: PositiveInt = 1
    """Parts that each worker's share of a batch is computed in; the step is the same."""

    layer_decay: Fraction = 1.0
    """Fine-tuning: learning rate of each layer relative to the one above; 1 is off."""

    backbone_lr_ratio: Fraction = 1.0
    """Fine-tuning: learning rate of all but the classifier layer (T2T's transfer: 0.01)."""

    ema_decay: Below1 = 0.0
    """Average of the weights that is evaluated and exported in their place; 0 is off."""


class AugmentConfig(Settings):
    """What is done to an image on its way to the network."""

    crop: Crop | None = None
    """Random resized crops, or shifts by an eighth; None is shifts for 64 px and below."""

    min_scale: Fraction = 0.08
    """Smallest part of the image a random resized crop keeps."""

    hflip: Literal["unless_digits", "always", "never"] = "unless_digits"
    """Whether half of the images are mirrored; digits become others."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment; None is off."""

    color_jitter: NonNegative = 0.4
    """Only without rand_augment."""

    random_erasing: Probability = 0.25
    """Probability that a patch is replaced by noise."""

    mixup: NonNegative = 0.8
    """Mixup's alpha; 0 is off."""

    cutmix: NonNegative = 1.0
    """CutMix's alpha; 0 is off."""

    label_smoothing: Below1 = 0.1
    """Part of the target that is spread over all classes."""

    normalize: Normalization = "imagenet"
    """Input normalisation: ImageNet's mean and deviation, or 0.5 and 0.5."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all, which takes neighbours in pairs."""
        return self.mixup > 0 or self.cutmix > 0


class TrainClassifierJob(TrainingJob):
    """Train an image classifier, with DRLoc beside the cross-entropy."""

    kind: ClassVar = "classifier"

    places: ClassVar = {"data.root": "file or folder", "model.checkpoint": "file or folder"}

    data: DataConfig

    export: str | None = None
    """Also write model.safetensors, config.json and model.onnx here."""

    onnx: bool = True
    """Make the export hold an ONNX file, compared with the network before it is kept."""

    epochs: PositiveInt = 100
    """Passes over the training images."""

    stop_after: PositiveInt | None = None
    """Stop after so many epochs of the schedules (the released code: 101 of 300)."""

    channels_last: bool = False
    """Keep images as NHWC in memory."""

    model: ClassifierConfig = ClassifierConfig()
    drloc: DRLocConfig = DRLocConfig()
    optim: OptimConfig = OptimConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _settings_agree(self) -> "TrainClassifierJob":
        mixes = self.augment.mixes
        if mixes and self.batch_size % 2:
            raise ValueError(
                f"--batch-size must be even with mixup or cutmix, got {self.batch_size}"
            )
        parts = self.optim.accumulate
        why = f" ({'pairs for mixup, ' if mixes else ''}--optim.accumulate {parts} parts)"
        self.require_work_for_all(self.batch_size, parts * (2 if mixes else 1), why)
        if self.model.pretrained and self.model.checkpoint:
            raise ValueError(
                "--model.pretrained and --model.checkpoint contradict each other: give one of them"
            )
        self.require_agreeing_workers()
        if self.drloc.reduction == "paper" and self.drloc.mode != "l1":
            raise ValueError("--drloc.reduction paper is Eq. 2, which has --drloc.mode l1 only")
        if self.drloc.normalize != "none" and self.drloc.mode != "l1":
            raise ValueError("--drloc.mode ce and cbr count cells: --drloc.normalize must be none")
        if self.epochs < self.optim.warmup_epochs + self.optim.cooldown_epochs:
            raise ValueError(
                f"--epochs {self.epochs} are fewer than --optim.warmup-epochs "
                f"{self.optim.warmup_epochs:g} and --optim.cooldown-epochs "
                f"{self.optim.cooldown_epochs} together; give fewer of those"
            )
        return self

    @property
    def num_epochs(self) -> int:
        """Epochs that are really trained."""
        return min(self.epochs, self.stop_after or self.epochs)

    @property
    def slug(self) -> str:
        """Data, model, lambda and seed."""
        model = self.model.name.replace("/", "-").replace(":", "-")
        return f"{self.data.name}-{model}-drloc{self.drloc.weight:g}-seed{self.seed}"

    def what_decides_the_weights(self) -> dict[str, Any]:
        """See the base class."""
        named = ("data", "epochs", "stop_after", "batch_size", "seed", "precision")
        groups = self.model_dump(
            mode="json", include={*named, "model", "drloc", "optim", "augment"}
        )
        for name in ("download", "loader_workers", "cache_mib", "max_bad_fraction"):
            del groups["data"][name]
        if self.num_epochs == self.epochs:
            # A cut behind the end cuts nothing.
            groups["stop_after"] = None
        if self.data.name not in ("folder", "parquet"):
            # A known set is the same wherever it lies.
            del groups["data"]["root"]
        return flatten(groups)

    def what_pairs(self) -> dict[str, Any]:
        """What a run shares with its baseline and with its other seeds."""
        return {
            name: value
            for name, value in self.what_decides_the_weights().items()
            if name != "seed" and not name.startswith("drloc.")
        }


class CompareJob(Settings):
    """Compare runs with DRLoc to their paired baselines without, over seeds."""

    experiment: str | None = None
    """MLflow experiment that holds the runs."""

    runs: str | None = None
    """Folder of runs (--output of train_classifier), read instead of MLflow."""

    metric: str = "test/accuracy_selected"
    """What is compared: the test accuracy of the epoch chosen on validation images, or
    test/accuracy_last, val/accuracy_best, val/accuracy_last."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the interval of the paired difference."""

    output: str | None = None
    """Folder for table.md, table.csv, comparison.json and comparison.png."""

    tracking_uri: str | None = None
    """MLflow server or database; None is $MLFLOW_TRACKING_URI, else sqlite in ./mlflow.db."""

    debug: bool = False
    """Show tracebacks."""

    @model_validator(mode="after")
    def _one_source(self) -> "CompareJob":
        if (self.experiment is None) == (self.runs is None):
            raise ValueError("give --experiment NAME or --runs FOLDER, one of them")
        return self
