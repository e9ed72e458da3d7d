"""The jobs that train a classifier with DRLoc and that compare such runs."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from pipeline.config.classifier_groups import (
    AugmentConfig,
    ClassifierConfig,
    DataConfig,
    DRLocConfig,
    OptimConfig,
)
from pipeline.config.settings import PositiveInt, Settings, flatten
from pipeline.config.training import TrainingJob


class TrainClassifierJob(TrainingJob):
    """Train an image classifier, with DRLoc beside the cross-entropy."""

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
        mixes = self.augment.mixup > 0 or self.augment.cutmix > 0
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
