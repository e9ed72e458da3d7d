"""Which training images are kept back for validation, and which few are trained on.

Every image has a pseudo-random key made of the seed and its place in the sorted training set, in
integer arithmetic alone: the same split comes out on any machine and under any version of NumPy.
Within each class the images with the lowest keys go to validation and the next ones to training.
So few labels are nested (the 10 of a class are among its 20), and neither the number of labels nor
the number of workers changes the validation set.

To divide in another way: a function beside `carve` that returns two arrays of indices.

Shape letters:  N images   K classes
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config.classification import SplitConfig
from pipeline.errors import ConfigError, DataError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def carve(
    targets: NDArray[np.int64],
    classes: Sequence[str],
    config: SplitConfig,
    *,
    seed: int,
    has_validation: bool,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and indices to validate on, both ascending.

    A class gives ``round(validation_fraction * count)`` images to validation, but at least one and
    never its last; a class of a single image keeps it for training. With ``has_validation`` (there
    is a validation set already, or the test set takes its place) nothing is carved.

    Raises:
        ConfigError: a validation set must be carved and ``validation_fraction`` is 0.
        DataError: a class has fewer than ``train_per_class`` images left. (A class without any
            training image is let pass: there is no number that would suit it.)
    """
    count_K = np.bincount(targets, minlength=len(classes))
    held_K = np.zeros_like(count_K)
    if not has_validation:
        if config.validation_fraction == 0:
            raise ConfigError(
                "validation_fraction must be above 0, got 0, because the data has no validation "
                "split of its own: set select_on_test to choose the best epoch on the test set "
                "(as the paper does)"
            )
        wished_K = np.rint(config.validation_fraction * count_K).astype(np.int64)
        held_K = np.where(count_K > 1, np.clip(wished_K, 1, np.maximum(count_K - 1, 1)), 0)
    rank_N = rank_within_class(targets, len(classes), seed)
    is_held_N = rank_N < held_K[targets]
    is_taken_N = ~is_held_N
    if config.train_per_class is not None:
        _check_enough(count_K - held_K, classes, config.train_per_class)
        is_taken_N &= rank_N < held_K[targets] + config.train_per_class
    return np.flatnonzero(is_taken_N), np.flatnonzero(is_held_N)


def rank_within_class(targets: NDArray[np.int64], num_classes: int, seed: int) -> NDArray[np.int64]:
    """``(N,)``: the place of each image in its class' random order, from 0."""
    order_N = np.lexsort((_keys(len(targets), seed), targets))
    count_K = np.bincount(targets, minlength=num_classes)
    first_K = np.cumsum(count_K) - count_K
    rank_N = np.empty(len(targets), np.int64)
    rank_N[order_N] = np.arange(len(targets)) - first_K[targets[order_N]]
    return rank_N


def _check_enough(left_K: NDArray[np.int64], classes: Sequence[str], wanted: int) -> None:
    is_short_K = (left_K > 0) & (left_K < wanted)
    if is_short_K.any():
        scarcest = int(np.where(is_short_K, left_K, wanted).argmin())
        raise DataError(
            f"train_per_class must be at most {left_K[scarcest]}, the training images left in "
            f"class '{classes[scarcest]}' (the scarcest of {is_short_K.sum()} that are too small), "
            f"got {wanted}: lower train_per_class or validation_fraction"
        )


def _keys(count: int, seed: int) -> NDArray[np.uint64]:
    """``(N,)`` of the SplitMix64 generator, started at a hash of ``seed``."""
    start = _mix(np.array([seed], np.uint64) + _GOLDEN)
    return _mix(start + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every bit of the input moves half of the output's."""
    # Arrays of uint64 wrap around silently, which is the arithmetic meant.
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed
