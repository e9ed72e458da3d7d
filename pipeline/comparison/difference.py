"""What a few paired differences say: their mean, how sure it is, and the words for it.

To judge by another test: add its number to ``Difference`` and to ``difference_of``, and use it in
``verdict_of``.

Shape letters:  S seeds present on both sides
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "no difference shown", "too few seeds"]

# Up to here all sign flips are gone through; with more seeds Student's interval says enough.
MOST_SEEDS_FLIPPED = 14
# Differences nearer to each other than this are one: accuracies are multiples of 1 / images.
_SAME = 1e-12


@dataclass(frozen=True)
class Difference:
    """Arm minus baseline over the paired seeds, in the metric's own unit.

    Attributes:
        mean: NaN without a seed.
        sd: with n - 1; None with fewer than two seeds.
        interval: Student's, n - 1 degrees of freedom; None where no spread can be told: fewer than
            two seeds, or differences that are all the same and not 0.
        p_student: two-sided, of the paired t-test; None as the interval.
        p_sign_flip: two-sided and exact, at least 2 / 2 ** n; None with fewer than two seeds or
            more than ``MOST_SEEDS_FLIPPED``.
    """

    mean: float
    sd: float | None = None
    interval: tuple[float, float] | None = None
    p_student: float | None = None
    p_sign_flip: float | None = None


def difference_of(baseline_S: Floats, treated_S: Floats, confidence: float) -> Difference:
    """The paired difference with what can be said about it from so many seeds."""
    difference_S = treated_S - baseline_S
    num_seeds = difference_S.size
    mean = float(difference_S.mean()) if num_seeds else math.nan
    if num_seeds < 2:
        return Difference(mean)
    sd, flips = float(difference_S.std(ddof=1)), sign_flip_p(difference_S)
    if np.ptp(difference_S) <= _SAME:
        if abs(mean) <= _SAME:
            return Difference(0.0, 0.0, (0.0, 0.0), 1.0, flips)
        return Difference(mean, 0.0, None, None, flips)
    error, freedom = sd / math.sqrt(num_seeds), num_seeds - 1
    reach = error * float(stats.t.ppf((1 + confidence) / 2, freedom))
    p_student = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Difference(mean, sd, (mean - reach, mean + reach), p_student, flips)


def sign_flip_p(difference_S: Floats) -> float | None:
    """Share of all ``2 ** S`` sign patterns whose mean is at least as far from 0 as the real one.

    None for more than ``MOST_SEEDS_FLIPPED`` seeds.
    """
    num_seeds = difference_S.size
    if num_seeds > MOST_SEEDS_FLIPPED:
        return None
    patterns = np.arange(2**num_seeds)[:, None] >> np.arange(num_seeds) & 1
    sums = np.abs((1 - 2 * patterns) @ difference_S)
    return float(np.mean(sums >= abs(difference_S.sum()) - _SAME))


def verdict_of(interval: tuple[float, float] | None, lower_is_better: bool) -> Verdict:
    """What may be said: nothing without an interval, and no difference where it holds 0."""
    if interval is None:
        return "too few seeds"
    if interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    return "better" if (interval[0] > 0) is not lower_is_better else "worse"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: each holds for all tests together."""
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
