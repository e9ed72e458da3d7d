"""Where the object starts, and which patches join it: the one rule in which LOST and SoLOST differ.

The seed is the patch with the fewest similar patches (LOST, section 3.2): objects are smaller than
their surroundings, so a patch similar to few others likely lies on one.

To try a rule of your own: write a function beside ``expand_lost`` and ``expand_solost``, add a case
to ``expand``, a line to ``OWN_SIMILARITY`` and its name to ``SeedRule`` and
``Rule`` of config/labelling.py.

Shape letters:  B images   N patches
"""

from typing import assert_never

from torch import Tensor

from pipeline.config.labelling import SeedRule, Similarity

# What each method compares its patches by, where the user does not say (facts: the published code).
OWN_SIMILARITY: dict[SeedRule, Similarity] = {"lost": "dot", "solost": "cosine"}


def expand(
    similar_BN: Tensor,
    place_BN: Tensor,
    rule: SeedRule,
    *,
    keep_fraction: float,
    num_candidates: int,
) -> Tensor:
    """The patches that vote for the box under ``rule``: ``(B, N)`` bool."""
    match rule:
        case "lost":
            return expand_lost(similar_BN, place_BN, num_candidates=num_candidates)
        case "solost":
            return expand_solost(similar_BN, place_BN, keep_fraction=keep_fraction)
    assert_never(rule)


def expand_lost(similar_BN: Tensor, place_BN: Tensor, *, num_candidates: int) -> Tensor:
    """Those of the ``num_candidates`` lowest-degree patches that are similar to the seed.

    LOST, section 3.3, where the number is k = 100. It does not grow with the image.

    Args:
        similar_BN: True where a patch is similar to its image's seed.
        place_BN: each patch's place in ascending degree, as ``seeds.degree_order`` gives it.
        num_candidates: k, at least 1.
    """
    return similar_BN & (place_BN < num_candidates)


def expand_solost(similar_BN: Tensor, place_BN: Tensor, *, keep_fraction: float) -> Tensor:
    """The lowest-degree ``keep_fraction`` of the patches that are similar to the seed.

    SoLOST (m %). Unlike LOST the count follows the object: a big object keeps more patches. It is
    rounded down, but the seed always stays, where the published code fails.

    Args:
        similar_BN: True where a patch is similar to its image's seed, the seed included.
        place_BN: each patch's place in ascending degree.
        keep_fraction: m, in (0, 1].
    """
    # Patches not similar to the seed come last, whatever their degree.
    key_BN = place_BN.masked_fill(~similar_BN, similar_BN.shape[1])
    place_among_similar_BN = key_BN.argsort(dim=1, stable=True).argsort(dim=1)
    # float64, because the published code truncates a Python float.
    keep_B = (similar_BN.sum(dim=1).double() * keep_fraction).long().clamp(min=1)
    return similar_BN & (place_among_similar_BN < keep_B[:, None])


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
