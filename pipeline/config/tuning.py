"""The job that searches the knobs of another job."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.settings import Count, PositiveInt, Seed, TrackedSettings

Searcher = Literal["random", "grid", "tpe"]
# pbt is one of them so that it can be refused with a reason.
Scheduler = Literal["none", "asha", "pbt"]

_OF_THE_SWEEP = ("base", "base_preset", "set", "labels_for", "ground_truth", "num_images",
                 "search", "scheduler", "grace_epochs", "reduction_factor", "seed")  # fmt: skip


class TuneJob(TrackedSettings):
    """Try settings of a training job, or of labelling, and say which did best."""

    goes_on_with: ClassVar = "the same command with --resume NAME"

    space: str
    """File of the search space, such as tune_spaces/drloc.py. It is Python, and is run."""

    base: str | None = None
    """YAML with the settings of the tuned job that stay as they are."""

    base_preset: str | None = None
    """Preset of the tuned job below those of --base."""

    set: tuple[str, ...] = ()
    """Single settings of the tuned job over those of --base: data.root=photos epochs=10."""

    labels_for: str | None = None
    """Localization: annotated images, as label_images takes them."""

    ground_truth: str | None = None
    """Localization: their boxes, a COCO file or a folder of VOC XML."""

    num_images: PositiveInt | None = None
    """Localization: the first so many of the annotated images; None is all."""

    name: str | None = None
    """Of the sweep and its folder; None is made of the space and a hash of the settings."""

    resume: str | None = None
    """Name of an interrupted sweep to go on with; finished trials are not repeated."""

    output: str = "sweeps"
    """Folder (or URI) of all sweeps. For several machines, on storage they all see."""

    search: Searcher = "random"
    """random; grid, the space's GRID; or tpe (Optuna), which learns from earlier trials."""

    num_samples: PositiveInt | None = None
    """Trials at most; None is 16 and, for a grid, all of its points."""

    scheduler: Scheduler = "none"
    """asha stops the trials that are behind after grace_epochs, and at multiples of it; pbt
    is not offered any more."""

    grace_epochs: PositiveInt = 1
    """Epochs before the first trial may be stopped."""

    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """asha: one in so many goes on at each halt."""

    max_concurrent: Count | None = None
    """Trials at a time; None is what the cluster has room for, 0 runs them one after another in
    this process, without Ray."""

    trial_workers: PositiveInt = 1
    """Ray Train workers of each trial; with 1 it trains in its own process."""

    trial_cpus: PositiveInt = 1
    """Cores (and torch threads) of each trial's worker."""

    trial_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of each trial's worker; with more than 0 it trains on the GPU."""

    trial_retries: Count = 0
    """How often a trial whose process died is started again, from its last checkpoint."""

    cache: str | None = None
    """Localization: local folder for the features, kept for other sweeps; None is the sweep's own,
    deleted at its end."""

    cache_precision: Literal["fp16", "fp32"] = "fp16"
    """Localization: fp32 gives the very boxes of label_images, in twice the space."""

    seed: Seed = 0
    """Of the search; the tuned job has its own."""

    @model_validator(mode="after")
    def _settings_agree(self) -> "TuneJob":
        if (self.labels_for is None) != (self.ground_truth is None):
            raise ValueError("--labels-for and --ground-truth belong together: give both")
        if self.scheduler == "pbt":
            raise ValueError(
                "--scheduler pbt, population based training, is not offered any more: asha stops "
                "the trials that are behind, none trains all to their end"
            )
        if self.scheduler == "asha" and self.max_concurrent == 0:
            raise ValueError(
                "--scheduler asha compares trials that run beside each other: give "
                "--max-concurrent at least 1"
            )
        if self.trial_workers > 1 and self.max_concurrent == 0:
            raise ValueError(
                "--trial-workers above 1 are Ray's: give --max-concurrent at least 1, or leave it "
                "out"
            )
        if self.trial_workers > 1 and self.trial_gpus not in (0, 1):
            raise ValueError(
                f"--trial-gpus must be 0 or 1 where trials have several workers, got "
                f"{self.trial_gpus:g}: each worker trains on a GPU of its own"
            )
        if self.resume and self.name:
            raise ValueError("--resume names the sweep: leave --name out")
        return self

    def what_decides_the_trials(self) -> dict[str, object]:
        """What a sweep is named by and what a resume keeps, as JSON values."""
        return self.model_dump(mode="json", include=set(_OF_THE_SWEEP))
