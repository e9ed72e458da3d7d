"""The job that trains a vision transformer without labels (DINO)."""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

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

Temperature = Annotated[float, Field(gt=0, le=1)]


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"must be an ascending pair in (0, 1], got {pair}")
    return pair


Shares = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]
"""The least and the largest share of something."""


class ViTConfig(Settings):
    """Which network, and where its weights start."""

    name: str = "vit_small_patch16_224"
    """A plain timm ViT, or vit_nano_patch8 (2.7 M weights, for small images)."""

    drop_path: Below1 = 0.1
    """Stochastic depth of the student: the rate of the last block."""


class DINOConfig(Settings):
    """Self-distillation (Caron et al., ICCV 2021); the paper's defaults."""

    out_dim: PositiveInt = 65536
    """Prototypes: outputs of the projection head."""

    hidden_dim: PositiveInt = 2048
    """Width of the projection head."""

    bottleneck_dim: PositiveInt = 256
    """Width before its last layer."""

    norm_last_layer: bool = True
    """Keep the prototypes at length 1; off may help a ViT-S, and is less stable."""

    freeze_last_layer: Count = 1
    """Epochs in which the prototypes do not learn."""

    student_temp: Temperature = 0.1
    """Temperature of the student's softmax."""

    warmup_teacher_temp: Temperature = 0.04
    """Temperature of the teacher's softmax in the first epoch."""

    teacher_temp: Temperature = 0.04
    """Where it rises to; above .07 training is unstable."""

    warmup_teacher_temp_epochs: Count = 0
    """Over so many epochs (the paper: 30, to .07)."""

    teacher_momentum: Below1 = 0.996
    """How much of the teacher stays at each step; rises to 1 in a cosine."""

    center_momentum: Below1 = 0.9
    """How much of the centre of the teacher's outputs stays at each step."""


class CropsConfig(Settings):
    """The views of an image: two global ones, and local ones.

    What is a ``ClassVar`` is DINO's own and nobody's to set; a knob is made of it by leaving that
    word away.
    """

    num_local: Count = 8
    """Local views; the teacher sees the global ones alone."""

    global_size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Side of a global view in pixels."""

    local_size: Annotated[int, Field(ge=8, le=1024)] = 96
    """Side of a local view in pixels."""

    global_scale: Shares = (0.4, 1.0)
    """Share of the image that a global view shows, from and to."""

    local_scale: Shares = (0.05, 0.4)
    """Share of the image that a local view shows, from and to."""

    source_size: PositiveInt | None = None
    """Shorter side that images are brought to before views are cut; None is 8/7 of a global
    view's."""

    jitter_prob: Probability = 0.8
    """Probability that a view's colours are changed."""

    gray_prob: Probability = 0.2
    """Probability of a view without colours."""

    ratio: ClassVar[tuple[float, float]] = (3 / 4, 4 / 3)
    """Width divided by height of what a view shows, least and largest."""

    hflip: ClassVar[float] = 0.5
    """Probability of a mirrored view."""

    brightness: ClassVar[float] = 0.4
    """Factors lie in [1 - brightness, 1 + brightness]; contrast and saturation likewise."""

    contrast: ClassVar[float] = 0.4
    saturation: ClassVar[float] = 0.2

    hue: ClassVar[float] = 0.1
    """Hues turn by up to this share of the colour circle either way."""

    blur_prob: ClassVar[tuple[float, float, float]] = (1.0, 0.1, 0.5)
    """Of the first global view, the second, and each local one; ``solarize_prob`` likewise."""

    blur_sigma: ClassVar[tuple[float, float]] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view, least and largest."""

    solarize_prob: ClassVar[tuple[float, float, float]] = (0.0, 0.2, 0.0)

    mean: ClassVar[tuple[float, float, float]] = (0.485, 0.456, 0.406)
    std: ClassVar[tuple[float, float, float]] = (0.229, 0.224, 0.225)

    @property
    def source_side(self) -> int:
        """``source_size``, or what it stands for."""
        return self.source_size or round(self.global_size * 8 / 7)


class PretrainOptimConfig(Settings):
    """How the student's weights move."""

    lr: Positive = 5e-4
    """Peak learning rate for 256 images; it is scaled linearly to the real batch."""

    min_lr: NonNegative = 1e-6
    """Learning rate at the cosine's end."""

    warmup_epochs: NonNegative = 10.0
    """Epochs of linear warm-up."""

    weight_decay: NonNegative = 0.04
    """At the start; not on biases and norms."""

    weight_decay_end: NonNegative = 0.4
    """At the end of its cosine."""

    clip: NonNegative = 3.0
    """Norm that the gradient of the whole batch is clipped to; 0 does not clip."""

    accumulate: PositiveInt = 1
    """Parts that each worker's share of a batch is computed in; the step is the same."""


class ProbeConfig(Settings):
    """What is watched while training, where there are labels to watch with; it trains nothing."""

    images: str | None = None
    """Photos whose objects are known: CorLoc of SoLOST on the teacher's features."""

    ground_truth: str | None = None
    """Their boxes: a COCO file or a folder of VOC XML."""

    max_side: Annotated[int, Field(ge=16, le=16_384)] = 224
    """Longer side that those photos are brought to."""

    num_images: PositiveInt = 200
    """So many of them."""

    labelled: str | None = None
    """Class folders (train/ and test/, or an archive of them): accuracy of nearest neighbours."""

    every: PositiveInt = 5
    """Epochs between probes; the last one is always probed."""

    @model_validator(mode="after")
    def _boxes_belong_to_photos(self) -> "ProbeConfig":
        if (self.images is None) != (self.ground_truth is None):
            raise ValueError("--probe.images and --probe.ground-truth belong together: give both")
        return self


class PretrainDinoJob(LoaderConfig, TrainingJob):
    """Train a vision transformer on images without labels, by self-distillation (DINO)."""

    kind: ClassVar = "dino"

    places: ClassVar = {
        "images": "images",
        "init": "weights",
        "probe.images": "images",
        "probe.ground_truth": "file or folder",
        "probe.labelled": "file or folder",
    }

    images: tuple[str, ...]
    """Folders, globs, lists or tables as label_images takes them, or tar archives of images."""

    init: str | None = None
    """Start from these published weights (a timm name with its tag) or this file."""

    epochs: PositiveInt = 100
    """Passes over the images."""

    cache_mib: Count = 4096
    """Images are decoded once and kept in memory if they take no more than this."""

    gradient_norm_steps: Count = 0
    """Steps between measurements of the loss's gradient before clipping; 0 never."""

    half: bool = False
    """Write the teacher in 16-bit floats: half the size."""

    model: ViTConfig = ViTConfig()
    dino: DINOConfig = DINOConfig()
    crops: CropsConfig = CropsConfig()
    optim: PretrainOptimConfig = PretrainOptimConfig()
    probe: ProbeConfig = ProbeConfig()

    @model_validator(mode="after")
    def _settings_agree(self) -> "PretrainDinoJob":
        self.require_agreeing_workers()
        if self.epochs < self.optim.warmup_epochs:
            raise ValueError(
                f"--epochs {self.epochs} are fewer than --optim.warmup-epochs "
                f"{self.optim.warmup_epochs:g}; give fewer of those"
            )
        return self

    @property
    def num_epochs(self) -> int:
        """See the base class."""
        return self.epochs

    @property
    def slug(self) -> str:
        """Data, model and seed."""
        first = self.images[0].rstrip("/").rpartition("/")[2].split(".")[0]
        return f"dino-{first}-{self.model.name.replace('/', '-')}-seed{self.seed}"

    def what_decides_the_weights(self) -> dict[str, Any]:
        """See the base class."""
        named = {"images", "init", "epochs", "batch_size", "seed", "precision"}
        groups = {"model", "dino", "crops", "optim"}
        return flatten(self.model_dump(mode="json", include=named | groups))


def nano() -> dict[str, Any]:
    """A few million weights on images of 64 px: hours on a laptop's cores."""
    return {
        "epochs": 100,
        "batch_size": 128,
        "model": {"name": "vit_nano_patch8", "drop_path": 0.0},
        "dino": {"out_dim": 4096, "hidden_dim": 1024, "warmup_teacher_temp_epochs": 0},
        "crops": {"num_local": 4, "global_size": 64, "local_size": 32, "source_size": 64},
    }


def presets() -> dict[str, dict[str, Any]]:
    """Presets of pretrain_dino by name; ``paper`` is what the defaults are."""
    paper = {"epochs": 100, "batch_size": 1024}
    return {"paper": paper, "nano": nano()}
