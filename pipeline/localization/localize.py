"""One box per image from patch features, without labels or training: LOST and SoLOST.

LOST: Simeoni et al., "Localizing Objects with Self-Supervised Transformers and no Labels", BMVC
2021. SoLOST: a 2022 report that keeps a fraction of the seed's similar patches, not a fixed number.
Steps, each a file here: affinity (who is similar to whom), seeds (the patch with the fewest similar
ones), seed_expansion (which patches vote, THE RULE), components (the voted region around the seed).

Where the paper, its code and SoLOST disagree, docs/method.md says what is done here and why.

Shape letters:  B images   H, W grid rows and columns   N patches (H * W)   D channels
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from pipeline.config.labelling import Rule, Similarity
from pipeline.localization.affinity import compare, count_similar, similarity_to
from pipeline.localization.components import seed_component, tight_boxes
from pipeline.localization.seed_expansion import (
    OWN_SIMILARITY,
    choose_seeds,
    degree_order,
    expand,
)


@dataclass(frozen=True)
class Localization:
    """What was found in each image of a batch; nothing raises where nothing was."""

    boxes_B4: Tensor
    """int64 ``x0 y0 x1 y1`` in patches, x1 and y1 exclusive; zeros where nothing was found."""
    found_B: Tensor
    """bool: False where no patch can be a seed (all are zero or NaN)."""
    seed_B: Tensor
    """int64 row-major index of the seed patch; 0 where nothing was found."""
    degree_BN: Tensor
    """int64 number of *other* patches each patch is similar to."""
    mask_BHW: Tensor
    """bool: the patches voted for that connect to the seed."""
    score_B: Tensor
    """float32 in [0, 1]: mean cosine between the boxed component's patches and the summed vote of
    the patches that joined the seed, as fp32; 0 where nothing was found. A heuristic for sorting
    and filtering, not a probability (docs/log.md measures what it is worth)."""


@torch.inference_mode()
def localize(
    features_BHWD: Tensor,
    *,
    rule: Rule = "solost",
    similarity: Similarity | None = None,
    keep_fraction: float = 0.5,
    num_candidates: int = 100,
    affinity_memory_mib: int = 512,
) -> Localization:
    """Box the object in each image: ``(B, H, W, D)`` patch features -> ``Localization``.

    The same features give the same box alone or in any batch.

    Args:
        features_BHWD: float, rows first; computed on in fp32 on the device it is on.
        rule: which patches join the seed, see seed_expansion.py.
        similarity: how patches are compared; None is the rule's own (lost: dot, solost: cosine).
        keep_fraction: SoLOST's m, in (0, 1].
        num_candidates: LOST's k, at least 1.
        affinity_memory_mib: most memory the patch-by-patch products may take at once, in MiB.

    Raises:
        ValueError: an argument is outside its range, or the features are not 4-dimensional.
    """
    _check(features_BHWD, rule, keep_fraction, num_candidates, affinity_memory_mib)
    grid = features_BHWD.shape[1:3]
    compared = compare(features_BHWD.flatten(1, 2), similarity or OWN_SIMILARITY[rule])
    degree_BN = count_similar(
        compared.patch_BND, compared.usable_BN, memory_mib=affinity_memory_mib
    )
    place_BN = degree_order(degree_BN, compared.usable_BN)
    seed_B = choose_seeds(place_BN)
    similar_BN = similarity_to(compared, seed_B) > 0
    # The seed is similar to itself by definition, also where its squared norm underflows.
    similar_BN.scatter_(1, seed_B[:, None], True)
    similar_BN &= compared.usable_BN
    member_BN = expand(
        similar_BN, place_BN, rule, keep_fraction=keep_fraction, num_candidates=num_candidates
    )
    # M = A S summed over the voters S costs N*D in this order, not N*N (facts: equal to rounding).
    ballot_BD = torch.einsum("bn,bnd->bd", member_BN.float(), compared.voter_BND)
    vote_BN = torch.einsum("bnd,bd->bn", compared.patch_BND, ballot_BD)
    mask_BHW = seed_component((vote_BN > 0).reshape(-1, *grid), seed_B)
    found_B = mask_BHW.flatten(1).any(dim=1)
    return Localization(
        boxes_B4=tight_boxes(mask_BHW),
        found_B=found_B,
        seed_B=seed_B * found_B,
        degree_BN=degree_BN,
        mask_BHW=mask_BHW,
        score_B=_score(compared.patch_BND, vote_BN, ballot_BD, mask_BHW.flatten(1)),
    )


def _score(patch_BND: Tensor, vote_BN: Tensor, ballot_BD: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean cosine between the masked patches and the ballot: ``(B,)`` in [0, 1]."""
    norm_BN = patch_BND.norm(dim=-1) * ballot_BD.norm(dim=-1, keepdim=True)
    cosine_BN = vote_BN / norm_BN.masked_fill(norm_BN == 0, 1.0)
    mean_B: Tensor = (cosine_BN * mask_BN).sum(dim=1) / mask_BN.sum(dim=1).clamp(min=1)
    return mean_B.clamp(0, 1)


def _check(
    features: Tensor, rule: str, keep_fraction: float, num_candidates: int, memory_mib: int
) -> None:
    if features.ndim != 4 or 0 in features.shape[1:]:
        shape = tuple(features.shape)
        raise ValueError(f"features must be (B, H, W, D) with H, W, D at least 1, got {shape}")
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction must be in (0, 1], got {keep_fraction}")
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    if memory_mib < 1:
        raise ValueError(f"affinity_memory_mib must be at least 1, got {memory_mib}")
