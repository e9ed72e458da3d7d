"""The job that runs the rows of the papers' tables."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config.settings import Count, PositiveInt, Settings, TrackedSettings

TableScale = Literal["paper", "small"]
TableRecipe = Literal["sane", "reference", "paper"]
TableName = Literal[
    "drloc-2a",
    "drloc-2b",
    "drloc-3",
    "drloc-4",
    "drloc-5",
    "lost-1",
    "lost-3",
    "solost-4",
    "cad-5",
    "discovery",
]


class DataPlaces(Settings):
    """Where data lies; None is looked for below --data-root."""

    cifar10: str | None = None
    """CIFAR-10, as --data.root of train_classifier takes it: folder or archive."""

    cifar100: str | None = None
    """CIFAR-100."""

    svhn: str | None = None
    """SVHN."""

    flowers102: str | None = None
    """Oxford's 102 flowers."""

    flowers17: str | None = None
    """Oxford's 17 flowers, or other photos in folders of classes: for --scale small."""

    domainnet: str | None = None
    """DomainNet, all six domains."""

    imagenet: str | None = None
    """ImageNet-1K."""

    imagenet100: str | None = None
    """ImageNet-100, or ImageNet-1K, which it is picked out of."""

    voc07: str | None = None
    """VOC2007 (or a part of it): images/ or JPEGImages/, and instances.json or Annotations/."""

    voc12: str | None = None
    """VOC2012, likewise."""

    coco20k: str | None = None
    """COCO20k, likewise: its 19,817 images, with their instances.json."""

    kangaroo: str | None = None
    """Photos of one kind, likewise: for the table discovery at --scale small."""

    scenes: str | None = None
    """Procedural scenes, likewise, as `make demo` leaves them in demo/scenes."""


class ReproduceJob(TrackedSettings):
    """Run the rows of a paper's table, and put the paper's figures beside ours."""

    goes_on_with: ClassVar = "the same command"

    table: TableName
    """Which table: DRLoc's 2a, 2b, 3, 4, 5; LOST's 1, 3; SoLOST's 4; the detectors' (CAD) 5; every
    rule of ours beside them (discovery)."""

    rows: tuple[str, ...] = ()
    """Only these rows, by name or pattern ('m64', 'voc07-*'), and what they are compared with; none
    is all. --dry-run names them."""

    scale: TableScale = "paper"
    """The paper's networks and data, or narrow networks on small data, for a laptop's cores."""

    recipe: TableRecipe = "reference"
    """How DRLoc's rows are trained at --scale paper: as the released code, as the text, or by our
    default."""

    seeds: Annotated[int, Field(ge=1, le=100)] = 3
    """Runs of each row and of its baseline, with the seeds 0, 1, 2...; CorLoc has none."""

    output: str = "reproduction"
    """Folder of runs, tables of boxes, and reports; several tables may share it."""

    data_root: str | None = None
    """Folder in which data and weights are looked for by their usual names."""

    data: DataPlaces = DataPlaces()

    weights: tuple[str, ...] = ()
    """Files of weights as NAME=FILE, such as vit-s16=dino_deitsmall16_pretrain.pth."""

    fetch: bool = False
    """Let networks fetch published weights that are not at hand."""

    epochs: PositiveInt | None = None
    """Train only so many (detectors: ten steps each): to try the way. Reports say so."""

    num_images: PositiveInt | None = None
    """Photos of each set at most, the first by name: to try the way. Reports say so."""

    dry_run: bool = False
    """Tell the runs, and their hours where another seed was measured; start nothing."""

    num_parallel: PositiveInt = 1
    """Runs at a time, each a process with one thread."""

    num_workers: Count = 0
    """Ray Train workers of each training run; 0 trains in the run's own process."""

    use_gpu: bool = False
    """Give training a GPU: several runs at a time then want --num-workers 1 and a Ray cluster."""
