"""Where the object starts: the patch with the fewest similar patches (LOST, section 3.2).

Objects are smaller than their surroundings, so a patch similar to few others likely lies on one.

Shape letters:  B images   N patches
"""

from torch import Tensor


def degree_order(degree_BN: Tensor, usable_BN: Tensor) -> Tensor:
    """Each patch's place when patches are sorted by degree: ``(B, N)`` int64, 0 is the seed.

    Ties go to the lower row-major index, on every device. Unusable patches (zero norm, NaN) come
    last: their degree of 0 says nothing, and the published code fails on them.
    """
    key_BN = degree_BN.masked_fill(~usable_BN, degree_BN.shape[1])
    return key_BN.argsort(dim=1, stable=True).argsort(dim=1)


def choose_seeds(place_BN: Tensor) -> Tensor:
    """``(B,)`` int64 row-major index of the first patch in degree order."""
    return place_BN.argmin(dim=1)
