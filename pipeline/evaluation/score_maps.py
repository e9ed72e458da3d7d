"""Scores -> the probability that a box is right, learnt from boxes of which it is known.

    logistic   1 / (1 + exp(-(bias + weights . columns))), of the score and what it rests on;
               no weight is negative
    isotonic   any curve that never falls, of the score alone

A map is a few numbers, so it can be written down beside the table that it made. How good it is only
images tell that it was not fitted on, so ``cross_validated`` keeps the boxes of an image together.

Shape letters:  D boxes of all images   C columns, of which the first is the score
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from pipeline.config.calibration import CalibrationMethod
from pipeline.evaluation.calibration import Bools, Ints
from pipeline.evaluation.corloc import Floats

NUM_FOLDS = 5


@dataclass(frozen=True)
class LogisticMap:
    """A weight of each column, none below 0, and a bias.

    Attributes:
        weights: of the columns.
        bias: beside them.
        log_above: the logarithm of the score is taken, of at least this; None takes it as it is.
    """

    weights: tuple[float, ...]
    bias: float
    log_above: float | None = None

    def __call__(self, columns_DC: Floats) -> Floats:
        """``(D,)`` probabilities."""
        seen_DC = _with_log(columns_DC, self.log_above)
        probability_D: Floats = expit(seen_DC @ np.array(self.weights) + self.bias)
        return probability_D

    def told(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class IsotonicMap:
    """Corners of the curve; between them it is straight, beyond them level."""

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __call__(self, columns_DC: Floats) -> Floats:
        """``(D,)`` probabilities, by the first column."""
        return np.interp(columns_DC[:, 0], self.scores, self.probabilities)

    def told(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


ScoreMap = LogisticMap | IsotonicMap


def fit_score_map(columns_DC: Floats, hit_D: Bools, method: CalibrationMethod) -> ScoreMap:
    """The map by that method; right boxes and wrong ones must both be there."""
    match method:
        case "logistic":
            return fit_logistic(columns_DC, hit_D)
        case "isotonic":
            return fit_isotonic(columns_DC[:, 0], hit_D)


def fit_logistic(columns_DC: Floats, hit_D: Bools) -> LogisticMap:
    """scikit-learn's logistic regression, with its ridge, on columns of deviation 1.

    Scores that go beyond 1 are sums rather than means, and their logarithm is taken (docs/log.md).
    Higher means surer in every column: what would get a negative weight, by the chance of few
    labels, is left out, and so is a column that never changes.
    """
    from sklearn.linear_model import LogisticRegression

    lowest, highest = columns_DC[:, 0].min(), columns_DC[:, 0].max()
    log_above = float(lowest) if lowest > 0 and highest > 1 else None
    seen_DC = _with_log(columns_DC, log_above)
    mean_C, deviation_C = seen_DC.mean(axis=0), seen_DC.std(axis=0)
    used_C = deviation_C > 0
    unit_DC = (seen_DC - mean_C) / np.where(used_C, deviation_C, 1)
    weight_C = np.zeros(len(mean_C))
    share = hit_D.mean()
    bias = float(np.log(share / (1 - share)))
    while used_C.any():
        fitted = LogisticRegression().fit(unit_DC[:, used_C], hit_D)
        if (fitted.coef_[0] >= 0).all():
            weight_C[used_C] = fitted.coef_[0] / deviation_C[used_C]
            bias = float(fitted.intercept_[0] - weight_C @ mean_C)
            break
        used_C[np.flatnonzero(used_C)[fitted.coef_[0].argmin()]] = False
    return LogisticMap(tuple(weight_C.tolist()), bias, log_above)


def _with_log(columns_DC: Floats, log_above: float | None) -> Floats:
    """The columns, with the logarithm of the first where it is to be taken."""
    if log_above is None:
        return columns_DC
    first_D = np.log(np.maximum(columns_DC[:, :1], log_above))
    return np.concatenate([first_D, columns_DC[:, 1:]], axis=1)


def fit_isotonic(score_D: Floats, hit_D: Bools) -> IsotonicMap:
    """scikit-learn's isotonic regression."""
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0, y_max=1).fit(score_D, hit_D)
    return IsotonicMap(tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()))


def cross_validated(
    columns_DC: Floats, hit_D: Bools, image_D: Ints, method: CalibrationMethod, *, seed: int
) -> tuple[Floats, Ints]:
    """``(D,)`` what each box gets from a map that was fitted on other images, and its fold.

    Boxes of different folds must not be ranked against each other: a fold that has got more right
    ones than its share has left less of them to its map, which then says less of all its boxes.
    Images are dealt to five folds at random. Where all boxes of the other folds are right, or all
    are wrong, a box gets their share of right ones, with one of each kind added.

    Args:
        columns_DC: of the boxes.
        hit_D: the box is right.
        image_D: whose box it is, any numbers, at least two different ones.
        method: how maps are fitted.
        seed: of the deal.
    """
    images, own_D = np.unique(image_D, return_inverse=True)
    fold_D = (np.random.default_rng(seed).permutation(len(images)) % NUM_FOLDS)[own_D]
    probability_D = np.zeros(len(hit_D))
    for fold in range(NUM_FOLDS):
        mine_D = fold_D == fold
        others_D = hit_D[~mine_D]
        if others_D.all() or not others_D.any():
            probability_D[mine_D] = (others_D.sum() + 1) / (len(others_D) + 2)
        else:
            fitted = fit_score_map(columns_DC[~mine_D], others_D, method)
            probability_D[mine_D] = fitted(columns_DC[mine_D])
    return probability_D, fold_D


def as_columns(score_D: Floats, evidence: Sequence[Floats]) -> Floats:
    """``(D, C)`` of the score and what it rests on."""
    return np.column_stack([score_D, *evidence])
