"""How sure an AP50 is: the bootstrap over images, without matching anything again.

A box is true or false by its own image alone, so drawing an image twice doubles its boxes and its
objects and changes no match. AP50 of a resample is then a weighted sum over the boxes sorted once:
equal to COCOeval's on the images drawn, and in microseconds per thousand boxes. (Only where boxes
of one image have equal scores, whose order means nothing: copies of a box stay together here, while
COCOeval goes through one copy of the image after the other.)

Shape letters:  N images   D boxes   P true boxes   Q recall points   R resamples
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.average_precision import Floats, Matches
from pipeline.evaluation.corloc import interval_95

# COCOeval's own: the last recall must come out as exactly 1.
_RECALLS_Q = np.linspace(0.0, 1.0, 101)

Weighted = Callable[[NDArray[np.integer]], float]


def weighted_ap50(matches: Matches) -> Weighted:
    """A function from how often each image is there, ``(N,)``, to the AP50 of that collection.

    It gives NaN where the images hold no object. With all ones it is COCOeval's AP50.
    """
    order_D = np.argsort(-matches.score_D, kind="stable")
    true_D = matches.true_D[order_D]
    # Nothing after the last true box moves an average precision: recall has ended there.
    last = int(np.flatnonzero(true_D)[-1]) + 1 if true_D.any() else 0
    image_D = matches.image_D[order_D][:last]
    at_P = np.flatnonzero(true_D[:last])
    image_P = image_D[at_P]

    def ap50(count_N: NDArray[np.integer]) -> float:
        num_objects = int(count_N @ matches.num_objects_N)
        if not num_objects:
            return float("nan")
        if not last:
            return 0.0
        boxes_P = np.cumsum(count_N[image_D])[at_P]
        true_P = np.cumsum(count_N[image_P])
        # As COCOeval adds it: precision 0 where no box has been drawn yet.
        precision_P = true_P / (boxes_P + np.spacing(1))
        envelope_P = np.maximum.accumulate(precision_P[::-1])[::-1]
        first_Q = np.searchsorted(true_P / num_objects, _RECALLS_Q, side="left")
        reached_Q = first_Q[first_Q < len(envelope_P)]
        return float(envelope_P[reached_Q].sum() / len(_RECALLS_Q))

    return ap50


def resampled_ap50(matches: Matches, *, num_resamples: int, rng: np.random.Generator) -> Floats:
    """``(R,)`` AP50 of resamples of the images with replacement; those without objects are NaN."""
    ap50 = weighted_ap50(matches)
    num_images = len(matches.num_objects_N)
    share_N = np.full(num_images, 1 / num_images)
    return np.array([ap50(rng.multinomial(num_images, share_N)) for _ in range(num_resamples)])


def ap50_interval(matches: Matches, *, num_resamples: int, seed: int) -> tuple[float, float] | None:
    """The middle 95 % of the resamples' AP50; None where there is no object."""
    if not len(matches.num_objects_N):
        return None
    rng = np.random.default_rng(seed)
    ap50_R = resampled_ap50(matches, num_resamples=num_resamples, rng=rng)
    known_R = ap50_R[~np.isnan(ap50_R)]
    return interval_95(known_R) if len(known_R) else None
