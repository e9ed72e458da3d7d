"""Which two cells of a grid are compared, and how far apart they lie.

Liu et al., "Efficient Training of Visual Transformers with Small Datasets", NeurIPS 2021: both
cells of a pair are drawn uniformly and independently, so a pair may join a cell with itself.
Pairs come from a generator of their own: switching the loss on moves no other random number.

To draw pairs in another way: write a function beside ``sample_pairs`` that returns ``pairs_BM22``.
To measure targets in another unit: a case in ``cells_per_unit`` and a name in ``Normalize``.

Shape letters:  B images   M pairs of an image   22 (first or second cell) x (row, column)
"""

import hashlib

import torch
from torch import Tensor

from pipeline.config.classification import Normalize


def pair_generator(seed: int, rank: int, step: int, device: torch.device | str) -> torch.Generator:
    """The generator, on ``device``, from which worker ``rank`` draws the pairs of step ``step``.

    The three numbers are hashed, so the streams of neighbouring steps and ranks are unrelated, and
    a resumed run draws what an uninterrupted one would have drawn without any saved state.
    """
    digest = hashlib.blake2b(f"drloc pairs {seed} {rank} {step}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def sample_pairs(
    batch: int, num_pairs: int, height: int, width: int, *, generator: torch.Generator
) -> Tensor:
    """Uniform pairs of cells, with replacement: ``(B, M, 2, 2)`` int64 on the generator's device.

    ``[..., 0, :]`` is ``(row, column)`` of the first cell, ``[..., 1, :]`` of the second.

    Raises:
        ValueError: ``num_pairs`` is below 1, or a side of the grid is below 2.
    """
    check_grid(height, width)
    if num_pairs < 1:
        raise ValueError(f"num_pairs must be at least 1, got {num_pairs}")
    ends = (batch, num_pairs, 2)
    rows_BM2 = torch.randint(height, ends, generator=generator, device=generator.device)
    columns_BM2 = torch.randint(width, ends, generator=generator, device=generator.device)
    return torch.stack([rows_BM2, columns_BM2], dim=-1)


def all_pairs(
    batch: int, height: int, width: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Every ordered pair of cells once: ``(B, M, 2, 2)`` int64 with ``M = (height * width) ** 2``.

    A loss over these is the exact expectation of the loss over sampled pairs.

    Raises:
        ValueError: a side of the grid is below 2.
    """
    check_grid(height, width)
    cell_N2 = torch.cartesian_prod(
        torch.arange(height, device=device), torch.arange(width, device=device)
    )
    cells = len(cell_N2)
    first_M2 = cell_N2.repeat_interleave(cells, dim=0)
    pairs_M22 = torch.stack([first_M2, cell_N2.repeat(cells, 1)], dim=1)
    return pairs_M22.expand(batch, -1, -1, -1)


def relative_offsets(
    pairs_BM22: Tensor,
    height: int,
    width: int,
    *,
    signed: bool = False,
    normalize: Normalize = "none",
) -> Tensor:
    """What the head is to predict, first cell minus second: ``(B, M, 2)`` float32, rows first.

    Each axis is measured by its own side:

    | normalize | unsigned | signed |
    |---|---|---|
    | none | distance in cells, 0 to side - 1 | offset + side - 1, 0 to 2 (side - 1) |
    | side | distance / side (Eq. 1 of the paper) | offset / side (L* of arXiv v1), in (-1, 1) |
    | side_minus_one | distance / (side - 1) | (offset + side - 1) / (2 (side - 1)), both 0 to 1 |

    Raises:
        ValueError: a side of the grid is below 2, or there is no such ``normalize``.
    """
    check_grid(height, width)
    offset_BM2 = pairs_BM22[:, :, 0] - pairs_BM22[:, :, 1]
    target_BM2 = offset_BM2 if signed else offset_BM2.abs()
    if signed and normalize != "side":
        # The released code moves signed offsets up to class numbers, also where it regresses them.
        target_BM2 = target_BM2 + _per_axis(offset_BM2, height - 1, width - 1)
    units = [cells_per_unit(side, signed=signed, normalize=normalize) for side in (height, width)]
    return target_BM2.float() / _per_axis(target_BM2, *units)


def cells_per_unit(side: int, *, signed: bool, normalize: Normalize) -> int:
    """How many cells one unit of ``relative_offsets`` is, along an axis of ``side`` cells.

    Raises:
        ValueError: there is no such ``normalize``.
    """
    match normalize:
        case "none":
            return 1
        case "side":
            return side
        case "side_minus_one":
            return 2 * (side - 1) if signed else side - 1
    raise ValueError(f"normalize must be none, side or side_minus_one, got {normalize!r}")


def check_grid(height: int, width: int) -> None:
    """Refuse grids on which nothing lies apart.

    Raises:
        ValueError: a side is below 2.
    """
    if min(height, width) < 2:
        raise ValueError(
            f"DRLoc needs a grid of at least 2 x 2 cells, got {height} x {width}: choose a larger "
            "image_size, a smaller patch or stride, an earlier stage, or no pooling"
        )


def _per_axis(like: Tensor, rows: int, columns: int) -> Tensor:
    """``(rows, columns)`` beside ``like``, filled there: copying a list would stall a GPU."""
    both_2 = torch.full((2,), rows, dtype=torch.int64, device=like.device)
    both_2[1:].fill_(columns)
    return both_2
