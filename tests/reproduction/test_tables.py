"""The papers' rows: figures that agree with each other, and settings that the jobs accept."""

from itertools import product
from typing import get_args

import pytest

from pipeline.config import TrainClassifierJob, TrainDetectorJob
from pipeline.config.presets import merged, presets
from pipeline.config.reproduction import TableName
from pipeline.errors import ConfigError
from pipeline.reproduction import published_figures
from pipeline.reproduction.backbones import BACKBONES
from pipeline.reproduction.cells import BoxesRecipe, Cell, ClassifierRecipe, DetectorRecipe
from pipeline.reproduction.tables import TABLES, TableSize, chosen_cells

SIZES = [
    TableSize("small"),
    *(TableSize("paper", recipe) for recipe in ("sane", "reference", "paper")),
]


def cells_of(table: str, size: TableSize) -> dict[str, Cell]:
    return {cell.name: cell for cell in TABLES[table](size).cells}


def job_of(cell: Cell, seed: int = 0) -> TrainClassifierJob:
    assert isinstance(cell.recipe, ClassifierRecipe)
    values = merged(cell.recipe.values, {"data": {"root": "/data"}, "seed": seed})
    return TrainClassifierJob.model_validate(values)


def figure(table: str, row: str) -> float:
    told = cells_of(table, TableSize("paper"))[row].published
    assert told is not None
    return told.value


def test_the_job_names_exactly_these_tables() -> None:
    assert get_args(TableName) == tuple(TABLES)


@pytest.mark.parametrize(("table", "size"), product(TABLES, SIZES), ids=str)
def test_every_row_is_unique_and_stands_behind_what_it_is_compared_with(
    table: str, size: TableSize
) -> None:
    seen: set[str] = set()
    for cell in TABLES[table](size).cells:
        assert cell.name not in seen
        assert cell.base is None or cell.base in seen
        assert cell.published is None or cell.published.source
        seen.add(cell.name)


@pytest.mark.parametrize(("table", "size"), product(TABLES, SIZES), ids=str)
def test_every_row_is_a_job_that_its_script_accepts(table: str, size: TableSize) -> None:
    for cell in TABLES[table](size).cells:
        match cell.recipe:
            case ClassifierRecipe():
                job_of(cell)
            case BoxesRecipe(backbone=backbone):
                assert backbone in BACKBONES
            case DetectorRecipe(boxes=boxes, values=values):
                assert boxes.backbone in BACKBONES
                TrainDetectorJob.model_validate({**values, "labels": "/labels"})


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("table", [name for name in TABLES if name.startswith("drloc")])
def test_a_row_and_its_baseline_differ_in_nothing_but_drloc(table: str, size: TableSize) -> None:
    cells = cells_of(table, size)
    compared = [cell for cell in cells.values() if cell.base]
    assert compared
    for cell in compared:
        treated, baseline = job_of(cell, seed=2), job_of(cells[cell.base or ""], seed=2)
        assert treated.what_pairs() == baseline.what_pairs()
        assert (baseline.drloc.weight, treated.drloc.weight > 0) == (0, True)


def test_rows_turn_what_their_table_is_about() -> None:
    for size in SIZES:
        pairs = [job_of(cell).drloc.num_pairs for cell in cells_of("drloc-2a", size).values()]
        assert pairs[1:] == [32, 64, 128, 256]
        weights = [job_of(cell).drloc.weight for cell in cells_of("drloc-2b", size).values()]
        assert weights == [0, 0.1, 0.5, 1] * 3


def test_rows_at_the_papers_size_are_its_presets() -> None:
    known = presets()
    cells = cells_of("drloc-2a", TableSize("paper", "paper"))
    recipe = cells["m32"].recipe
    assert isinstance(recipe, ClassifierRecipe)
    assert recipe.values == known["paper-cifar100-swin-m32"]
    recipe = cells_of("drloc-3", TableSize("paper"))["cvt-300ep-drloc"].recipe
    assert isinstance(recipe, ClassifierRecipe)
    assert recipe.values == known["reference-imagenet100-cvt-300ep"]


def test_figures_that_several_tables_tell_are_the_same() -> None:
    assert figure("drloc-2a", "m64") == figure("drloc-2b", "swin-lambda0.5") == 66.23
    for model, weight in (("cvt", "0.1"), ("swin", "0.5"), ("t2t", "0.1")):
        base = figure("drloc-4", f"cifar100-{model}-base")
        assert base == figure("drloc-2b", f"{model}-lambda0")
        treated = figure("drloc-4", f"cifar100-{model}-drloc")
        assert treated == figure("drloc-2b", f"{model}-lambda{weight}")
    assert figure("lost-1", "voc12-lost") == figure("lost-3", "voc12-vit-s16") == 64.0
    assert published_figures.LOST_FEATURES["key"] == published_figures.LOST_ON_DINO[0]


def test_the_papers_own_gains() -> None:
    # The largest, the only loss, and the one of Table 3 that the first version of the paper tells.
    for table, row, gain in (
        ("drloc-4", "domainnet-quickdraw-swin", 45.33),
        ("drloc-4", "domainnet-sketch-resnet50", -0.46),
        ("drloc-3", "swin-100ep", 1.29),
        ("drloc-5", "domainnet-infograph-t2t", 7.16),
    ):
        found = figure(table, f"{row}-drloc") - figure(table, f"{row}-base")
        assert found == pytest.approx(gain, abs=1e-9)
    found = figure("solost-4", "voc12-vit-s8-solost") - figure("solost-4", "voc12-vit-s8-lost")
    assert found == pytest.approx(7.3)


def test_rows_are_chosen_by_pattern_with_what_they_are_compared_with() -> None:
    table = TABLES["drloc-2b"](TableSize("small"))
    names = [cell.name for cell in chosen_cells(table, ["t2t-lambda1", "swin-lambda0.?"])]
    assert names == [
        *("swin-lambda0", "swin-lambda0.1", "swin-lambda0.5", "t2t-lambda0", "t2t-lambda1"),
    ]
    assert chosen_cells(table, []) == table.cells
    with pytest.raises(ConfigError, match=r"--rows vit-\* is none of the table's: cvt-lambda0, "):
        chosen_cells(table, ["vit-*"])
