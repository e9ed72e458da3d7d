"""The normalised cut: the two sides of an image that its patches' likeness holds together least.

Shi and Malik, "Normalized Cuts and Image Segmentation", PAMI 2000, equation 11: the sides are read
off the second eigenvector of ``(D - A) v = lambda D v``. That is the second largest of the
symmetric ``S = D^-1/2 A D^-1/2``, whose largest is known: ``D^1/2 1``, of eigenvalue 1. So no dense
solver is needed: a few Lanczos steps orthogonal to the known one, for a whole batch at once, give
it well enough for boxes (docs/log.md: CorLoc by steps). The object is the side whose patches have
the lower mean degree, as LOST's seed is the patch of lowest degree.

``A`` is 1 where two patches' cosine exceeds ``threshold`` and ``FAINT`` elsewhere, so that a graph
in pieces still hangs together. Its faint part is of rank one, and never a matrix.

Shape letters:  B images   N patches   D channels   R rows of a tile   L Lanczos steps
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.localization.affinity import BYTES_PER_PRODUCT

FAINT = 1e-5
"""Affinity of patches that are not similar."""

NUM_STEPS = 8
"""More Lanczos steps than these move no box on photos worth speaking of (docs/log.md)."""

# A vector this much shorter than the one it was made of is rounding: there is nothing to divide.
_NOTHING = 1e-6
# Eigenvalues of S lie in [-1, 1]: a step that was not made must not be taken for the largest.
_BELOW_ALL = -2.0

Times = Callable[[Tensor], Tensor]
"""``(B, N)`` -> the sums over each patch's similar patches, ``(B, N)``."""


@dataclass(frozen=True)
class Cut:
    """Two sides of each image.

    Attributes:
        side_BN: float32 of mean 0 and mean square 1, positive on the object's side, the larger the
            surer; -1 where a patch is unusable; zeros where an image has no two sides.
        degree_BN: int64 number of *other* patches each patch is similar to.
    """

    side_BN: Tensor
    degree_BN: Tensor


def normalized_cut(
    unit_BND: Tensor,
    usable_BN: Tensor,
    *,
    threshold: float,
    memory_mib: int,
    num_steps: int = NUM_STEPS,
) -> Cut:
    """Cut each image in two; an image without two sides (all patches alike) gets zeros.

    Args:
        unit_BND: patches of length 1; zeros where unusable.
        usable_BN: False for patches that take no part.
        threshold: cosine above which two patches are similar.
        memory_mib: most memory that similarities may take at once. As many images as fit are cut
            together; those of an image that does not fit alone are computed anew at each step.
        num_steps: of Lanczos.
    """
    num_patches = unit_BND.shape[1]
    budget = memory_mib * 2**20 // BYTES_PER_PRODUCT
    images = max(1, budget // num_patches**2)
    rows = max(1, min(num_patches, budget // num_patches))
    cuts = [
        _cut(unit, usable, _similar_times(unit, usable, threshold, rows), num_steps)
        for unit, usable in zip(
            torch.split(unit_BND, images), torch.split(usable_BN, images), strict=True
        )
    ]
    return Cut(torch.cat([one.side_BN for one in cuts]), torch.cat([one.degree_BN for one in cuts]))


def _similar_times(unit_BND: Tensor, usable_BN: Tensor, threshold: float, rows: int) -> Times:
    """Multiplication with the 0/1 matrix of similar patches, itself made but once if it fits."""
    pairs_BN1 = usable_BN[..., None].float()

    def tile(top: int) -> Tensor:
        similar_BRN = unit_BND[:, top : top + rows] @ unit_BND.transpose(1, 2)
        similar_BRN = similar_BRN.gt_(threshold)
        # Of an unusable patch a negative threshold would make a friend of all.
        return similar_BRN.mul_(pairs_BN1[:, top : top + rows]).mul_(pairs_BN1.transpose(1, 2))

    whole = tile(0) if rows >= unit_BND.shape[1] else None

    def times(vector_BN: Tensor) -> Tensor:
        vector_BN1 = vector_BN[..., None]
        if whole is not None:
            return (whole @ vector_BN1)[..., 0]
        tops = range(0, unit_BND.shape[1], rows)
        return torch.cat([tile(top) @ vector_BN1 for top in tops], dim=1)[..., 0]

    return times


def _cut(unit_BND: Tensor, usable_BN: Tensor, similar_times: Times, num_steps: int) -> Cut:
    usable = usable_BN.float()
    count_BN = similar_times(usable)
    degree_BN = (1 - FAINT) * count_BN + FAINT * usable.sum(dim=1, keepdim=True)
    root_BN = degree_BN.sqrt() * usable
    inverse_BN = torch.where(usable_BN, degree_BN.rsqrt(), 0.0)
    known_BN = _unit(root_BN)

    def s_times(vector_BN: Tensor) -> Tensor:
        scaled_BN = inverse_BN * vector_BN
        similar_BN = (1 - FAINT) * similar_times(scaled_BN)
        return inverse_BN * (similar_BN + FAINT * scaled_BN.sum(dim=1, keepdim=True))

    # The degrees say most of what the cut will be. Where all are equal, the first patch's friends.
    by_degree_BN = _start(root_BN, count_BN, usable, known_BN)
    first_BN = torch.zeros_like(usable).scatter_(1, usable.argmax(dim=1, keepdim=True), 1.0)
    by_friends_BN = _start(root_BN, similar_times(first_BN * usable), usable, known_BN)
    has_degree_B1 = by_degree_BN.any(dim=1, keepdim=True)
    start_BN = torch.where(has_degree_B1, by_degree_BN, by_friends_BN)

    side_BN = inverse_BN * _largest_ritz_vector(s_times, start_BN, known_BN, num_steps)
    side_BN = _centred(side_BN, usable)
    # Nothing but rounding: all patches are alike.
    alive_B1 = start_BN.any(dim=1, keepdim=True) & (usable.sum(dim=1, keepdim=True) > 1)
    side_BN = _unit(side_BN * alive_B1) * usable.sum(dim=1, keepdim=True).sqrt()
    side_BN = side_BN * _sign_of_rarer_side(side_BN, degree_BN, usable)
    side_BN = torch.where(usable_BN | ~alive_B1, side_BN, -1.0)
    return Cut(side_BN, (count_BN - usable).long())


def _start(root_BN: Tensor, values_BN: Tensor, usable: Tensor, known_BN: Tensor) -> Tensor:
    """``D^1/2`` times the centred values, of length 1 and orthogonal to the known eigenvector."""
    return _unit_unless_rounding(
        _without(root_BN * _centred(values_BN, usable), known_BN[None]), (root_BN * values_BN)
    )


def _largest_ritz_vector(
    s_times: Times, start_BN: Tensor, known_BN: Tensor, num_steps: int
) -> Tensor:
    """Of S in the Krylov space of ``start_BN``, orthogonal to ``known_BN``; zeros for a zero start.

    Lanczos with full re-orthogonalisation; ``num_steps`` is cut at the number of patches.
    """
    batch, patches = start_BN.shape
    num_steps = max(1, min(num_steps, patches - 1))
    basis_LBN = torch.zeros(num_steps + 1, batch, patches, device=start_BN.device)
    basis_LBN[0] = known_BN
    diagonal_LB = torch.full((num_steps, batch), _BELOW_ALL, device=start_BN.device)
    beside_LB = torch.zeros(num_steps, batch, device=start_BN.device)
    vector_BN = start_BN
    for step in range(num_steps):
        basis_LBN[step + 1] = vector_BN
        image_BN = s_times(vector_BN)
        alive_B = vector_BN.any(dim=1)
        alpha_B = (image_BN * vector_BN).sum(dim=1)
        diagonal_LB[step] = torch.where(alive_B, alpha_B, _BELOW_ALL)
        rest_BN = _without(image_BN, basis_LBN[: step + 2])
        beside_LB[step] = rest_BN.norm(dim=1)
        vector_BN = _unit_unless_rounding(rest_BN, vector_BN)
        beside_LB[step] *= vector_BN.any(dim=1)
    tridiagonal_BLL = torch.diag_embed(diagonal_LB.T)
    for offset in (-1, 1):
        tridiagonal_BLL += torch.diag_embed(beside_LB[:-1].T, offset=offset)
    # Ascending; in double, as the matrix is small and the gap between its values may be too.
    _, vectors_BLL = torch.linalg.eigh(tridiagonal_BLL.double())
    return torch.einsum("lbn,bl->bn", basis_LBN[1:], vectors_BLL[:, :, -1].float())


def _without(vector_BN: Tensor, basis_LBN: Tensor) -> Tensor:
    """What is orthogonal to the basis; twice, because once leaves rounding of the whole length."""
    for _ in range(2):
        along_LB = (basis_LBN * vector_BN).sum(dim=2)
        vector_BN = vector_BN - (along_LB[..., None] * basis_LBN).sum(dim=0)
    return vector_BN


def _unit(vector_BN: Tensor) -> Tensor:
    norm_B1 = vector_BN.norm(dim=1, keepdim=True)
    unit_BN: Tensor = vector_BN / norm_B1.masked_fill(norm_B1 == 0, 1.0)
    return unit_BN


def _unit_unless_rounding(rest_BN: Tensor, whole_BN: Tensor) -> Tensor:
    """``rest_BN`` of length 1; zeros where it is nothing but the rounding of ``whole_BN``."""
    is_more_B1 = rest_BN.norm(dim=1, keepdim=True) > _NOTHING * whole_BN.norm(dim=1, keepdim=True)
    return _unit(rest_BN * is_more_B1)


def _centred(values_BN: Tensor, usable: Tensor) -> Tensor:
    """Minus their mean over usable patches; zero at the others."""
    mean_B1 = _mean_over(values_BN, usable)
    return (values_BN - mean_B1) * usable


def _sign_of_rarer_side(side_BN: Tensor, degree_BN: Tensor, usable: Tensor) -> Tensor:
    """``(B, 1)``: 1 where the positive side has the lower mean degree, else -1."""
    positive, negative = (side_BN > 0).float() * usable, (side_BN <= 0).float() * usable
    is_rarer_B1 = _mean_over(degree_BN, positive) <= _mean_over(degree_BN, negative)
    sign_B1: Tensor = 2.0 * is_rarer_B1 - 1.0
    return sign_B1


def _mean_over(values_BN: Tensor, weight: Tensor) -> Tensor:
    total_B1 = weight.sum(dim=1, keepdim=True).clamp(min=1)
    mean_B1: Tensor = (values_BN * weight).sum(dim=1, keepdim=True) / total_B1
    return mean_B1
