"""How well values tell hits from misses: the area under the ROC curve. No torch.

Shape letters:  D things that have a value   F groups that are ranked apart   G distinct values
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Hits = NDArray[np.bool_]
Groups = NDArray[np.int64]


def area_under_curve(value_D: Values, hit_D: Hits, apart_D: Groups | None = None) -> float:
    """How often a hit has a higher value than a miss, equal ones counting half; NaN without both.

    Mann and Whitney's U over the number of pairs.

    Args:
        value_D: higher should be a hit.
        hit_D: is one.
        apart_D: numbers from 0; pairs with different ones are not compared. None compares all.
    """
    return weighted_area_under_curve(value_D, hit_D, apart_D)(np.ones(len(value_D)))


def weighted_area_under_curve(
    value_D: Values, hit_D: Hits, apart_D: Groups | None = None
) -> Callable[[Values], float]:
    """A function from how often each is there, ``(D,)``, to the area; values are sorted once."""
    values_G, group_D = np.unique(value_D, return_inverse=True)
    cell_D = group_D if apart_D is None else group_D + apart_D * len(values_G)

    def area(count_D: Values) -> float:
        hits_FG = np.bincount(cell_D, count_D * hit_D, num_cells).reshape(-1, len(values_G))
        misses_FG = np.bincount(cell_D, count_D * ~hit_D, num_cells).reshape(-1, len(values_G))
        pairs = float(hits_FG.sum(axis=1) @ misses_FG.sum(axis=1))
        if not pairs:
            return float("nan")
        beaten_FG = np.cumsum(misses_FG, axis=1) - misses_FG / 2
        return float((hits_FG * beaten_FG).sum()) / pairs

    num_cells = len(values_G) * (1 if apart_D is None else int(apart_D.max(initial=0)) + 1)
    return area
