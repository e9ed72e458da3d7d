"""Where the object is, from patch features alone: no labels and, but for a head, no training.

LOST: Simeoni et al., "Localizing Objects with Self-Supervised Transformers and no Labels", BMVC
2021. SoLOST: a 2022 report that keeps a fraction of the seed's similar patches, not a fixed number.
Their steps, each a file here: affinity (who is similar to whom), seed_expansion (the seed, and
which patches vote with it, THE RULE), components (the voted region around the seed). The other
rules: cut (the two sides of an image), head (one linear map for all images of a collection),
objects (boxes of such a map).

Where the paper, its code and SoLOST disagree, docs/method.md says what is done here and why.

Shape letters:  B images   H, W grid rows and columns   N patches (H * W)   D channels
"""

from dataclasses import dataclass, replace
from typing import assert_never, get_args

import torch
from torch import Tensor

from pipeline.config.labelling import Rule, SeedRule, Similarity
from pipeline.localization.affinity import (
    ComparedPatches,
    compare,
    count_similar,
    similarity_to,
)
from pipeline.localization.components import seed_component, tight_boxes
from pipeline.localization.cut import normalized_cut
from pipeline.localization.head import Head
from pipeline.localization.objects import contrast, largest_object, steadiness
from pipeline.localization.seed_expansion import (
    OWN_SIMILARITY,
    choose_seeds,
    degree_order,
    expand,
)

# How far the level is moved to see whether a box stays: maps of heads lie within about -.5 and .5,
# those of cuts have mean square 1.
HEAD_NUDGE, CUT_NUDGE = 0.05, 0.4


@dataclass(frozen=True)
class Localization:
    """What was found in each image of a batch; nothing raises where nothing was."""

    boxes_B4: Tensor
    """int64 ``x0 y0 x1 y1`` in patches, x1 and y1 exclusive; zeros where nothing was found."""
    found_B: Tensor
    """bool: False where no patch can be a seed (all are zero or NaN), an image has no two sides, or
    no patch is an object's."""
    seed_B: Tensor
    """int64 row-major index of the seed patch, of a map its highest; 0 where nothing was found."""
    degree_BN: Tensor
    """int64 number of *other* patches each patch is similar to; zeros of a head, which compares
    none."""
    mask_BHW: Tensor
    """bool: the patches that are boxed, connected: of lost and solost with the seed."""
    score_B: Tensor
    """float32; 0 where nothing was found. Of lost and solost, in [0, 1]: mean cosine between the
    boxed component's patches and the summed vote of the patches that joined the seed. Of a map: the
    mean of contrast and agreement. A heuristic for sorting and filtering, not a probability
    (docs/log.md measures what it is worth)."""
    contrast_B: Tensor | None = None
    """float32: how much the box stands out of the map (objects.contrast); None without a map."""
    agreement_B: Tensor | None = None
    """float32 in [0, 1]: how little the box depends on the level (objects.steadiness)."""
    map_BHW: Tensor | None = None
    """float32: above 0 on objects, the higher the surer; None of lost and solost. Of a head, see
    objects.objects_at_levels for more than one box."""


@torch.inference_mode()
def localize(  # noqa: PLR0913 - the contract: plain arguments, each rule's own
    features_BHWD: Tensor,
    *,
    rule: Rule = "solost",
    similarity: Similarity | None = None,
    keep_fraction: float = 0.5,
    num_candidates: int = 100,
    affinity_memory_mib: int = 512,
    cut_threshold: float = 0.2,
    head: Head | None = None,
) -> Localization:
    """Box the object in each image: ``(B, H, W, D)`` patch features -> ``Localization``.

    The same features give the same box alone or in any batch.

    Args:
        features_BHWD: float, rows first; computed on in fp32 on the device it is on.
        rule: lost and solost grow a seed (seed_expansion.py), ncut cuts the image in two (cut.py),
            head finds what ``head`` was fitted to.
        similarity: how patches are compared; None is the rule's own (lost: dot, solost: cosine).
            No matter to ncut and head, whose patches have length 1.
        keep_fraction: SoLOST's m, in (0, 1].
        num_candidates: LOST's k, at least 1.
        affinity_memory_mib: most memory the patch-by-patch products may take at once, in MiB.
        cut_threshold: cosine above which ncut takes two patches for similar, in (-1, 1).
        head: of rule head, and of no other.

    Raises:
        ValueError: an argument is outside its range, or the features are not 4-dimensional.
    """
    _check(features_BHWD, rule, keep_fraction, num_candidates, affinity_memory_mib)
    if not -1 < cut_threshold < 1:
        raise ValueError(f"cut_threshold must be in (-1, 1), got {cut_threshold}")
    if (rule == "head") != (head is not None):
        raise ValueError(f"rule head needs a head, and no other takes one; got rule {rule!r}")
    grid = (features_BHWD.shape[1], features_BHWD.shape[2])
    features_BND = features_BHWD.flatten(1, 2)
    match rule:
        case "lost" | "solost":
            compared = compare(features_BND, similarity or OWN_SIMILARITY[rule])
            return _by_seed(
                compared,
                grid,
                rule,
                keep_fraction=keep_fraction,
                num_candidates=num_candidates,
                memory_mib=affinity_memory_mib,
            )
        case "ncut":
            compared = compare(features_BND, "cosine")
            cut = normalized_cut(
                compared.voter_BND,
                compared.usable_BN,
                threshold=cut_threshold,
                memory_mib=affinity_memory_mib,
            )
            side_BHW = cut.side_BN.reshape(-1, *grid)
            seed_B = cut.side_BN.argmax(dim=1)
            found = _boxed(side_BHW, seed_component(side_BHW > 0, seed_B), nudge=CUT_NUDGE)
            return replace(found, degree_BN=cut.degree_BN)
        case "head":
            assert head is not None
            compared = compare(features_BND, "cosine")
            z_BHW = head.map(compared.voter_BND, compared.usable_BN).reshape(-1, *grid)
            return _boxed(z_BHW, largest_object(z_BHW), nudge=HEAD_NUDGE)
    assert_never(rule)


def _by_seed(
    compared: ComparedPatches,
    grid: tuple[int, int],
    rule: SeedRule,
    *,
    keep_fraction: float,
    num_candidates: int,
    memory_mib: int,
) -> Localization:
    degree_BN = count_similar(compared.patch_BND, compared.usable_BN, memory_mib=memory_mib)
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


def _boxed(map_BHW: Tensor, mask_BHW: Tensor, *, nudge: float) -> Localization:
    """The box around each mask, which is a component of its map above 0."""
    boxes_B4 = tight_boxes(mask_BHW)
    found_B = mask_BHW.flatten(1).any(dim=1)
    contrast_B = contrast(map_BHW, torch.arange(len(map_BHW), device=map_BHW.device), boxes_B4)
    agreement_B = steadiness(map_BHW, boxes_B4, nudge)
    inside_BHW = map_BHW.masked_fill(~mask_BHW, -torch.inf)
    return Localization(
        boxes_B4=boxes_B4,
        found_B=found_B,
        seed_B=inside_BHW.flatten(1).argmax(dim=1) * found_B,
        degree_BN=torch.zeros_like(map_BHW.flatten(1), dtype=torch.int64),
        mask_BHW=mask_BHW,
        score_B=(contrast_B + agreement_B) / 2 * found_B,
        contrast_B=contrast_B * found_B,
        agreement_B=agreement_B * found_B,
        map_BHW=map_BHW,
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
