"""Dense relative localization: from two cells' features, how far apart do the cells lie?

Liu et al., "Efficient Training of Visual Transformers with Small Datasets", NeurIPS 2021, Eq. 1-2,
and the variants of its arXiv v1 and of the released code. A small MLP sees the features of two
cells of the last grid; learning to tell their offset teaches the network where things are.

| mode | the head gives, per axis | loss |
|---|---|---|
| l1 | a number | mean absolute error |
| ce | a class per possible offset | cross-entropy |
| cbr | a class per possible offset | squared error of the mean class over the classes' variance |

To add a mode: a function beside ``_l1``, ``_ce`` and ``_cbr``, a case in ``drloc_terms`` and its
name in ``DRLocMode``. Pairs and targets come from pairs.py, smaller grids from
multi_stage.py.

Shape letters:  B images   C channels   H, W grid rows and columns   N cells (H * W)
                M pairs of an image   D hidden width   K classes (1 in mode l1)
"""

from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.classification import DRLocMode, Normalize, Reduction
from pipeline.losses.pairs import cells_per_unit, check_grid, relative_offsets

# Both as in the released code; the first weighs log variance, the second keeps it finite.
_LOG_VARIANCE_WEIGHT = 0.001
_LEAST_VARIANCE = 1e-8


class DRLocTerms(NamedTuple):
    """What one look at the pairs gives."""

    loss: Tensor
    """Scalar with gradient, not yet weighted."""
    error_cells: Tensor
    """Scalar without gradient: mean over pairs and axes of |decoded offset - true offset|, in cells
    of the grid whatever the mode and the targets' unit; compare with ``constant_predictor_floor``.
    l1 decodes the prediction itself, ce the median class (what minimises this very error: an
    untrained head then stands at the floor), cbr the mean class mu."""


class DRLocHead(nn.Module):
    """The MLP on the features of two cells, first cell first (the order matters to it).

    ``num_hidden`` layers with ReLU (the paper and its code: 2, arXiv v1: 1), then a linear layer:
    to both numbers in mode l1, else to ``hidden_dim`` WITHOUT an activation, as in the released
    code, and on to one linear layer of classes per axis.

    It computes in the type of its weights, also under autocast: bfloat16 cannot tell 6 cells from
    6.02, and a trained head is that precise.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        hidden_dim: int = 512,
        num_hidden: int = 2,
        mode: DRLocMode = "l1",
        grid: tuple[int, int] = (7, 7),
        signed: bool = False,
    ) -> None:
        """Build the layers with PyTorch's own initialisation.

        Args:
            in_dim: channels of a cell.
            hidden_dim: width of the hidden layers.
            num_hidden: hidden layers, at least 1.
            mode: what is predicted, see the module.
            grid: rows and columns; in ce and cbr each axis has ``side`` classes, ``2 * side - 1``
                if signed. Smaller grids may be given later (the upper classes are then not met).
            signed: predict in which direction the second cell lies too.

        Raises:
            ValueError: an argument is outside its range, or a side of the grid is below 2.
        """
        super().__init__()
        check_grid(*grid)
        if mode not in get_args(DRLocMode):
            raise ValueError(f"mode must be l1, ce or cbr, got {mode!r}")
        if min(in_dim, hidden_dim, num_hidden) < 1:
            raise ValueError(
                "in_dim, hidden_dim and num_hidden must be at least 1, "
                f"got {in_dim}, {hidden_dim} and {num_hidden}"
            )
        self.mode: DRLocMode = mode
        self.grid = grid
        self.signed = signed
        # One layer for both cells (and so one weight to load), though it is computed in two halves.
        self.first = nn.Linear(2 * in_dim, hidden_dim)
        self.hidden = nn.ModuleList(
            nn.Linear(hidden_dim, hidden_dim) for _ in range(num_hidden - 1)
        )
        self.last = nn.Linear(hidden_dim, 2 if mode == "l1" else hidden_dim)
        classes = [2 * side - 1 if signed else side for side in grid] if mode != "l1" else []
        self.axes = nn.ModuleList(nn.Linear(hidden_dim, count) for count in classes)

    def forward(self, features_BCHW: Tensor, pairs_BM22: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, M, K)`` for the row axis and for the column axis: K logits, or in l1 one number.

        Raises:
            ValueError: the shapes do not fit each other or the head.
        """
        self._check(features_BCHW, pairs_BM22)
        width = features_BCHW.shape[3]
        with torch.autocast(features_BCHW.device.type, enabled=False):
            token_BNC = features_BCHW.to(self.first.weight.dtype).flatten(2).transpose(1, 2)
            index_BM2 = pairs_BM22[..., 0] * width + pairs_BM22[..., 1]
            cheaper = token_first if token_BNC.shape[1] <= index_BM2.shape[1] else gather_first
            hidden_BMD = cheaper(token_BNC, index_BM2, self.first).relu()
            for layer in self.hidden:
                hidden_BMD = layer(hidden_BMD).relu()
            last_BMD = self.last(hidden_BMD)
            if self.mode == "l1":
                return last_BMD[..., :1], last_BMD[..., 1:]
            rows, columns = self.axes
            return rows(last_BMD), columns(last_BMD)

    def _check(self, features_BCHW: Tensor, pairs_BM22: Tensor) -> None:
        batch, channels, height, width = features_BCHW.shape
        if 2 * channels != self.first.in_features:
            wanted = self.first.in_features // 2
            raise ValueError(f"the head was built for {wanted} channels, got {channels}")
        if self.mode != "l1" and (height > self.grid[0] or width > self.grid[1]):
            built = "{} x {}".format(*self.grid)
            raise ValueError(f"the head has classes for a {built} grid, got {height} x {width}")
        if pairs_BM22.shape != (batch, pairs_BM22.shape[1], 2, 2):
            shape = tuple(pairs_BM22.shape)
            raise ValueError(f"pairs must be ({batch}, M, 2, 2), one set per image, got {shape}")


def token_first(token_BNC: Tensor, index_BM2: Tensor, layer: nn.Linear) -> Tensor:
    """``layer`` on pairs of tokens, ``(B, M, D)``: W_a e_a and W_b e_b per token, then picked.

    Costs N products per image whatever M is: the cheaper way from M = N on (measured on a CPU at
    384 to 2048 channels; 7 x 7 and M = 64: a sixth faster, M = 256: four times as fast).
    """
    weight_a, weight_b = layer.weight.chunk(2, dim=1)
    first_BMD = _pick(F.linear(token_BNC, weight_a, layer.bias), index_BM2[..., 0])
    return first_BMD + _pick(F.linear(token_BNC, weight_b), index_BM2[..., 1])


def gather_first(token_BNC: Tensor, index_BM2: Tensor, layer: nn.Linear) -> Tensor:
    """``layer`` on pairs of tokens, ``(B, M, D)``, as it is written: picked, joined, multiplied.

    Costs M products per image whatever N is.
    """
    first_BMC, second_BMC = (_pick(token_BNC, index_BM) for index_BM in index_BM2.unbind(-1))
    joined: Tensor = layer(torch.cat([first_BMC, second_BMC], dim=-1))
    return joined


def _pick(token_BND: Tensor, index_BM: Tensor) -> Tensor:
    """The tokens of the same image at ``index_BM``: ``(B, M, D)``."""
    batch, tokens = token_BND.shape[:2]
    start_B1 = torch.arange(batch, device=index_BM.device)[:, None] * tokens
    # embedding, because its gradient is summed in a fixed order on a GPU, unlike gather's.
    return F.embedding(start_B1 + index_BM, token_BND.flatten(0, 1))


def drloc_loss(
    features_BCHW: Tensor,
    head: DRLocHead,
    pairs_BM22: Tensor,
    *,
    normalize: Normalize = "none",
    reduction: Reduction = "mean",
) -> Tensor:
    """The loss of ``drloc_terms``, a scalar with gradient; the same arguments and errors."""
    terms = drloc_terms(features_BCHW, head, pairs_BM22, normalize=normalize, reduction=reduction)
    return terms.loss


def drloc_terms(
    features_BCHW: Tensor,
    head: DRLocHead,
    pairs_BM22: Tensor,
    *,
    normalize: Normalize = "none",
    reduction: Reduction = "mean",
) -> DRLocTerms:
    """How well the head tells the offsets of these pairs: the loss, and the error in cells.

    Args:
        features_BCHW: cells' features, any float type; the loss is at least float32.
        head: its mode and sign decide what is predicted.
        pairs_BM22: int64 from pairs.py, on the features' device, inside the grid.
        normalize: unit of the targets, see ``relative_offsets``; l1 only.
        reduction: ``mean`` is the released code: the mean over images, pairs and axes (ce and cbr:
            both axes added). ``paper`` is Eq. 2 with its sum over images made a mean: targets over
            the side, the axes added; l1 only. At equal targets that is twice ``mean``.

    Raises:
        ValueError: the options contradict each other, shapes do not fit, or a side is below 2.
    """
    check_options(head.mode, normalize, reduction)
    height, width = features_BCHW.shape[-2:]
    if reduction == "paper":
        normalize = "side"
    target_BM2 = relative_offsets(
        pairs_BM22, height, width, signed=head.signed, normalize=normalize
    )
    predicted = tuple(_at_least_float32(axis) for axis in head(features_BCHW, pairs_BM22))
    target = target_BM2.unbind(-1)
    match head.mode:
        case "l1":
            units = [
                cells_per_unit(side, signed=head.signed, normalize=normalize)
                for side in (height, width)
            ]
            axes = [_l1(*axis) for axis in zip(predicted, target, units, strict=True)]
        case "ce":
            axes = [_ce(*axis) for axis in zip(predicted, target, strict=True)]
        case "cbr":
            axes = [_cbr(*axis) for axis in zip(predicted, target, strict=True)]
    (row_loss, row_error), (column_loss, column_error) = axes
    loss = row_loss + column_loss
    if head.mode == "l1" and reduction == "mean":
        loss = loss / 2
    return DRLocTerms(loss, ((row_error + column_error) / 2).detach())


def _l1(number_BM1: Tensor, target_BM: Tensor, unit: int) -> DRLocTerms:
    """Mean absolute error along one axis."""
    loss = (number_BM1.squeeze(-1) - target_BM).abs().mean()
    return DRLocTerms(loss, loss * unit)


def _ce(logit_BMK: Tensor, target_BM: Tensor) -> DRLocTerms:
    """Cross-entropy along one axis (L^ce of arXiv v1)."""
    loss = F.cross_entropy(logit_BMK.flatten(0, 1), target_BM.long().flatten())
    below_BMK = logit_BMK.detach().softmax(-1).cumsum(-1) < 0.5
    return DRLocTerms(loss, (below_BMK.sum(-1) - target_BM).abs().mean())


def _cbr(logit_BMK: Tensor, target_BM: Tensor) -> DRLocTerms:
    """Regression by classes along one axis (L^reg of arXiv v1), as released."""
    probability_BMK = logit_BMK.softmax(-1)
    class_K = torch.arange(logit_BMK.shape[-1], device=logit_BMK.device)
    mean_BM = (probability_BMK * class_K).sum(-1)
    spread_BMK = (class_K - mean_BM[..., None]).square()
    variance_BM = (probability_BMK * spread_BMK).sum(-1) + _LEAST_VARIANCE
    error_BM = mean_BM - target_BM
    loss_BM = error_BM.square() / variance_BM + _LOG_VARIANCE_WEIGHT * variance_BM.log()
    return DRLocTerms(loss_BM.mean(), error_BM.detach().abs().mean())


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_options(mode: DRLocMode, normalize: Normalize, reduction: Reduction) -> None:
    """Refuse options that contradict each other.

    Raises:
        ValueError: classes with normalised targets or Eq. 2, or Eq. 2 with a unit not its own.
    """
    cells_per_unit(2, signed=False, normalize=normalize)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be mean or paper, got {reduction!r}")
    if mode != "l1" and normalize != "none":
        raise ValueError(f"mode {mode} counts cells: normalize must be none, got {normalize!r}")
    if mode != "l1" and reduction == "paper":
        raise ValueError(f"reduction paper is Eq. 2, so mode must be l1, got {mode!r}")
    if reduction == "paper" and normalize == "side_minus_one":
        raise ValueError(
            "reduction paper divides targets by the side: normalize must be side or none, "
            "got 'side_minus_one'; use reduction mean with it"
        )


def constant_predictor_floor(height: int, width: int, *, signed: bool = False) -> float:
    """``error_cells`` of the best constant answer per axis over all pairs: what a head must beat.

    1.3469 at 7 x 7 and 2.724 at 14 x 14; exact, as the mean of both axes.

    Raises:
        ValueError: a side of the grid is below 2.
    """
    check_grid(height, width)
    return (_side_floor(height, signed=signed) + _side_floor(width, signed=signed)) / 2


def _side_floor(side: int, *, signed: bool) -> float:
    offsets = [first - second for first in range(side) for second in range(side)]
    answers = sorted(offsets if signed else map(abs, offsets))
    # A median minimises the mean absolute error.
    median = answers[len(answers) // 2]
    return sum(abs(answer - median) for answer in answers) / len(answers)
