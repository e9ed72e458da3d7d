"""What all groups of knobs share (frozen, checked, no unknown names), and all training jobs."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["fp32", "bf16", "fp16"]
Normalization = Literal["imagenet", "half"]
"""ImageNet's mean and deviation, or 0.5 and 0.5 (timm's augreg ViTs)."""

Place = Literal["file or folder", "images", "weights"]
"""What a setting names: something that is there; a collection, as label_images takes it, or an
archive; weights, a file or the name they were published under."""

Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class Settings(BaseModel):
    """A frozen group of knobs; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    places: ClassVar[Mapping[str, Place]] = {}
    """The settings, by dotted names, that say what to read (data/places.py)."""


class TrackedSettings(Settings):
    """Where a job's run is recorded."""

    tracking_uri: str | None = None
    """MLflow server or database; None is $MLFLOW_TRACKING_URI, else sqlite in ./mlflow.db. 'off'
    records nothing."""

    experiment: str = "patchseed"
    """MLflow experiment the run belongs to."""

    run_name: str | None = None
    """MLflow run name; None is made of the method and the configuration's hash."""

    debug: bool = False
    """Show tracebacks and the logs of the libraries underneath."""


def flatten(groups: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as one level with dotted names: ``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in groups.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


class LoaderConfig(Settings):
    """How the batches of training come; nothing here changes a number."""

    loader_workers: Count | None = None
    """Processes per worker that decode and augment; 0 does it in the training process. None is 4,
    or as many as there are cores."""

    max_bad_fraction: Probability = 0.05
    """Unreadable images are replaced by others (of their class), and told; more than these end the
    run."""


class TrainingJob(TrackedSettings):
    """A run of the loop, in this process, under torchrun or in Ray Train's workers."""

    goes_on_with: ClassVar = "the same command"

    kind: ClassVar[str]
    """What such runs are called in summaries, in MLflow and in spaces of settings
    (runs/kinds.py)."""

    output: str = "runs"
    """Folder (or URI) of all runs; each has its own below it, named by what it is. For several
    machines, on storage they all see."""

    overwrite: bool = False
    """Delete what this very run has done so far; without it, it goes on or tells its result."""

    batch_size: PositiveInt = 256
    """Images per step over all workers together."""

    seed: Seed = 0
    """Of everything random: weights, order, augmentation."""

    num_workers: Count = 1
    """Ray Train workers; 0 trains in this process, without Ray."""

    min_workers: PositiveInt | None = None
    """Elastic: go on with as few as these while nodes are missing."""

    use_gpu: bool = False
    """Give each worker a GPU."""

    cpus_per_worker: PositiveInt = 1
    """Cores each worker reserves; without GPUs also its torch threads."""

    wait: bool = False
    """Ask for more workers than the cluster has room for now; the autoscaler brings nodes."""

    max_failures: Count = 3
    """How often workers may die before the job gives up."""

    timeout_s: Annotated[float, Field(ge=10)] = 1800.0
    """Seconds a worker waits for the others before it calls them lost."""

    precision: Precision = "fp32"
    """Autocast of the forward pass; fp16 scales the loss."""

    compile: bool = False
    """torch.compile the network."""

    gradient_norm_steps: Count = 100
    """Steps between measurements of each loss's gradient; 0 never."""

    detect_anomaly: bool = False
    """Slowly watch every gradient: a step that is not finite names its operation and images. For
    the same command as before, whose run diverged."""

    progress_seconds: Positive = 5.0
    """Seconds between progress lines where the output is not a terminal."""

    @property
    def num_epochs(self) -> int:
        """Epochs that are really trained."""
        raise NotImplementedError

    @property
    def slug(self) -> str:
        """The run in a few words; with a hash of what decides the weights, its folder's name."""
        raise NotImplementedError

    def what_decides_the_weights(self) -> dict[str, Any]:
        """The part of the configuration that a run is named and resumed by, as flat JSON values.

        How many workers share the work is left out: they change the sums' order, not the method.
        """
        raise NotImplementedError

    def require_agreeing_workers(self) -> None:
        """Raise ValueError unless the numbers of workers agree."""
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"--min-workers must be at most --num-workers, {self.num_workers}, "
                f"got {self.min_workers}"
            )

    def require_work_for_all(self, batch_size: int, least: int, why: str = "") -> None:
        """Raise ValueError unless a batch has ``least`` images for each worker."""
        workers = max(1, self.num_workers)
        if batch_size < workers * least:
            raise ValueError(
                f"--batch-size must be at least {workers * least}, {least} for each of {workers} "
                f"workers{why}, got {batch_size}; raise it, or give fewer --num-workers"
            )
