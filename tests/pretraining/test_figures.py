"""The pictures of a run show what was measured, and nothing else, for any number of classes."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.classification import confusion as confusion_module
from pipeline.classification.confusion import Confusion, confusion_picture
from pipeline.drawing import figures
from pipeline.runs import curves as curves_module
from pipeline.runs.curves import curves_picture

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
    seen: list[Figure] = []
    as_png = figures.png

    def keep(figure: Figure) -> bytes:
        seen.append(figure)
        return as_png(figure)

    for module in (curves_module, confusion_module):
        monkeypatch.setattr(module, "png", keep)
    return lambda: seen[-1]


def titles(figure: Figure) -> list[str]:
    return [title for axes in figure.axes if (title := axes.get_title(loc="left"))]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


def labels(figure: Figure) -> set[str]:
    found = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    return {label for of_axes in found for label in of_axes}


def curve(figure: Figure, title: str, label: str) -> tuple[list[float], list[float]]:
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left") == title)
    (line,) = (line for line in axes.lines if line.get_label() == label)
    x, y = line.get_data()
    return list(np.asarray(x, float)), list(np.asarray(y, float))


def size_of(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors() or ()) > 1, "the picture is blank"
        return picture.size


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


def confusion(num_classes: int, *, wrong: tuple[int, int] = (0, 1)) -> Confusion:
    """Ten images of each class, all right but 4 of one that are taken for another."""
    counts_KK = 10 * np.eye(num_classes, dtype=np.int64)
    counts_KK[wrong[0], wrong[0]] -= 4
    counts_KK[wrong] += 4
    return Confusion(counts_KK)


def names(num_classes: int) -> list[str]:
    return [f"kind {number}" for number in range(num_classes)]


@pytest.mark.parametrize("num_classes", [2, 10, 17, 100, 1000])
def test_any_number_of_classes_makes_a_picture(num_classes: int) -> None:
    width, height = size_of(confusion_picture(confusion(num_classes), names(num_classes)))
    assert width <= 2000
    assert height <= 1100


def test_few_classes_have_names_and_numbers(drawn: Callable[[], Figure]) -> None:
    confusion_picture(confusion(3), names(3))
    (matrix, _) = drawn().axes
    assert [label.get_text() for label in matrix.get_yticklabels()] == names(3)
    cells = {tuple(text.get_position()): text.get_text() for text in matrix.texts}
    # Column, row: six of ten are right, four taken for the next.
    assert cells == {(0, 0): "60", (1, 0): "40", (1, 1): "100", (2, 2): "100"}
    assert titles(drawn()) == ["86.67 % of 30 images right"]


@pytest.mark.parametrize("num_classes", [30, 100, 1000])
def test_of_many_classes_the_worst_are_told(drawn: Callable[[], Figure], num_classes: int) -> None:
    confusion_picture(confusion(num_classes, wrong=(7, 20)), names(num_classes))
    told = texts(drawn())
    assert "40.0 %  kind 7 -> kind 20" in told
    assert "60.0 %  kind 7\n" in told
    assert told.count("->") == 1


def test_the_worst_pairs_are_by_share_and_not_by_number(drawn: Callable[[], Figure]) -> None:
    counts_KK = 10 * np.eye(30, dtype=np.int64)
    # 2 of 4 are worse than 90 of 1,000.
    counts_KK[3, 3], counts_KK[3, 4] = 2, 2
    counts_KK[5, 5], counts_KK[5, 6] = 910, 90
    confusion_picture(Confusion(counts_KK), names(30))
    told = texts(drawn())
    assert told.index("50.0 %  kind 3 -> kind 4") < told.index("9.0 %  kind 5 -> kind 6")


def test_merged_cells_hide_no_confusion(drawn: Callable[[], Figure]) -> None:
    confusion_picture(confusion(1000, wrong=(7, 801)), names(1000))
    shown = np.asarray(drawn().axes[0].images[0].get_array())
    assert shown.shape == (250, 250)
    assert shown[1, 200] == 40.0
    assert shown.diagonal().min() == 100.0
    assert (shown > 0).sum() == 251


def test_a_class_without_images_is_blank_and_not_zero(drawn: Callable[[], Figure]) -> None:
    counts_KK = np.array([[3, 1], [0, 0]])
    size_of(confusion_picture(Confusion(counts_KK), names(2)))
    shown: Any = drawn().axes[0].images[0].get_array()
    assert np.ma.getmaskarray(shown)[1].all() or np.isnan(np.asarray(shown)[1]).all()


def test_names_that_no_font_has_or_that_look_like_maths_do_no_harm(
    drawn: Callable[[], Figure],
) -> None:
    odd = ["a $\\frac{1$ b", "猫", "", "line\nbreak", "x" * 200]
    size_of(confusion_picture(confusion(5), odd))
    shown = [label.get_text() for label in drawn().axes[0].get_yticklabels()]
    assert shown == ["a $\\frac{1$ b", "class 1", "class 2", "line break", "x" * 21 + "..."]
