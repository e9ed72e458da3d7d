"""What scores are worth, in numbers: do they rank boxes, and are they the probabilities they seem?

Pure functions of a score for each box and whether the box is right. How well scores rank is the
area under the ROC curve (localization/ranking.py) with its interval, and the precision of the best
so many. Whether they are probabilities is the expected calibration error and the Brier score.

To add a number: a function here, a field of ``ScoreQuality`` and its line in report.py.

Shape letters:  D boxes of all images   K bins   R resamples   C coverages
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.corloc import Floats, interval_95

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

NUM_BINS = 10
"""Of equal width. Few boxes leave few in a bin, which alone makes an error: see docs/method.md."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """Boxes of like probability, bin by bin from 0 to 1.

    Attributes:
        count_K: boxes in the bin.
        mean_K: their mean probability; NaN in an empty bin.
        rate_K: the share of them that is right; NaN in an empty bin.
    """

    count_K: Ints
    mean_K: Floats
    rate_K: Floats

    @property
    def error(self) -> float:
        """Expected calibration error: how far the two are apart, on average over boxes."""
        apart_K = np.nan_to_num(np.abs(self.mean_K - self.rate_K))
        return float(apart_K @ self.count_K / self.count_K.sum())


def auroc_interval(
    area: Callable[[Floats], float], image_D: Ints, *, num_resamples: int, seed: int
) -> tuple[float, float] | None:
    """The middle 95 % of the area under the curve over resamples of the images.

    Args:
        area: from how often each box is there to the area (``weighted_area_under_curve``).
        image_D: whose box it is, any numbers; boxes of an image come and go together.
        num_resamples: how many.
        seed: of the draws.

    Returns:
        None where no resample has right boxes and wrong ones.
    """
    images, own_D = np.unique(image_D, return_inverse=True)
    if not len(images):
        return None
    rng = np.random.default_rng(seed)
    share = np.full(len(images), 1 / len(images))
    draws = (rng.multinomial(len(images), share) for _ in range(num_resamples))
    area_R = np.array([area(count_N[own_D].astype(np.float64)) for count_N in draws])
    known_R = area_R[~np.isnan(area_R)]
    return interval_95(known_R) if len(known_R) else None


def are_probabilities(score_D: Floats) -> bool:
    """Whether all of them could be: from 0 to 1, and there are some."""
    return bool(len(score_D) and ((score_D >= 0) & (score_D <= 1)).all())


def reliability(probability_D: Floats, hit_D: Bools, *, num_bins: int = NUM_BINS) -> Reliability:
    """Boxes by their probability, which must lie in [0, 1]; a bin's upper edge is of the next."""
    bin_D = np.minimum((probability_D * num_bins).astype(np.int64), num_bins - 1)
    count_K = np.bincount(bin_D, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_K = np.bincount(bin_D, probability_D, num_bins) / count_K
        rate_K = np.bincount(bin_D, hit_D, num_bins) / count_K
    return Reliability(count_K, mean_K, rate_K)


def brier_score(probability_D: Floats, hit_D: Bools) -> float:
    """Mean square of what the probabilities are off by: 0 knows all, 0.25 says always 0.5."""
    return float(np.mean((probability_D - hit_D) ** 2))


def precision_at_coverage(score_D: Floats, hit_D: Bools, coverages: Sequence[float]) -> Floats:
    """``(C,)`` the share of right ones among the best boxes, as many as each coverage says.

    Where boxes of equal score are kept in part, it is the mean over which of them.

    Args:
        score_D: higher is surer; at least one.
        hit_D: the box is right.
        coverages: shares of the boxes in (0, 1]; at least one box is kept.
    """
    _, group_D = np.unique(-score_D, return_inverse=True)
    boxes_G, hits_G = np.bincount(group_D), np.bincount(group_D, hit_D)
    kept_C = np.ceil(np.array(coverages) * len(score_D) - 1e-9)
    # Within a group of equals hits come evenly, so between groups' ends the line is straight.
    hits_C = np.interp(kept_C, [0, *np.cumsum(boxes_G)], [0, *np.cumsum(hits_G)])
    precision_C: Floats = hits_C / kept_C
    return precision_C
