"""How patches compare: who is similar to whom, and how many similar patches each has.

Two patches are similar when their product is strictly positive. The sign is always taken from the
un-normalised product: normalising turns an exact 0 into +-1e-9 noise. Normalisation only weighs the
votes (LOST section 3.2 against SoLOST), so it is kept apart as ``ComparedPatches.voter_BND``.

To add a similarity: write a function beside ``_dot``, ``_cosine`` and ``_pearson``, a case in
``compare``, and its name in ``Similarity`` of config/labelling.py.

Shape letters:  B images   N patches (H * W)   D channels   R rows of a tile
"""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from pipeline.config.labelling import Similarity

BYTES_PER_PRODUCT = 4
# Four bands skip 3/8 of the products; more of them save little and make the multiplications thin.
_BANDS = 4


@dataclass(frozen=True)
class ComparedPatches:
    """Patches made comparable: products of ``patch_BND`` give signs, ``voter_BND`` the votes."""

    patch_BND: Tensor
    voter_BND: Tensor
    usable_BN: Tensor
    """``(B, N)`` bool: False for zero norm, NaN or infinity; such a patch is similar to none."""


def compare(features_BND: Tensor, similarity: Similarity) -> ComparedPatches:
    """The features as fp32 vectors whose products mean ``similarity``.

    Raises:
        ValueError: there is no such similarity.
    """
    features_BND = features_BND.float()
    match similarity:
        case "dot":
            return _dot(features_BND)
        case "cosine":
            return _cosine(features_BND)
        case "pearson":
            return _pearson(features_BND)
    raise ValueError(
        f"similarity must be one of {', '.join(get_args(Similarity))}, got {similarity!r}"
    )


def _dot(features_BND: Tensor) -> ComparedPatches:
    """LOST, section 3.2: raw products."""
    norm_BN = features_BND.norm(dim=-1)
    usable_BN = (norm_BN > 0) & norm_BN.isfinite()
    # Zeroed, so that one NaN patch cannot reach others through a sum.
    patch_BND = torch.where(usable_BN[..., None], features_BND, 0.0)
    return ComparedPatches(patch_BND, patch_BND, usable_BN)


def _cosine(features_BND: Tensor) -> ComparedPatches:
    """SoLOST: the same signs, but every patch votes with the same weight."""
    compared = _dot(features_BND)
    norm_BN1 = compared.patch_BND.norm(dim=-1, keepdim=True)
    voter_BND = compared.patch_BND / norm_BN1.masked_fill(norm_BN1 == 0, 1.0)
    return ComparedPatches(compared.patch_BND, voter_BND, compared.usable_BN)


def _pearson(features_BND: Tensor) -> ComparedPatches:
    """SoLOST report, Table 3 (PCC): cosine of the patches centred over their channels."""
    return _cosine(features_BND - features_BND.mean(dim=-1, keepdim=True))


def count_similar(patch_BND: Tensor, usable_BN: Tensor, *, memory_mib: int) -> Tensor:
    """How many *other* patches each patch is similar to: its degree, ``(B, N)`` int64.

    The products are made in tiles of at most ``memory_mib`` MiB: bands of rows, from the diagonal
    on to the right, because what lies left of it has been seen in an earlier band as a column. A
    tile's height depends on N alone, never on the batch, so that an image gets the same products
    in any company.
    """
    batch, patches = usable_BN.shape
    budget = memory_mib * 2**20 // BYTES_PER_PRODUCT
    rows = max(1, min(math.ceil(patches / _BANDS), budget // patches))
    images = max(1, budget // (rows * patches))
    count_BN = torch.zeros(batch, patches, dtype=torch.int64, device=patch_BND.device)
    for first in range(0, batch, images):
        chunk_BND = patch_BND[first : first + images]
        chunk_count_BN = count_BN[first : first + images]
        for top in range(0, patches, rows):
            end = min(top + rows, patches)
            tile_BRN = chunk_BND[:, top:end] @ chunk_BND[:, top:].transpose(1, 2)
            # In place: 0.0 and 1.0, whose float sum is exact up to 2**24 patches.
            similar_BRN = tile_BRN.gt_(0)
            chunk_count_BN[:, top:end] += similar_BRN.sum(dim=2).long()
            chunk_count_BN[:, end:] += similar_BRN[:, :, end - top :].sum(dim=1).long()
    # A usable patch is similar to itself.
    return count_BN - usable_BN.long()


def similarity_to(compared: ComparedPatches, index_B: Tensor) -> Tensor:
    """The product of every patch with one patch per image, ``(B, N)``; its sign says similar."""
    rows_B1 = torch.arange(len(index_B), device=index_B.device)
    return torch.einsum("bnd,bd->bn", compared.patch_BND, compared.patch_BND[rows_B1, index_B])
