"""The knobs of labelling: from an image to its pseudo box, and what is done with the boxes."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.settings import (
    Fraction,
    Normalization,
    PositiveInt,
    Precision,
    Seed,
    Settings,
    TrackedSettings,
    flatten,
)

Feature = Literal["key", "query", "value"]
SeedRule = Literal["solost", "lost"]
Rule = Literal["solost", "lost", "ncut", "head"]
Similarity = Literal["cosine", "dot", "pearson"]
Difficult = Literal["drop", "ignore", "keep"]
Scores = Literal["table", "equal"]

Level = Annotated[int, Field(ge=0, le=255)]


class BackboneConfig(Settings):
    """Which network looks at the image, and which of its tensors are the patch features."""

    name: str = "vit_small_patch16_224.dino"
    """Any plain timm ViT; resnet50.dino, resnet50.tv_in1k, vgg16.tv_in1k; or LOST's own S/8,
    vit_small_patch8_224.dino_300ep."""

    checkpoint: str | None = None
    """Local .safetensors or .pth with the weights; without it they come from the hub by name."""

    feature: Feature | None = None
    """ViT only: the projection that is the patch feature. None is what suits the network: the key
    for DINO's, the value for supervised ones."""

    block: int | None = None
    """ViT only: which block, from 0; negative counts from the last. None is what suits the network:
    the last for DINO's, a middle one for supervised ones."""

    normalize: Normalization | None = None
    """Input normalisation: ImageNet's mean and deviation, or 0.5 and 0.5 (timm's augreg ViTs). None
    is what the published weights were trained with."""


class ResolvedBackbone(BackboneConfig):
    """A backbone with what its name stands for (models/backbones.py: with_recipe)."""

    feature: Feature = "key"
    block: int = -1
    normalize: Normalization = "imagenet"


class LocalizationConfig(Settings):
    """How patch features become boxes: LOST (BMVC 2021), SoLOST (2022), the cut, the head."""

    rule: Rule = "solost"
    """solost and lost grow a seed, ncut cuts the image in two, head applies what was learnt from
    the cuts of many images; see docs/method.md."""

    similarity: Similarity | None = None
    """How patches are compared; None is the rule's own (lost: dot, solost: cosine)."""

    keep_fraction: Fraction = 0.5
    """SoLOST's m: fraction of the patches similar to the seed that is kept, in (0, 1]."""

    num_candidates: PositiveInt = 100
    """LOST's k: only that many lowest-degree patches may join the seed."""

    affinity_memory_mib: PositiveInt = 512
    """Memory one batch's patch-by-patch products may take; above it they are computed in tiles."""

    cut_threshold: Annotated[float, Field(gt=-1, lt=1)] = 0.2
    """ncut (and what a head is fitted on): cosine above which two patches are similar."""

    head: str | None = None
    """head: folder that jobs/fit_head.py wrote; None fits one on a sample of the images first."""

    force_head: bool = False
    """head: use it also where it seems to ruin boxes; else the cut steps in."""

    max_objects: PositiveInt = 1
    """head: boxes of an image, at most; the other rules find one."""

    nms_iou: Fraction = 0.5
    """head, many boxes: of two that overlap more the worse is dropped. .5 gives the best AP50, .7
    the best recall."""

    min_score: float | None = None
    """Boxes with a lower score are left out; an image without any is no_object."""

    masks: bool = False
    """Keep each box's mask, at the resolution of patches."""

    refine_masks: bool = False
    """Keep masks, at the resolution of the image, fitted to its edges by a guided filter."""

    def arguments(self) -> dict[str, Any]:
        """The keywords of ``localize``, but for the head itself."""
        of_rows = {"max_objects", "nms_iou", "min_score", "masks", "refine_masks"}
        return self.model_dump(exclude=of_rows | {"head", "force_head"})

    def what_decides_the_boxes(self) -> dict[str, Any]:
        """Those that a resumed run must share: not what the rule has no use for."""
        of_rule = {"ncut": {"cut_threshold"}, "head": {"max_objects", "nms_iou"}}
        always = {"rule", "similarity", "keep_fraction", "num_candidates"}
        given = {
            name
            for name in ("min_score", "masks", "refine_masks")
            if getattr(self, name) != type(self).model_fields[name].default
        }
        return self.model_dump(include=always | of_rule.get(self.rule, set()) | given)


class ImagesConfig(Settings):
    """What is done to an image's bytes before the network sees pixels."""

    min_side: PositiveInt = 16
    """Images with a shorter side become rows with status skipped_too_small."""

    max_side: Annotated[int, Field(ge=64, le=16_384)] = 1024
    """Longer images are scaled down to this for the network; boxes stay in original pixels."""

    max_pixels: PositiveInt = 100_000_000
    """Pixels a decoder may unpack; more is refused from the header, before any decoding."""

    background: tuple[Level, Level, Level] = (255, 255, 255)
    """Colour put behind transparent pixels: red, green, blue from 0 to 255."""

    @model_validator(mode="after")
    def _sides_agree(self) -> "ImagesConfig":
        if self.min_side > self.max_side:
            raise ValueError(f"min_side must be at most max_side, {self.max_side}")
        return self


class ComputeConfig(Settings):
    """How the work is cut up and placed; none of it changes a box (but precision does)."""

    precision: Precision = "fp32"
    """Autocast of the forward pass; localization itself is always fp32."""

    batch_size: PositiveInt | None = None
    """Images per forward pass at most (they must share a patch grid); None is 32 on a GPU, and 4 on
    a CPU, whose caches hold no more."""

    block_size: PositiveInt = 64
    """Images per unit of work: what a kill can cost, and what is decoded in one go."""

    num_actors: Annotated[int, Field(ge=0)] | None = None
    """Labelling actors; None is one per GPU, or without GPUs one per cpus_per_actor cores; 0 works
    in this process, without Ray."""

    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    """GPUs each actor reserves; None is 1 where the cluster has GPUs and 0 elsewhere."""

    cpus_per_actor: PositiveInt = 1
    """Without GPUs: cores (and torch threads) of each actor."""

    wait: bool = False
    """Ask for more actors than the cluster has room for now; the autoscaler brings nodes."""


class BlockJob(TrackedSettings):
    """What the jobs share that go over a collection in blocks."""

    goes_on_with: ClassVar = "--resume"

    output: str
    """Folder (or URI) of what is made; must be new, unless --resume or --overwrite."""

    resume: bool = False
    """Continue an interrupted run of the same configuration."""

    overwrite: bool = False
    """Delete what the output holds from an earlier run, and start anew."""

    progress_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between progress lines where the output is not a terminal."""

    decode: ImagesConfig = ImagesConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _resume_or_overwrite(self) -> "BlockJob":
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other: give one of them")
        return self


class BulkJob(BlockJob):
    """What the jobs share that give every image of a collection one row of a table."""

    retry_failed: bool = False
    """With --resume: label again the rows whose status is error_*."""

    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """More failed inputs than this end the (complete) job with exit code 6."""

    @model_validator(mode="after")
    def _retries_what_is_there(self) -> "BulkJob":
        if self.retry_failed and not self.resume:
            raise ValueError("--retry-failed needs --resume: it goes over an earlier run's rows")
        return self


class LabelJob(BulkJob):
    """Give every image of a collection its pseudo boxes, and write them as Parquet."""

    places: ClassVar = {
        "images": "images",
        "backbone.checkpoint": "file or folder",
        "localization.head": "file or folder",
    }

    images: str
    """A folder, a glob, a .txt or .parquet list of URIs, or Parquet with image bytes; local paths,
    s3:// or gs://."""

    backbone: BackboneConfig = BackboneConfig()
    localization: LocalizationConfig = LocalizationConfig()

    @model_validator(mode="after")
    def _head_has_use(self) -> "LabelJob":
        if self.localization.head is not None and self.localization.rule != "head":
            raise ValueError("--localization.head needs --localization.rule head")
        return self

    def what_decides_the_boxes(
        self, weights_sha256: str, head_sha256: str | None = None
    ) -> dict[str, Any]:
        """The part of the configuration that a resumed run must share, as flat JSON values."""
        backbone = self.backbone.model_dump(mode="json", exclude={"checkpoint"})
        head = {} if head_sha256 is None else {"head_sha256": head_sha256}
        groups = {
            "images": self.images,
            "backbone": {**backbone, "weights_sha256": weights_sha256},
            "localization": self.localization.what_decides_the_boxes() | head,
            "decode": self.decode.model_dump(mode="json"),
            "precision": self.compute.precision,
        }
        return flatten(groups)


class FitHeadJob(BlockJob):
    """Fit a head that finds objects on the cuts of a sample of one's own images, without labels."""

    places: ClassVar = {"images": "images", "backbone.checkpoint": "file or folder"}

    images: str
    """A folder, a glob, a .txt or .parquet list of URIs, or Parquet with image bytes; local paths,
    s3:// or gs://."""

    num_images: Annotated[int, Field(ge=2)] = 500
    """Of the sample. They are drawn by a hash of their names: the same ones on any machine."""

    num_rounds: PositiveInt = 6
    """Fits: the first is of the cuts, each further one of what the head itself says."""

    cut_threshold: Annotated[float, Field(gt=-1, lt=1)] = 0.2
    """Of the cuts: cosine above which two patches are similar."""

    backbone: BackboneConfig = BackboneConfig()

    def what_decides_the_head(self, weights_sha256: str) -> dict[str, Any]:
        """The part of the configuration that a resumed run must share, as flat JSON values."""
        backbone = self.backbone.model_dump(mode="json", exclude={"checkpoint"})
        groups = {
            **{name: getattr(self, name) for name in ("images", "num_images", "num_rounds")},
            "cut_threshold": self.cut_threshold,
            "backbone": {**backbone, "weights_sha256": weights_sha256},
            "decode": self.decode.model_dump(mode="json"),
            "precision": self.compute.precision,
        }
        return flatten(groups)


class EvaluateJob(Settings):
    """Measure boxes against ground truth: CorLoc beside two trivial baselines, AP and recall."""

    labels: str
    """Pseudo-label table (folder), or a JSON file {file name: [x0, y0, x1, y1]}."""

    ground_truth: str
    """COCO JSON (crowd is nobody's object), or a folder of Pascal VOC XML files."""

    output: str | None = None
    """Folder (or URI) for evaluation.json, precision_recall.png, worst_cases.png, and, where scores
    could be probabilities, reliability.png."""

    coco_results: str | None = None
    """File for the boxes in COCO's results format."""

    ignore_difficult: bool = False
    """CorLoc: leave out objects marked difficult (the papers count them)."""

    difficult: Difficult = "drop"
    """AP: objects marked difficult are no objects (drop, as Detectron2 and LOST), count neither way
    (ignore, as the VOC devkit), or count like all others (keep)."""

    scores: Scores = "table"
    """AP: rank boxes by the table's scores, or take all as equally sure. In that case
    nothing is said of what scores are worth."""

    class_aware: bool = False
    """Match clusters with classes also where all labels are 1; done anyway where they are not."""

    num_resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000
    """Bootstrap resamples behind the 95 % intervals; of AP50 and AUROC at most 2000."""

    seed: Seed = 0
    """Seed of the bootstrap."""

    tracking_uri: str | None = None
    """MLflow server or database to record the numbers in; None records nothing."""

    experiment: str = "patchseed"
    """MLflow experiment the run belongs to."""

    run_name: str | None = None
    """MLflow run name; None is made of the labels' name."""

    debug: bool = False
    """Show tracebacks."""


class DrawJob(TrackedSettings):
    """Draw boxes, masks, seeds and what they came of on the images of a pseudo-label table."""

    labels: str
    """Pseudo-label table (folder)."""

    output: str
    """Folder for the pictures and the contact sheet."""

    num_images: PositiveInt = 50
    """How many images, spread evenly over the table."""

    checkpoint: str | None = None
    """Weights for the maps; None is what the table was made with. Without weights only boxes and
    seeds are drawn."""


class DemoJob(Settings):
    """Make sample scenes, label them, measure the boxes and draw them."""

    output: str = "demo"
    """Folder for everything the demo makes."""

    weights: str | None = None
    """Weights file of another ViT; None takes the small DINO network of this repository."""

    num_scenes: PositiveInt = 60
    """How many scenes."""

    seed: Seed = 0
    """Seed of the scenes."""

    debug: bool = False
    """Show tracebacks."""
