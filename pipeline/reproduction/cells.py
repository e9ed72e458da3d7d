"""What a table is made of: cells, each a setting that is measured, with the paper's figure for it.

A cell names the one it is compared with, where there is one; what it takes to measure it is its
recipe, without the places of data and weights, which plan.py adds. A ``Run`` is a job with its
settings, and the file that says it is done.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.config.labelling import Feature, Rule, Similarity
from pipeline.reproduction.published_figures import Published
from pipeline.storage import Location

Values = dict[str, Any]
"""Nested values of a job's knobs."""

Metric = Literal["accuracy", "CorLoc", "AP50", "AR@10", "AUROC"]
"""AUROC is how well the scores of boxes tell right ones from wrong ones."""

Split = Literal["trainval", "test"]


@dataclass(frozen=True)
class ClassifierRecipe:
    """A training run of jobs/train_classifier.py for each seed."""

    data: str
    """Which data set, as ``places.DATA`` names it."""

    values: Values
    narrowed: bool = False
    """Whether the network is narrower than the one of its name: nobody publishes its weights."""

    starts_from: str | None = None
    """Weights to start from, as --weights names them; None is from scratch."""


@dataclass(frozen=True)
class BoxesRecipe:
    """One table of pseudo-boxes by jobs/label_images.py."""

    data: str
    backbone: str
    """As ``backbones.BACKBONES`` names it."""

    rule: Rule = "lost"
    similarity: Similarity | None = None
    feature: Feature | None = None
    """None is the backbone's own."""

    max_objects: int = 1
    """Of an image; more than one is found by rule head alone."""

    split: "Split | None" = None
    """None is what the papers take: trainval where the set is divided by lists, else all."""


@dataclass(frozen=True)
class DetectorRecipe:
    """Pseudo-boxes, a detector trained on them for each seed, and what it finds."""

    boxes: BoxesRecipe
    split: Split
    """The images it is measured on; it is trained on trainval."""

    values: Values = field(default_factory=dict)


Recipe = ClassifierRecipe | BoxesRecipe | DetectorRecipe


@dataclass(frozen=True)
class Cell:
    """One setting of a table.

    Attributes:
        name: unique in its table; --rows chooses by it.
        words: for people.
        published: the paper's figure; None where it tells none.
        recipe: how ours is made; None is shown, and never run.
        base: name of the cell it is compared with; None is itself what others are compared with.
        metric: what both figures are.
    """

    name: str
    words: str
    published: Published | None
    recipe: Recipe | None
    base: str | None = None
    metric: Metric = "accuracy"


@dataclass(frozen=True)
class Table:
    """A paper's table as cells.

    Attributes:
        title: for people.
        cells: in the paper's order; a cell's base comes before it.
        notes: what the reader has to know to compare.
    """

    title: str
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One job to be done.

    Attributes:
        name: of its settings and its log; equal runs have equal names.
        job: of which script, ``train_classifier``.
        values: its settings.
        result: the file that is there when it is done.
        after: names of the runs it needs the results of.
    """

    name: str
    job: str
    values: Values
    result: Location
    after: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        return self.result.kind() == "file"

    @property
    def folder(self) -> Location:
        """Where its results lie."""
        return replace(self.result, path=self.result.path.rpartition("/")[0])
