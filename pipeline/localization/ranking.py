"""How well values tell hits from misses: the area under the ROC curve. No torch.

Shape letters:  D things that have a value   G distinct values
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Hits = NDArray[np.bool_]


def area_under_curve(value_D: Values, hit_D: Hits) -> float:
    """How often a hit has a higher value than a miss, equal ones counting half; NaN without both.

    Mann and Whitney's U over the number of pairs.
    """
    return weighted_area_under_curve(value_D, hit_D)(np.ones(len(value_D)))


def weighted_area_under_curve(value_D: Values, hit_D: Hits) -> Callable[[Values], float]:
    """A function from how often each is there, ``(D,)``, to the area; values are sorted once."""
    _, group_D = np.unique(value_D, return_inverse=True)

    def area(count_D: Values) -> float:
        hits_G = np.bincount(group_D, count_D * hit_D)
        misses_G = np.bincount(group_D, count_D * ~hit_D)
        pairs = float(hits_G.sum() * misses_G.sum())
        if not pairs:
            return float("nan")
        beaten_G = np.cumsum(misses_G) - misses_G / 2
        return float(hits_G @ beaten_G) / pairs

    return area
