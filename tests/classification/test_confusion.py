"""Accuracy and confusion are exact counts, and a class without images is no class at 0."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.classification.confusion import Confusion, count_confusion

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
