"""How often a classifier is right over a whole set, and who is taken for whom: counts, a picture.

Shape letters:  B images   K classes
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.font_manager import FontProperties, findfont, get_font
from numpy.typing import NDArray
from torch import Tensor

from pipeline.drawing.figures import FAINT, INK, PALE, new_figure, png, title


@dataclass(frozen=True, eq=False)
class Confusion:
    """Counts of images; rows are the true classes, columns the predicted ones."""

    counts_KK: NDArray[np.int64]

    @property
    def num_images(self) -> int:
        """All images that were looked at."""
        return int(self.counts_KK.sum())

    @property
    def accuracy(self) -> float:
        """Share of the images whose class was found, in [0, 1]; NaN without images."""
        total = self.num_images
        return float(np.trace(self.counts_KK)) / total if total else float("nan")

    @property
    def accuracy_per_class_K(self) -> NDArray[np.float64]:
        """Share of each class's images, in [0, 1]; NaN for a class without any."""
        of_class_K = self.counts_KK.sum(axis=1)
        right_K = np.diag(self.counts_KK).astype(np.float64)
        found_K: NDArray[np.float64] = np.full(len(right_K), np.nan)
        np.divide(right_K, of_class_K, out=found_K, where=of_class_K > 0)
        return found_K


def count_confusion(true_B: Tensor, predicted_B: Tensor, num_classes: int) -> Tensor:
    """``(K, K)`` int64 counts of a batch, on its device: rows true, columns predicted."""
    cell_B = true_B * num_classes + predicted_B
    counts = torch.bincount(cell_B, minlength=num_classes * num_classes)
    return counts.view(num_classes, num_classes)


# Up to here every cell holds its number; up to there every class has its name at the axes.
_MOST_NUMBERED, _MOST_NAMED = 14, 60
_NUM_PAIRS, _NUM_HARDEST, _LONGEST_NAME = 20, 12, 24
_MATRIX_INCHES, _TEXT_INCHES = 7.2, 4.2
# Cells smaller than this many to a side could not be seen: several become one.
_MOST_CELLS = 250


def confusion_picture(confusion: Confusion, classes: Sequence[str]) -> bytes:
    """The bytes of a PNG: of each true class's images, the percent taken for each class.

    With many classes their names do not fit: those most often confused are then told beside it.

    Args:
        confusion: Counts over a whole set.
        classes: Names, in the order of the counts.
    """
    names = _drawable(classes)
    num_classes = len(names)
    numbered, named = num_classes <= _MOST_NUMBERED, num_classes <= _MOST_NAMED
    side = min(_MATRIX_INCHES, 2.6 + 0.36 * num_classes)
    figure = new_figure(side + 1.0 + (0 if numbered else _TEXT_INCHES), side)
    columns = figure.add_gridspec(
        1, 1 if numbered else 2, width_ratios=None if numbered else (side + 1.0, _TEXT_INCHES)
    )
    axes = figure.add_subplot(columns[0, 0])
    of_class_K1 = confusion.counts_KK.sum(axis=1, keepdims=True)
    # A class without images stays blank: nothing is known of it.
    percent_KK = 100.0 * np.divide(
        confusion.counts_KK, of_class_K1, out=np.full((num_classes,) * 2, np.nan),
        where=of_class_K1 > 0,
    )  # fmt: skip
    _draw_matrix(axes, percent_KK)
    title(axes, f"{100 * confusion.accuracy:.2f} % of {confusion.num_images:,} images right")
    size = max(4.0, min(9.0, 330 / max(num_classes, 1)))
    if named:
        _name_classes(axes, names, size)
    if numbered:
        _number_cells(axes, percent_KK, size)
    else:
        _tell_worst(figure.add_subplot(columns[0, 1]), confusion, names)
    return png(figure)


def _draw_matrix(axes: Axes, percent_KK: NDArray[np.float64]) -> None:
    colours = colormaps["Blues"].with_extremes(bad=PALE)
    # Roots, so that a few percent off the diagonal can be seen beside it.
    shown, merged = _merged(percent_KK)
    end = len(percent_KK) - 0.5
    image = axes.imshow(
        shown, cmap=colours, norm=PowerNorm(0.5, vmin=0, vmax=100), interpolation="nearest",
        extent=(-0.5, end, end, -0.5),
    )  # fmt: skip
    what = f" (a dot is the largest of {merged} x {merged} classes)" if merged > 1 else ""
    axes.set_xlabel(f"taken for{what}", color=FAINT, fontsize=9)
    axes.set_ylabel("true class", color=FAINT, fontsize=9)
    axes.tick_params(length=0, labelcolor=FAINT, labelsize=8)
    axes.spines[:].set_color(PALE)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.6, ticks=(0, 1, 5, 20, 50, 100))
    bar.ax.set_title("%", fontsize=8, color=FAINT)
    bar.ax.tick_params(length=0, labelcolor=FAINT, labelsize=8)
    bar.outline.set_visible(False)


def _merged(percent_KK: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """At most ``_MOST_CELLS`` cells a side, each the largest of n x n, and that n."""
    factor = math.ceil(len(percent_KK) / _MOST_CELLS)
    if factor <= 1:
        return percent_KK, 1
    starts = np.arange(0, len(percent_KK), factor)
    rows = np.fmax.reduceat(percent_KK, starts, axis=0)
    return np.fmax.reduceat(rows, starts, axis=1), factor


def _name_classes(axes: Axes, names: Sequence[str], size: float) -> None:
    short = max(map(len, names), default=0) <= 3
    places = list(range(len(names)))
    axes.set_xticks(places, names, rotation=0 if short else 90, fontsize=size, parse_math=False)
    axes.set_yticks(places, names, fontsize=size, parse_math=False)


def _number_cells(axes: Axes, percent_KK: NDArray[np.float64], size: float) -> None:
    for (row, column), percent in np.ndenumerate(percent_KK):
        if percent > 0:
            shown = (
                f"{percent:.1f}" if percent < 9.95 or 99.5 <= percent < 100 else f"{percent:.0f}"
            )
            colour = "white" if percent > 35 else INK
            axes.text(column, row, shown, ha="center", va="center", color=colour, fontsize=size - 1)


def _tell_worst(axes: Axes, confusion: Confusion, names: Sequence[str]) -> None:
    """The pairs with most errors, and the classes found least often, as text."""
    axes.set_axis_off()
    lines = ["most confused (of the true class's images)", *_worst_pairs(confusion, names)]
    accuracy_K = confusion.accuracy_per_class_K
    hardest = [k for k in np.argsort(accuracy_K, kind="stable") if np.isfinite(accuracy_K[k])]
    lines += ["", "found least often"]
    lines += [f"{100 * accuracy_K[k]:6.1f} %  {names[k]}" for k in hardest[:_NUM_HARDEST]]
    unseen = int((~np.isfinite(accuracy_K)).sum())
    if unseen:
        lines += ["", f"without images: {unseen} classes"]
    axes.text(
        0, 1, "\n".join(lines), fontsize=7.5, family="monospace", va="top", color=INK,
        linespacing=1.5, parse_math=False, transform=axes.transAxes,
    )  # fmt: skip


def _worst_pairs(confusion: Confusion, names: Sequence[str]) -> list[str]:
    """By the share of the true class, and of equal ones by the number of images."""
    wrong_KK = confusion.counts_KK.copy()
    np.fill_diagonal(wrong_KK, 0)
    share_KK = wrong_KK / np.maximum(confusion.counts_KK.sum(axis=1, keepdims=True), 1)
    rows, columns = np.nonzero(wrong_KK)
    order = np.lexsort((-wrong_KK[rows, columns], -share_KK[rows, columns]))[:_NUM_PAIRS]
    return [
        f"{100 * share_KK[true, taken]:6.1f} %  {names[true]} -> {names[taken]}"
        for true, taken in zip(rows[order], columns[order], strict=True)
    ] or ["none"]


def _drawable(classes: Sequence[str]) -> list[str]:
    """Names that fit and that the font can write, else the class's number."""
    known = get_font(findfont(FontProperties())).get_charmap()
    names = []
    for number, name in enumerate(classes):
        written = " ".join(name.split())
        if not written or any(ord(letter) not in known for letter in written):
            written = f"class {number}"
        names.append(
            written if len(written) <= _LONGEST_NAME else f"{written[: _LONGEST_NAME - 3]}..."
        )
    return names
