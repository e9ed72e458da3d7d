"""Dividing a training set: by class, the same everywhere, and few labels nested in more."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import DataConfig, TrainClassifierJob
from pipeline.config.classification import SplitConfig
from pipeline.data.splits import carve, rank_within_class
from pipeline.errors import ConfigError, DataError

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def slow_mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def slow_carve(
    targets: list[int], train_per_class: int | None, seed: int, held_of: dict[int, int]
) -> tuple[set[int], ...]:
    """One class at a time, Python integers only."""
    start = slow_mix((seed + GOLDEN) & MASK)
    train, validation = set(), set()
    for label in set(targets):
        mine = [index for index, other in enumerate(targets) if other == label]
        mine.sort(key=lambda index: slow_mix((start + (index + 1) * GOLDEN) & MASK))
        held, rest = mine[: held_of[label]], mine[held_of[label] :]
        validation.update(held)
        train.update(rest[:train_per_class])
    return train, validation


def divide(
    targets: list[int], seed: int = 0, *, has_validation: bool = False, **knobs: Any
) -> tuple[list[int], list[int]]:
    classes = [f"class {label}" for label in range(max(targets) + 1)]
    train, validation = carve(
        np.array(targets, np.int64),
        classes,
        SplitConfig.model_validate(knobs),
        seed=seed,
        has_validation=has_validation,
    )
    return train.tolist(), validation.tolist()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=80),
    st.floats(0.01, 0.9),
    st.integers(0, 2**40),
    st.sampled_from([None, 1]),
)
def test_carving_is_the_slow_loop(
    targets: list[int], fraction: float, seed: int, train_per_class: int | None
) -> None:
    counts = {label: targets.count(label) for label in set(targets)}
    held = {
        label: 0 if count == 1 else min(count - 1, max(1, round(fraction * count)))
        for label, count in counts.items()
    }
    train, validation = divide(
        targets, seed, validation_fraction=fraction, train_per_class=train_per_class
    )
    assert (set(train), set(validation)) == slow_carve(targets, train_per_class, seed, held)
    assert train == sorted(train)
    assert validation == sorted(validation)
    assert not set(train) & set(validation)


def test_the_split_is_this_one_on_every_machine() -> None:
    targets = [index % 3 for index in range(30)]
    assert divide(targets, seed=0)[1] == [12, 19, 26]
    assert divide(targets, seed=1)[1] == [2, 12, 19]


def test_every_class_gives_its_share() -> None:
    targets = [0] * 100 + [1] * 50 + [2] * 7 + [3] * 2 + [4]
    train, validation = divide(targets)
    assert np.bincount([targets[index] for index in validation]).tolist() == [10, 5, 1, 1]
    assert sorted(train + validation) == list(range(len(targets)))


def test_few_labels_are_nested_and_leave_validation_alone() -> None:
    targets = [index % 4 for index in range(400)]
    by_number = {count: divide(targets, train_per_class=count) for count in (1, 10, 20)}
    assert set(by_number[1][0]) < set(by_number[10][0]) < set(by_number[20][0])
    assert by_number[10][1] == by_number[20][1] == divide(targets)[1]
    assert np.bincount([targets[index] for index in by_number[10][0]]).tolist() == [10] * 4


def test_existing_validation_images_cost_no_training_images() -> None:
    targets = [index % 4 for index in range(400)]
    nothing_held = {"validation_fraction": 0, "select_on_test": True}
    ten, nothing = divide(targets, train_per_class=10, has_validation=True, **nothing_held)
    assert not nothing
    assert len(ten) == 40
    assert len(divide(targets, has_validation=True, **nothing_held)[0]) == 400


def test_seeds_give_different_splits_of_any_size() -> None:
    targets = [0] * 1000
    splits = [set(divide(targets, seed, validation_fraction=0.5)[1]) for seed in range(20)]
    for one, other in pairwise(splits):
        # 250 expected, standard deviation 8.
        assert 200 < len(one & other) < 300


def test_order_within_a_class_is_uniform() -> None:
    targets = np.zeros(10, np.int64)
    ranks = np.array([rank_within_class(targets, 1, seed) for seed in range(4000)])
    # The mean of 4000 uniform ranks of 0..9: 4.5, standard deviation 0.045.
    assert np.abs(ranks.mean(axis=0) - 4.5).max() < 0.2


def test_too_few_images_of_a_class_names_the_scarcest() -> None:
    targets = [0] * 100 + [1] * 10 + [2] * 5
    with pytest.raises(DataError, match=r"at most 4, .* in class 'class 2' .*of 2 .*got 20"):
        divide(targets, train_per_class=20)


def test_class_without_training_images_is_let_pass() -> None:
    train, validation = divide([0] * 10 + [2] * 10, train_per_class=5)
    assert (len(train), len(validation)) == (10, 2)


def test_nothing_to_validate_on_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"above 0, got 0, .*set select_on_test"):
        divide([0, 1] * 10, validation_fraction=0)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction\n.*less than 1"),
        ({"validation_fraction": -0.1}, "validation_fraction\n.*greater than or equal to 0"),
        ({"validation_fraction": float("nan")}, "validation_fraction\n"),
        ({"train_per_class": 0}, "train_per_class\n.*greater than or equal to 1"),
    ],
)
def test_values_out_of_range_are_refused(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SplitConfig.model_validate(knobs)


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_seeds_that_no_generator_takes_are_refused(seed: int) -> None:
    with pytest.raises(ValidationError, match="seed"):
        TrainClassifierJob(data=DataConfig(name="folder", root="-"), seed=seed)
