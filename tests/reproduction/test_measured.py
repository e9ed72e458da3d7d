"""A cell's figure and its gain, against arithmetic that is obviously right."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.reproduction.cells import (
    BoxesRecipe,
    Cell,
    ClassifierRecipe,
    DetectorRecipe,
    Metric,
    Run,
)
from pipeline.reproduction.inputs import Photos
from pipeline.reproduction.measured import difference, lines_of, measure
from pipeline.reproduction.plan import Plan, PlannedCell
from pipeline.reproduction.published_figures import Published
from pipeline.storage import Location
from tests.evaluation.annotated import truth
from tests.tables import label_row, write_table

CLASSIFIER = ClassifierRecipe("cifar10", {})


def trained(
    folder: Path, name: str, accuracies: dict[int, float], num_seeds: int = 3
) -> tuple[Run, ...]:
    """Runs of which those with an accuracy are finished."""
    runs = []
    for seed in range(num_seeds):
        place = folder / f"{name}-{seed}" / "summary.json"
        if seed in accuracies:
            place.parent.mkdir(parents=True)
            metrics = {"test/accuracy_selected": accuracies[seed]}
            place.write_text(json.dumps({"metrics": metrics}))
        result = Location.parse(str(place))
        runs.append(Run(f"{name}-{seed}", "train_classifier", {}, result))
    return tuple(runs)


def cell(name: str, base: str | None = None, value: float | None = None) -> Cell:
    figure = None if value is None else Published(value, "a paper")
    return Cell(name, name, figure, CLASSIFIER, base)


def test_a_gain_over_seeds_is_students_paired_one(tmp_path: Path) -> None:
    base = PlannedCell(cell("base", value=50), trained(tmp_path, "a", {0: 0.5, 1: 0.6, 2: 0.7}))
    arm = PlannedCell(cell("arm", "base", 60), trained(tmp_path, "b", {0: 0.52, 1: 0.61, 2: 0.73}))
    first, second = lines_of(Plan((base, arm), ()), {}, ["base", "arm"])
    assert first.measured is not None
    assert first.measured.value == pytest.approx(60)
    assert first.measured.spread == pytest.approx(10)
    assert first.gain is None
    assert second.published_gain == 10
    assert second.gain is not None
    assert second.gain.value == pytest.approx(2)
    # Student's t for two degrees of freedom, 4.302653, over the root of three.
    assert second.gain.interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert (second.gain.num_pairs, second.state) == (3, "ok")
    assert second.p_holm == second.gain.p


def test_only_seeds_that_both_have_are_paired(tmp_path: Path) -> None:
    base = PlannedCell(cell("base"), trained(tmp_path, "a", {0: 0.5, 1: 0.6}))
    arm = PlannedCell(cell("arm", "base"), trained(tmp_path, "b", {1: 0.7, 2: 0.9}))
    failed = {"b-0": "no memory"}
    first, second = lines_of(Plan((base, arm), ()), failed, ["arm"])
    assert second.gain is not None
    assert second.gain.value == pytest.approx(10)
    assert second.gain.interval is None
    assert second.state == "2 of 3 runs; failed: no memory"
    assert first.state == "2 of 3 runs; not asked for (--rows)"


def test_rows_without_a_result_are_marked_and_do_not_fail(tmp_path: Path) -> None:
    base = PlannedCell(cell("base"), missing="no data at hand")
    arm = PlannedCell(cell("arm", "base"), trained(tmp_path, "b", {0: 0.5}, num_seeds=1))
    first, second = lines_of(Plan((base, arm), ()), {}, ["base", "arm"])
    assert (first.measured, first.state) == (None, "no data at hand")
    assert (second.gain, second.state) == (None, "ok")
    (tmp_path / "b-0" / "summary.json").write_text("{")
    assert "cannot be read" in lines_of(Plan((base, arm), ()), {}, ["arm"])[1].state
    with pytest.raises(DataError, match="delete the run's folder to run it again"):
        measure(arm)


def labelled(folder: Path, hits: list[bool], **config: str) -> Run:
    """A table whose boxes meet the object of each photo, or do not."""
    rows = [
        label_row(
            f"{number}.jpg",
            width=100,
            height=100,
            boxes=[[0, 0, 10, 10] if hit else [50, 50, 60, 60]],
            scores=[0.5 + hit * number / 100],
            labels=[1],
        )
        for number, hit in enumerate(hits)
    ]
    place = write_table(folder, rows, config=config)
    return Run(folder.name, "label_images", {}, place.child("_MANIFEST.json"))


def photos(count: int) -> Photos:
    names = [f"{number}.jpg" for number in range(count)]
    return Photos(
        tuple(f"/photos/{name}" for name in names),
        tuple(truth([[0, 0, 10, 10]], name=name) for name in names),
    )


def test_corloc_and_its_gain_are_resampled_over_the_same_photos(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base_N, hits_N = rng.random(80) < 0.4, rng.random(80) < 0.6
    seen = photos(80)
    cells = [
        Cell(name, name, None, BoxesRecipe("voc07", "vit-s16"), metric="CorLoc") for name in "ab"
    ]
    sides = [
        measure(PlannedCell(one, (labelled(tmp_path / one.name, hits.tolist()),), seen))
        for one, hits in zip(cells, (base_N, hits_N), strict=True)
    ]
    base, arm = sides
    assert base is not None
    assert arm is not None
    assert arm.value == pytest.approx(100 * hits_N.mean())
    gain = difference(arm, base)
    assert gain is not None
    drawn = rng.integers(80, size=(20_000, 80))
    slow = 100 * (hits_N[drawn].mean(1) - base_N[drawn].mean(1))
    assert gain.value == pytest.approx(100 * (hits_N.mean() - base_N.mean()))
    assert gain.interval == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=1.3)
    assert (gain.num_pairs, gain.p) == (80, None)


def test_detections_are_measured_by_either_metric_for_each_seed(tmp_path: Path) -> None:
    seen = photos(4)
    runs = tuple(
        labelled(tmp_path / str(seed), hits)
        for seed, hits in enumerate([[True] * 4, [True, True, False, False]])
    )
    recipe = DetectorRecipe(BoxesRecipe("voc07", "vit-s16"), "test")
    corloc = measure(PlannedCell(Cell("c", "c", None, recipe, metric="CorLoc"), runs, seen))
    ap50 = measure(PlannedCell(Cell("a", "a", None, recipe, metric="AP50"), runs, seen))
    assert corloc is not None
    assert ap50 is not None
    assert corloc.by_seed == {0: 100, 1: 50}
    assert ap50.by_seed[0] == pytest.approx(100)
    assert 0 < ap50.by_seed[1] < 100


def test_tables_of_boxes_have_four_measures_and_a_difference_by_each(tmp_path: Path) -> None:
    seen = photos(6)
    base = labelled(tmp_path / "base", [True, False, False, False, False, False])
    arm = labelled(tmp_path / "arm", [False, True, True, True, False, False])
    recipe = BoxesRecipe("voc07", "vit-s16")
    metrics: tuple[Metric, ...] = ("CorLoc", "AP50", "AR@10", "AUROC")
    for metric in metrics:
        cells = [
            PlannedCell(
                Cell(f"{name}-{metric}", "", None, recipe, base=of, metric=metric), (run,), seen
            )
            for name, of, run in (("base", None, base), ("arm", f"base-{metric}", arm))
        ]
        first, second = lines_of(Plan(tuple(cells), ()), {}, [one.cell.name for one in cells])
        assert first.measured is not None
        assert second.measured is not None
        assert second.gain is not None
        assert second.gain.value == pytest.approx(second.measured.value - first.measured.value)
        if metric == "AUROC":
            # Right boxes score higher than wrong ones; the base's right one scores as all others.
            assert second.measured.value == pytest.approx(100)
            assert first.measured.value == pytest.approx(50)
        if metric == "AR@10":
            assert second.measured.value == pytest.approx(50)


def test_boxes_of_the_cut_in_the_place_of_a_refused_head_are_told(tmp_path: Path) -> None:
    run = labelled(tmp_path / "a", [True], **{"localization.head_refused": "too few images"})
    cell = Cell("a", "a", None, BoxesRecipe("voc07", "vit-s16", "head"), metric="CorLoc")
    (line,) = lines_of(Plan((PlannedCell(cell, (run,), photos(1)),), ()), {}, ["a"])
    assert line.state == "ok; the head was refused: the cut's boxes"
