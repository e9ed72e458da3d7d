"""The curves of a run show what was measured, and nothing else."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.runs import curves
from pipeline.runs.curves import curves_picture
from tests.drawing.drawn import last_figure, size_of, titles

FLOOR = 1.347
DRLOC = ("DRLoc", "position error, cells")


def history(num_epochs: int, *, drloc: bool = True) -> list[dict[str, float]]:
    """Epochs as a run records them; the third is the best one."""
    entries = []
    for epoch in range(1, num_epochs + 1):
        entry = {
            "epoch": float(epoch),
            "train/loss": 2.0 / epoch,
            "train/cross_entropy": 1.5 / epoch,
            "train/images_per_second": 100.0,
            "val/accuracy": 0.9 if epoch == 3 else 0.5,
            "lr": 1e-3 / epoch,
            "grad_norm/total": 3.0,
            "seconds": 1.0,
        }
        if drloc:
            entry |= {
                "train/drloc": 1.0 / epoch,
                "train/drloc_weighted": 0.5 / epoch,
                "train/drloc_error_cells": 1.0 / epoch,
                "drloc/weight": 0.5,
                "grad_norm/drloc_weighted": 0.0 if epoch == 1 else 0.1,
            }
        entries.append(entry)
    return entries


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Figure]:
    """The figure of the last picture, as matplotlib has it."""
    return last_figure(monkeypatch, curves)


def labels(figure: Figure) -> set[str]:
    found = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    return {label for of_axes in found for label in of_axes}


def curve(figure: Figure, title: str, label: str) -> tuple[list[float], list[float]]:
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left") == title)
    (line,) = (line for line in axes.lines if line.get_label() == label)
    x, y = line.get_data()
    return list(np.asarray(x, float)), list(np.asarray(y, float))


def test_a_run_with_drloc_has_all_panels(drawn: Callable[[], Figure]) -> None:
    assert size_of(curves_picture(history(5), FLOOR)) == (2160, 960)
    assert titles(drawn()) == [
        "training loss",
        "validation accuracy",
        "DRLoc",
        "position error, cells",
        "learning rate",
        "gradient norms",
    ]
    told = {"raw", "times lambda", "lambda (right axis)", "head", "total", "cross-entropy"}
    assert told <= labels(drawn())


def test_a_baseline_has_no_panel_of_drloc(drawn: Callable[[], Figure]) -> None:
    size_of(curves_picture(history(5, drloc=False), None))
    assert not set(titles(drawn())) & set(DRLOC)
    assert len(titles(drawn())) == 4


def test_the_best_epoch_is_marked_and_of_equal_ones_the_first(drawn: Callable[[], Figure]) -> None:
    curves_picture(history(5), FLOOR)
    mark = "best: 90.00 % in epoch 3"
    assert curve(drawn(), "validation accuracy", mark) == ([3.0], [0.9])
    curves_picture(history(2), FLOOR)
    assert "best: 50.00 % in epoch 1" in labels(drawn())


def test_the_floor_is_a_line_at_its_height(drawn: Callable[[], Figure]) -> None:
    curves_picture(history(3), FLOOR)
    _, heights = curve(drawn(), "position error, cells", "best constant, 1.35")
    assert heights == [FLOOR, FLOOR]


def test_what_was_not_measured_or_is_not_finite_is_left_out(drawn: Callable[[], Figure]) -> None:
    entries = history(5)
    entries[1]["train/cross_entropy"] = math.nan
    entries[2]["train/cross_entropy"] = math.inf
    del entries[3]["train/cross_entropy"]
    size_of(curves_picture(entries, FLOOR))
    assert curve(drawn(), "training loss", "cross-entropy")[0] == [1.0, 5.0]


@pytest.mark.parametrize("num_epochs", [0, 1, 300])
def test_any_number_of_epochs_makes_a_picture(num_epochs: int) -> None:
    size_of(curves_picture(history(num_epochs), FLOOR))


def test_norms_of_zero_can_be_drawn_beside_others(drawn: Callable[[], Figure]) -> None:
    entries = history(4)
    entries[3]["grad_norm/drloc_weighted"] = 1e-4
    size_of(curves_picture(entries, FLOOR))
    assert curve(drawn(), "gradient norms", "DRLoc")[1] == [0.0, 0.1, 0.1, 1e-4]
