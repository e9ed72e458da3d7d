"""Accuracy and confusion are exact counts; a class without images is not at 0; pictures tell so."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from pipeline.classification import confusion as confusion_module
from pipeline.classification.confusion import Confusion, confusion_picture, count_confusion
from tests.drawing.drawn import last_figure, size_of, texts, titles

LABELS = st.integers(min_value=1, max_value=6).flatmap(
    lambda num_classes: st.tuples(
        st.just(num_classes),
        st.lists(
            st.tuples(st.integers(0, num_classes - 1), st.integers(0, num_classes - 1)), max_size=40
        ),
    )
)


def slow_counts(pairs: list[tuple[int, int]], num_classes: int) -> list[list[int]]:
    counts = [[0] * num_classes for _ in range(num_classes)]
    for true, predicted in pairs:
        counts[true][predicted] += 1
    return counts


def counted(pairs: list[tuple[int, int]], num_classes: int) -> torch.Tensor:
    labels_B2 = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return count_confusion(labels_B2[:, 0], labels_B2[:, 1], num_classes)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(LABELS)
def test_counts_equal_one_image_at_a_time(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    num_classes, pairs = drawn
    counts_KK = counted(pairs, num_classes)
    assert counts_KK.tolist() == slow_counts(pairs, num_classes)
    assert counts_KK.dtype == torch.int64


@settings(max_examples=60, derandomize=True, deadline=None)
@given(LABELS, st.integers(0, 40))
def test_the_counts_of_batches_add_up_to_those_of_the_set(
    drawn: tuple[int, list[tuple[int, int]]], cut: int
) -> None:
    num_classes, pairs = drawn
    parts = counted(pairs[:cut], num_classes) + counted(pairs[cut:], num_classes)
    assert torch.equal(parts, counted(pairs, num_classes))


def test_rows_are_the_true_classes() -> None:
    assert counted([(0, 2), (0, 2), (1, 1)], 3).tolist() == [[0, 0, 2], [0, 1, 0], [0, 0, 0]]


def test_accuracy_is_the_share_of_images_and_not_the_mean_of_classes() -> None:
    confusion = Confusion(np.array([[3, 0, 1], [0, 0, 0], [2, 0, 94]]))
    assert confusion.num_images == 100
    assert confusion.accuracy == 0.97
    shares = confusion.accuracy_per_class_K
    assert shares[0] == 0.75
    assert math.isnan(shares[1])
    assert shares[2] == pytest.approx(94 / 96)


def test_without_images_nothing_is_known() -> None:
    confusion = Confusion(np.zeros((2, 2), dtype=np.int64))
    assert math.isnan(confusion.accuracy)
    assert np.isnan(confusion.accuracy_per_class_K).all()


def test_counts_beyond_32_bits_stay_exact() -> None:
    many = 2**40 + 1
    confusion = Confusion(np.array([[many, 0], [0, many]]))
    assert confusion.num_images == 2 * many
    assert confusion.accuracy == 1.0


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Figure]:
    """The figure of the last picture, as matplotlib has it."""
    return last_figure(monkeypatch, confusion_module)


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


def test_few_classes_have_names_and_numbers(figure: Callable[[], Figure]) -> None:
    confusion_picture(confusion(3), names(3))
    (matrix, _) = figure().axes
    assert [label.get_text() for label in matrix.get_yticklabels()] == names(3)
    cells = {tuple(text.get_position()): text.get_text() for text in matrix.texts}
    # Column, row: six of ten are right, four taken for the next.
    assert cells == {(0, 0): "60", (1, 0): "40", (1, 1): "100", (2, 2): "100"}
    assert titles(figure()) == ["86.67 % of 30 images right"]


@pytest.mark.parametrize("num_classes", [30, 100, 1000])
def test_of_many_classes_the_worst_are_told(figure: Callable[[], Figure], num_classes: int) -> None:
    confusion_picture(confusion(num_classes, wrong=(7, 20)), names(num_classes))
    told = texts(figure())
    assert "40.0 %  kind 7 -> kind 20" in told
    assert "60.0 %  kind 7\n" in told
    assert told.count("->") == 1


def test_the_worst_pairs_are_by_share_and_not_by_number(figure: Callable[[], Figure]) -> None:
    counts_KK = 10 * np.eye(30, dtype=np.int64)
    # 2 of 4 are worse than 90 of 1,000.
    counts_KK[3, 3], counts_KK[3, 4] = 2, 2
    counts_KK[5, 5], counts_KK[5, 6] = 910, 90
    confusion_picture(Confusion(counts_KK), names(30))
    told = texts(figure())
    assert told.index("50.0 %  kind 3 -> kind 4") < told.index("9.0 %  kind 5 -> kind 6")


def test_merged_cells_hide_no_confusion(figure: Callable[[], Figure]) -> None:
    confusion_picture(confusion(1000, wrong=(7, 801)), names(1000))
    shown = np.asarray(figure().axes[0].images[0].get_array())
    assert shown.shape == (250, 250)
    assert shown[1, 200] == 40.0
    assert shown.diagonal().min() == 100.0
    assert (shown > 0).sum() == 251


def test_a_class_without_images_is_blank_and_not_zero(figure: Callable[[], Figure]) -> None:
    counts_KK = np.array([[3, 1], [0, 0]])
    size_of(confusion_picture(Confusion(counts_KK), names(2)))
    shown: Any = figure().axes[0].images[0].get_array()
    assert np.ma.getmaskarray(shown)[1].all() or np.isnan(np.asarray(shown)[1]).all()


def test_names_that_no_font_has_or_that_look_like_maths_do_no_harm(
    figure: Callable[[], Figure],
) -> None:
    odd = ["a $\\frac{1$ b", "猫", "", "line\nbreak", "x" * 200]
    size_of(confusion_picture(confusion(5), odd))
    shown = [label.get_text() for label in figure().axes[0].get_yticklabels()]
    assert shown == ["a $\\frac{1$ b", "class 1", "class 2", "line break", "x" * 21 + "..."]
