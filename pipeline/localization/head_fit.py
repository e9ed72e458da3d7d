"""Fit a head on the cuts of a collection's own images: no labels, no gradient descent, seconds.

The errors of cuts differ from image to image; one direction of the feature space, shared by all
images, averages them out. The first fit is ridge regression of "is this patch on the object's side
of its image's cut?" on the patch, in closed form. Each further one is of what the head itself says,
with its threshold where a fixed share of patches lies above, the first fit's: with a fixed
threshold it collapses (docs/log.md).

All it needs of images are sums, which add up, so it does not matter who computed which. A head can
ruin boxes where most cuts are wrong; ``why_not`` tells, without labels.

Shape letters:  B images   H, W grid rows and columns   N patches   D channels
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.boxes import aligned_iou
from pipeline.localization.affinity import compare
from pipeline.localization.components import tight_boxes
from pipeline.localization.head import Head
from pipeline.localization.objects import largest_object
from pipeline.localization.ranking import area_under_curve

Vector = NDArray[np.float64]

ROUNDS = 6
RIDGE = 0.1
"""Of a channel's mean variance."""

TIMID = 0.75
"""Where features tell little of the cuts the regression hardly exceeds one half. A share of patches
so much smaller than the cuts' own is none to go by, and theirs is taken (docs/log.md)."""

# A head outside of these limits is refused (docs/log.md: heads that helped, heads that ruined).
MIN_IMAGES = 25
SHARES = (0.05, 0.6)
MIN_AGREEMENT = 0.1
# One of these must hold: objects that keep off the edge, or cuts that agree across images.
MAX_BORDER = 0.6
MIN_AUC, MIN_AGREEMENT_WITH_IT = 0.8, 0.5


@dataclass(frozen=True, eq=False)
class CutImages:
    """Images of one grid with their cuts.

    Attributes:
        features_BHWD: fp32, as the backbone gives them.
        cut_BHW: bool, what ``localize`` boxed of the object's side; all False where nothing was.
    """

    features_BHWD: Tensor
    cut_BHW: Tensor


Sample = Callable[[], Iterable[CutImages]]
"""Gives the same images in the same order at each call: a fit goes over them a dozen times."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A head, and what speaks for it.

    Attributes:
        head: of the last round.
        num_images: that could be cut.
        auc: how well a fit on one half of the images tells the cuts' sides of the other half apart
            (area under the curve, mean of both ways); 0.5 is chance.
        agreement: mean IoU of the head's and the cuts' boxes.
        border: how often the patches along the edge of images are on objects, beside how often the
            others are: photographers keep what they show off the edge, and what is learnt from
            wrong cuts does not.
        rounds: the head of every round.
        changes: of every round after the first, the share of patches that changed sides.
    """

    head: Head
    num_images: int
    auc: float
    agreement: float
    border: float
    rounds: tuple[Head, ...] = field(repr=False)
    changes: tuple[float, ...]


def fit_head(sample: Sample, *, num_rounds: int = ROUNDS) -> Fit:
    """Fit a head on these images.

    The same images in the same order give the same head to 1e-9, however they are batched.

    Raises:
        ValueError: fewer than two images could be cut, or the fit puts all patches on one side.
    """
    halves = _sums_of_cuts(sample)
    whole = halves[0] + halves[1]
    if not all(half.num_images for half in halves):
        raise ValueError(f"at least 2 images must have a cut, got {whole.num_images}")
    covariance_DD = whole.covariance()
    weight_D, bias = whole.solve(covariance_DD)
    values_N = _values(sample, weight_D, bias)
    share = float(np.mean(values_N > 0.5))
    if share < TIMID * whole.y / whole.num:
        share = whole.y / whole.num
    if not 0 < share < 1:
        raise ValueError(f"it puts {share:.0%} of all patches on objects")
    rounds = [Head(weight_D, bias, _upper_quantile(values_N, share), share)]
    changes: list[float] = []
    sides_N = values_N > rounds[0].threshold
    while len(rounds) < num_rounds:
        weight_D, bias = whole.with_sides(sample, sides_N).solve(covariance_DD)
        values_N = _values(sample, weight_D, bias)
        rounds.append(Head(weight_D, bias, _upper_quantile(values_N, share), share))
        before_N, sides_N = sides_N, values_N > rounds[-1].threshold
        changes.append(float(np.mean(before_N != sides_N)))
    agreement, border = _boxes_and_borders(sample, rounds[-1])
    return Fit(
        head=rounds[-1],
        num_images=whole.num_images,
        auc=_auc_across_halves(sample, halves),
        agreement=agreement,
        border=border,
        rounds=tuple(rounds),
        changes=tuple(changes),
    )


def why_not(fit: Fit) -> str | None:
    """Why this head would rather ruin boxes than better them; None where nothing says so."""
    low, high = SHARES
    if fit.num_images < MIN_IMAGES:
        return f"it rests on {fit.num_images} images that could be cut, not {MIN_IMAGES} or more"
    if not low <= fit.head.share <= high:
        return (
            f"it puts {fit.head.share:.0%} of all patches on objects, not {low:.0%} to {high:.0%}"
        )
    if not fit.agreement >= MIN_AGREEMENT:
        return (
            f"its boxes are others than the cuts' (mean IoU {fit.agreement:.2f}, not "
            f"{MIN_AGREEMENT:g} or more)"
        )
    foretold = fit.auc >= MIN_AUC and fit.agreement >= MIN_AGREEMENT_WITH_IT
    if not (fit.border <= MAX_BORDER or foretold):
        return (
            f"its objects do not keep off the images' edges (border {fit.border:.2f}, not "
            f"{MAX_BORDER:g} or less), and the cuts do not agree enough to trust it all the same "
            f"(AUC across images {fit.auc:.2f} and mean IoU {fit.agreement:.2f}, not both "
            f"{MIN_AUC:g} and {MIN_AGREEMENT_WITH_IT:g} or more)"
        )
    return None


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of patches ``x`` and their sides ``y``, in float64."""

    num_images: int
    num: int
    x_D: Vector
    xx_DD: Vector
    y: float
    xy_D: Vector

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.num_images + other.num_images,
            self.num + other.num,
            self.x_D + other.x_D,
            self.xx_DD + other.xx_DD,
            self.y + other.y,
            self.xy_D + other.xy_D,
        )

    def with_sides(self, sample: Sample, sides_N: NDArray[np.bool_]) -> "_Sums":
        """The same patches with other sides."""
        xy_D = np.zeros_like(self.x_D)
        first = 0
        for patches in _patches(sample):
            last = first + len(patches.unit_ND)
            xy_D += patches.unit_ND[sides_N[first:last]].sum(axis=0)
            first = last
        sums = (self.num_images, self.num, self.x_D, self.xx_DD)
        return _Sums(*sums, float(sides_N.sum()), xy_D)

    def covariance(self) -> Vector:
        """``(D, D)`` of a patch, with the ridge."""
        mean_D = self.x_D / self.num
        covariance_DD = self.xx_DD / self.num - np.outer(mean_D, mean_D)
        ridge = RIDGE * np.trace(covariance_DD) / len(mean_D)
        regular_DD: Vector = covariance_DD + ridge * np.eye(len(mean_D))
        return regular_DD

    def solve(self, covariance_DD: Vector) -> tuple[Vector, float]:
        """Weight and bias of the regression of sides on patches."""
        mean_D, mean_y = self.x_D / self.num, self.y / self.num
        cross_D = self.xy_D / self.num - mean_D * mean_y
        weight_D = np.linalg.solve(covariance_DD, cross_D).astype(np.float64)
        return weight_D, float(mean_y - weight_D @ mean_D)


@dataclass(frozen=True, eq=False)
class _Patches:
    """The usable patches of a batch's images that could be cut: length 1, float64."""

    unit_ND: Vector
    side_N: NDArray[np.bool_]
    half_N: NDArray[np.int64]
    """0 and 1 in turn, image by image."""
    num_images: tuple[int, int]
    """Of each half."""


def _patches(sample: Sample) -> Iterator[_Patches]:
    seen = 0
    for batch in sample():
        compared = compare(batch.features_BHWD.flatten(1, 2).cpu(), "cosine")
        side_BN = batch.cut_BHW.flatten(1).cpu()
        has_cut_B = side_BN.any(dim=1)
        half_B = (seen + has_cut_B.cumsum(0) - 1) % 2
        seen += int(has_cut_B.sum())
        taken_BN = compared.usable_BN & has_cut_B[:, None]
        yield _Patches(
            compared.voter_BND[taken_BN].double().numpy(),
            side_BN[taken_BN].numpy(),
            half_B[:, None].expand_as(side_BN)[taken_BN].numpy(),
            (int((has_cut_B & (half_B == 0)).sum()), int((has_cut_B & (half_B == 1)).sum())),
        )


def _sums_of_cuts(sample: Sample) -> tuple[_Sums, _Sums]:
    """The sums of either half of the images."""
    halves: list[_Sums | None] = [None, None]
    for patches in _patches(sample):
        for half, before in enumerate(halves):
            own_N = patches.half_N == half
            unit_ND, side_N = patches.unit_ND[own_N], patches.side_N[own_N]
            sums = _Sums(
                patches.num_images[half],
                len(unit_ND),
                unit_ND.sum(axis=0),
                unit_ND.T @ unit_ND,
                float(side_N.sum()),
                unit_ND[side_N].sum(axis=0),
            )
            halves[half] = sums if before is None else before + sums
    first, second = halves
    if first is None or second is None:
        raise ValueError("at least 2 images must have a cut, got none")
    return first, second


def _values(sample: Sample, weight_D: Vector, bias: float) -> Vector:
    """The regression's of every patch."""
    return np.concatenate([patches.unit_ND @ weight_D + bias for patches in _patches(sample)])


def _upper_quantile(values_N: Vector, share: float) -> float:
    """What the share lies above; between two values, so that rounding moves none across."""
    place = round((1 - share) * len(values_N))
    place = min(max(place, 1), len(values_N) - 1)
    below, above = np.partition(values_N, [place - 1, place])[[place - 1, place]]
    return float((below + above) / 2)


def _auc_across_halves(sample: Sample, halves: tuple[_Sums, _Sums]) -> float:
    fits = [half.solve(half.covariance()) for half in halves]
    values: list[list[Vector]] = [[], []]
    sides: list[list[NDArray[np.bool_]]] = [[], []]
    for patches in _patches(sample):
        for half in (0, 1):
            weight_D, bias = fits[1 - half]
            own_N = patches.half_N == half
            values[half].append(patches.unit_ND[own_N] @ weight_D + bias)
            sides[half].append(patches.side_N[own_N])
    aucs = [
        area_under_curve(np.concatenate(values[half]), np.concatenate(sides[half]))
        for half in (0, 1)
    ]
    # Without both sides in a half nothing is foretold.
    return float(np.mean(np.nan_to_num(aucs, nan=0.5)))


def _boxes_and_borders(sample: Sample, head: Head) -> tuple[float, float]:
    """Agreement with the cuts, and share of the border's patches by share of the others."""
    overlaps: list[Vector] = []
    # Of whole grids, and of grids without their edges.
    on_objects, patches = np.zeros(2), np.zeros(2)
    for batch in sample():
        compared = compare(batch.features_BHWD.flatten(1, 2), "cosine")
        z_BHW = head.map(compared.voter_BND, compared.usable_BN).reshape(batch.cut_BHW.shape)
        has_cut_B = batch.cut_BHW.flatten(1).any(dim=1)
        found_B4, cut_B4 = tight_boxes(largest_object(z_BHW)), tight_boxes(batch.cut_BHW)
        overlaps.append(aligned_iou(found_B4[has_cut_B].cpu(), cut_B4[has_cut_B].cpu()))
        inner_BHW = z_BHW[has_cut_B, 1:-1, 1:-1]
        for place, part in enumerate((z_BHW[has_cut_B], inner_BHW)):
            on_objects[place] += int((part > 0).sum())
            patches[place] += part.numel()
    on_border = (on_objects[0] - on_objects[1]) / (patches[0] - patches[1])
    elsewhere = on_objects[1] / max(patches[1], 1)
    # Grids may be all edge.
    border = on_border / max(elsewhere, 1e-3)
    return float(np.concatenate(overlaps).mean()), float(border)
