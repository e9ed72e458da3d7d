"""Relative localization on one or several grids of a network: what a training step calls.

The paper uses the last grid alone. The released code can also put a head on every stage of Swin
(`use_multiscale`); arXiv v1 found that to hurt (its L^all: -0.88 points on ImageNet-100), so it is
here to be tried and not the default.

Backbones that end at 14 x 14 are pooled to 7 x 7 before, for the loss alone: the classifier never
sees the smaller grid. The paper says 2 x 2 averages; the released code takes overlapping 3 x 3
ones. To add a kind: a function, a case in ``pool_grid`` and in ``pooled_shape``, and its name in
``Pooling``.

Shape letters:  B images   C channels   H, W grid rows and columns
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.classification import DRLocConfig, Pooling
from pipeline.losses.drloc import (
    DRLocHead,
    DRLocTerms,
    check_options,
    constant_predictor_floor,
    drloc_terms,
)
from pipeline.losses.pairs import all_pairs, sample_pairs


def pool_grid(features_BCHW: Tensor, kind: Pooling) -> Tensor:
    """The features on the grid of ``pooled_shape``: ``(B, C, h, w)``.

    Raises:
        ValueError: as ``pooled_shape``.
    """
    pooled_shape(features_BCHW.shape[-2], features_BCHW.shape[-1], kind)
    match kind:
        case "none":
            return features_BCHW
        case "mean_2x2":
            return mean_2x2(features_BCHW)
        case "overlap_3x3":
            return overlap_3x3(features_BCHW)


def mean_2x2(features_BCHW: Tensor) -> Tensor:
    """Means of 2 x 2 blocks, as the paper has it."""
    return F.avg_pool2d(features_BCHW, kernel_size=2)


def overlap_3x3(features_BCHW: Tensor) -> Tensor:
    """Means of the 3 x 3 neighbourhood of every second cell, as the released code has it.

    Cells beyond the border do not count: a corner is the mean of four cells, not of nine.
    """
    return F.avg_pool2d(features_BCHW, kernel_size=3, stride=2, padding=1, count_include_pad=False)


def pooled_shape(height: int, width: int, kind: Pooling) -> tuple[int, int]:
    """``(rows, columns)`` after pooling.

    Raises:
        ValueError: there is no such kind, or mean_2x2 meets an odd side and would drop cells.
    """
    match kind:
        case "none":
            return height, width
        case "mean_2x2":
            if height % 2 or width % 2:
                raise ValueError(
                    f"mean_2x2 pooling needs even sides, got {height} x {width}: use overlap_3x3 "
                    "or none, or an image_size with an even grid"
                )
            return height // 2, width // 2
        case "overlap_3x3":
            return (height + 1) // 2, (width + 1) // 2
    raise ValueError(f"pooling must be none, mean_2x2 or overlap_3x3, got {kind!r}")


class DRLocObjective(nn.Module):
    """A head per grid, and the sum of their losses."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        config: DRLocConfig,
        *,
        pooling: Pooling | Sequence[Pooling] = "none",
        seed: int = 0,
    ) -> None:
        """Build the heads on the CPU, the same for the same seed; no other random number moves.

        Args:
            shapes: ``(C, H, W)`` of each grid, as the network gives it.
            config: how every grid is asked; what it says of pooling and of lambda is the caller's.
            pooling: what is done to each grid first; one kind for all, or one per grid.
            seed: of the heads' initial weights.

        Raises:
            ValueError: no shape, a pooling too few or too many, options that contradict each other,
                or a pooled grid with a side below 2.
        """
        super().__init__()
        self.config = config
        kinds = [pooling] * len(shapes) if isinstance(pooling, str) else list(pooling)
        if not shapes or len(kinds) != len(shapes):
            raise ValueError(
                "give at least one grid and a pooling for each, "
                f"got {len(shapes)} grids and {len(kinds)} poolings"
            )
        check_options(config.mode, config.normalize, config.reduction)
        self.pooling: list[Pooling] = kinds
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that one seeds the GPUs too, which are not forked here.
            torch.default_generator.manual_seed(seed)
            self.heads = nn.ModuleList(
                self._head(channels, pooled_shape(height, width, kind))
                for (channels, height, width), kind in zip(shapes, kinds, strict=True)
            )

    def _head(self, channels: int, grid: tuple[int, int]) -> DRLocHead:
        config = self.config
        return DRLocHead(
            channels,
            hidden_dim=config.hidden_dim,
            num_hidden=config.num_hidden,
            mode=config.mode,
            grid=grid,
            signed=config.signed,
        )

    @property
    def floor_cells(self) -> float:
        """What ``error_cells`` would be if the last head knew nothing but the best constant."""
        head = self._heads[-1]
        return constant_predictor_floor(*head.grid, signed=head.signed)

    def draw(self, num_images: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Pairs of cells for each grid, ``(num_images, M, 2, 2)``, on the generator's device.

        Drawn apart from ``forward``, so that workers and parts of a batch can share one draw.

        Args:
            num_images: how many images each grid has.
            generator: of the pairs (``pair_generator``).
        """
        return tuple(
            sample_pairs(num_images, self.config.num_pairs, *head.grid, generator=generator)
            for head in self._heads
        )

    def forward(self, grids: Sequence[Tensor], pairs: Sequence[Tensor]) -> DRLocTerms:
        """The losses of all grids added, and the last grid's error in cells.

        Args:
            grids: ``(B, C, H, W)`` floats, in the order of ``shapes``.
            pairs: what ``draw`` gave for these images.

        Raises:
            ValueError: there are more or fewer grids or pairs than heads, or shapes do not fit.
        """
        if not len(grids) == len(pairs) == len(self.heads):
            raise ValueError(
                f"got {len(grids)} grids and {len(pairs)} sets of pairs for {len(self.heads)} heads"
            )
        pooled = [pool_grid(grid, kind) for grid, kind in zip(grids, self.pooling, strict=True)]
        self._check_grids(pooled)
        terms = [
            drloc_terms(
                pooled_BCHW,
                head,
                pairs_BM22,
                normalize=self.config.normalize,
                reduction=self.config.reduction,
            )
            for pooled_BCHW, pairs_BM22, head in zip(pooled, pairs, self._heads, strict=True)
        ]
        return DRLocTerms(torch.stack([term.loss for term in terms]).sum(), terms[-1].error_cells)

    def _check_grids(self, pooled: Sequence[Tensor]) -> None:
        """Pairs are drawn for the grids of the heads: on another they would name other cells."""
        for pooled_BCHW, head in zip(pooled, self._heads, strict=True):
            if pooled_BCHW.shape[-2:] != head.grid:
                built = "{} x {}".format(*head.grid)
                found = "{} x {}".format(*pooled_BCHW.shape[-2:])
                raise ValueError(f"the head was built for a {built} grid, got {found}")

    @torch.no_grad()
    def expectation(self, grids: Sequence[Tensor]) -> DRLocTerms:
        """``forward`` over every pair, without gradient: exact, for diagnostics.

        Image by image, so that it needs little memory: 2,401 pairs at 7 x 7, 38,416 at 14 x 14.

        Raises:
            ValueError: as ``forward``.
        """
        device = grids[0].device
        pairs = tuple(all_pairs(1, *head.grid, device=device) for head in self._heads)
        images = [
            self([grid[image : image + 1] for grid in grids], pairs)
            for image in range(len(grids[0]))
        ]
        losses, errors = zip(*images, strict=True)
        return DRLocTerms(torch.stack(losses).mean(), torch.stack(errors).mean())

    @property
    def _heads(self) -> list[DRLocHead]:
        return [head for head in self.heads if isinstance(head, DRLocHead)]
