"""What a run looked like, as PNG bytes: its curves over the epochs, and who is taken for whom.

Drawn with matplotlib's objects: no global state is touched, so it may run in any thread. Colours
are told apart by readers who see few of them, and lines also by their dashes.

To add a curve: a line in a panel's function. To add a panel: a function that draws it, and in
``_PANELS`` the number without which it is left out.

Shape letters:  K classes
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from pipeline.evaluation.confusion import Confusion

_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
_INK, _FAINT, _PALE = "#1c1e22", "#69707a", "#e6e8eb"
_DPI = 150
_PANEL_INCHES, _COLUMNS = (4.8, 3.2), 3
# Fewer epochs than this get a dot each: a single one would be no line at all.
_FEW_EPOCHS = 25

# Up to here every cell holds its number; up to there every class has its name at the axes.
_MOST_NUMBERED, _MOST_NAMED = 14, 60
_NUM_PAIRS, _NUM_HARDEST, _LONGEST_NAME = 20, 12, 24
_MATRIX_INCHES, _TEXT_INCHES = 7.2, 4.2
# Cells smaller than this many to a side could not be seen: several become one.
_MOST_CELLS = 250


@dataclass(frozen=True)
class _Run:
    """What the panels draw from."""

    history: Sequence[Mapping[str, float]]
    floor_cells: float | None

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Epochs and values of a number, where it was measured and is finite."""
        points = [
            (entry["epoch"], entry[name])
            for entry in self.history
            if math.isfinite(entry.get(name, math.nan))
        ]
        return [epoch for epoch, _ in points], [value for _, value in points]

    @property
    def span(self) -> tuple[float, float]:
        """The first and the last epoch, and a little room beside them."""
        epochs = [entry["epoch"] for entry in self.history]
        room = max(0.5, 0.03 * (max(epochs) - min(epochs)))
        return min(epochs) - room, max(epochs) + room

    def has(self, name: str) -> bool:
        return bool(self.curve(name)[0])

    def names(self, prefix: str) -> list[str]:
        """All names that begin with ``prefix``, in the order of their first appearance."""
        names = dict.fromkeys(name for entry in self.history for name in entry)
        return [name for name in names if name.startswith(prefix)]


def curves_picture(history: Sequence[Mapping[str, float]], floor_cells: float | None) -> bytes:
    """The bytes of a PNG: a panel for each kind of number that was measured, over the epochs.

    Args:
        history: An entry per epoch, ``epoch`` counting from 1; names as the run's record has them.
        floor_cells: Position error of the best constant guess; None without DRLoc.
    """
    run = _Run(history, floor_cells)
    drawn = [draw for draw, name in _PANELS if run.has(name)]
    columns = 2 if len(drawn) == 4 else min(_COLUMNS, max(1, len(drawn)))
    rows = max(1, math.ceil(len(drawn) / columns))
    figure = Figure(
        (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows),
        dpi=_DPI,
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1),
    )
    for number, draw in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, number + 1)
        _plain(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        if number + columns >= len(drawn):
            axes.set_xlabel("epoch", color=_FAINT, fontsize=9)
        draw(run, axes)
        axes.set_xlim(*run.span)
        _legend(axes)
    if not drawn:
        figure.text(0.5, 0.5, "no epoch is finished yet", ha="center", va="center", color=_FAINT)
    return _png(figure)


def _draw_loss(run: _Run, axes: Axes) -> None:
    if run.has("train/drloc_weighted"):
        _title(axes, "training loss")
        _line(run, axes, "train/loss", "total", _INK)
        _line(run, axes, "train/cross_entropy", "cross-entropy", _BLUE, "--")
    else:
        _title(axes, "training loss (cross-entropy)")
        _line(run, axes, "train/cross_entropy", "", _BLUE)


def _draw_drloc(run: _Run, axes: Axes) -> None:
    _title(axes, "DRLoc")
    _line(run, axes, "train/drloc", "raw", _ORANGE)
    _line(run, axes, "train/drloc_weighted", "times lambda", _BLUE, "--")
    axes.set_ylim(bottom=0)
    if run.has("drloc/weight"):
        twin = axes.twinx()
        _line(run, twin, "drloc/weight", "lambda (right)", _FAINT, ":")
        twin.set_ylim(bottom=0)
        twin.tick_params(axis="y", length=0, labelcolor=_FAINT, labelsize=8)
        twin.spines[:].set_visible(False)
        # For the legend, which is that of the left axis.
        axes.plot([], [], ":", color=_FAINT, linewidth=1.8, label="lambda (right axis)")


def _draw_position_error(run: _Run, axes: Axes) -> None:
    _title(axes, "position error, cells")
    _line(run, axes, "train/drloc_error_cells", "head", _ORANGE)
    if run.floor_cells is not None:
        told = f"best constant, {run.floor_cells:.2f}"
        axes.axhline(run.floor_cells, color=_INK, linestyle="--", linewidth=1.2, label=told)
    axes.set_ylim(bottom=0)


def _draw_accuracy(run: _Run, axes: Axes) -> None:
    _title(axes, "validation accuracy")
    _line(run, axes, "val/accuracy", "", _GREEN)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    epochs, values = run.curve("val/accuracy")
    # Of equal ones the earliest, as the checkpoint is chosen.
    best = max(range(len(values)), key=lambda index: (values[index], -epochs[index]))
    told = f"best: {100 * values[best]:.2f} % in epoch {epochs[best]:.0f}"
    axes.plot(
        epochs[best], values[best], "o", color=_INK, markersize=8, fillstyle="none", label=told
    )
    axes.margins(y=0.1)


def _draw_learning_rate(run: _Run, axes: Axes) -> None:
    _title(axes, "learning rate")
    _line(run, axes, "lr", "", _PURPLE)
    axes.set_ylim(bottom=0)
    # A common factor would stand above the axis, in the title's way.
    axes.yaxis.set_major_formatter("{x:g}")


def _draw_gradient_norms(run: _Run, axes: Axes) -> None:
    _title(axes, "gradient norms")
    looks = {
        "grad_norm/total": ("total", _INK, "-"),
        "grad_norm/cross_entropy": ("cross-entropy", _BLUE, "--"),
        "grad_norm/drloc_weighted": ("DRLoc", _ORANGE, "-."),
    }
    seen = run.names("grad_norm/")
    for name in (*looks, *(name for name in seen if name not in looks)):
        _line(run, axes, name, *looks.get(name, (name.removeprefix("grad_norm/"), _PURPLE, ":")))
    values = [value for name in seen for value in run.curve(name)[1]]
    smallest = min((value for value in values if value > 0), default=1.0)
    if max(values, default=0.0) > 20 * smallest:
        # At lambda 0 a norm is 0: logarithms down to the smallest of the others.
        axes.set_yscale("symlog", linthresh=smallest, linscale=0.3)
        axes.set_ylim(bottom=0 if min(values) == 0 else 0.7 * smallest)
    else:
        axes.set_ylim(bottom=0)


def _draw_dino_loss(run: _Run, axes: Axes) -> None:
    _title(axes, "loss to the teacher")
    _line(run, axes, "train/dino", "cross-entropy", _BLUE)
    _line(run, axes, "train/teacher_entropy", "the teacher's own entropy", _ORANGE, "--")


def _draw_collapse(run: _Run, axes: Axes) -> None:
    _title(axes, "collapse: where either is 0")
    _line(run, axes, "train/divergence", "divergence from the teacher", _BLUE)
    _line(run, axes, "train/feature_std", "spread of the features", _GREEN, "--")
    axes.set_ylim(bottom=0)


def _draw_detection_losses(run: _Run, axes: Axes) -> None:
    _title(axes, "losses of proposals and boxes")
    looks = {
        "train/loss_objectness": ("proposals: object?", _BLUE, "--"),
        "train/loss_rpn_box_reg": ("proposals: box", _ORANGE, "--"),
        "train/loss_classifier": ("object?", _BLUE, "-"),
        "train/loss_box_reg": ("box", _ORANGE, "-"),
    }
    for name, (label, colour, dashes) in looks.items():
        _line(run, axes, name, label, colour, dashes)
    axes.set_ylim(bottom=0)


def _draw_probes(run: _Run, axes: Axes) -> None:
    _title(axes, "probes")
    looks = {
        "probe/corloc": ("CorLoc", _BLUE, "-"),
        "probe/knn": ("neighbours", _ORANGE, "--"),
        "probe/ap50": ("AP50", _GREEN, "-"),
        "probe/ar_100": ("AR@100", _PURPLE, "--"),
    }
    for name, (label, colour, dashes) in looks.items():
        _line(run, axes, name, label, colour, dashes)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


_PANELS: tuple[tuple[Callable[[_Run, Axes], None], str], ...] = (
    (_draw_loss, "train/cross_entropy"),
    (_draw_accuracy, "val/accuracy"),
    (_draw_drloc, "train/drloc"),
    (_draw_position_error, "train/drloc_error_cells"),
    (_draw_dino_loss, "train/dino"),
    (_draw_collapse, "train/divergence"),
    (_draw_detection_losses, "train/loss_classifier"),
    (_draw_probes, "probe/corloc"),
    (_draw_learning_rate, "lr"),
    (_draw_gradient_norms, "grad_norm/total"),
)


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
    figure = Figure(
        (side + 1.0 + (0 if numbered else _TEXT_INCHES), side),
        dpi=_DPI,
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1),
    )
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
    _title(axes, f"{100 * confusion.accuracy:.2f} % of {confusion.num_images:,} images right")
    size = max(4.0, min(9.0, 330 / max(num_classes, 1)))
    if named:
        _name_classes(axes, names, size)
    if numbered:
        _number_cells(axes, percent_KK, size)
    else:
        _tell_worst(figure.add_subplot(columns[0, 1]), confusion, names)
    return _png(figure)


def _draw_matrix(axes: Axes, percent_KK: NDArray[np.float64]) -> None:
    colours = colormaps["Blues"].with_extremes(bad=_PALE)
    # Roots, so that a few percent off the diagonal can be seen beside it.
    shown, merged = _merged(percent_KK)
    end = len(percent_KK) - 0.5
    image = axes.imshow(
        shown, cmap=colours, norm=PowerNorm(0.5, vmin=0, vmax=100), interpolation="nearest",
        extent=(-0.5, end, end, -0.5),
    )  # fmt: skip
    what = f" (a dot is the largest of {merged} x {merged} classes)" if merged > 1 else ""
    axes.set_xlabel(f"taken for{what}", color=_FAINT, fontsize=9)
    axes.set_ylabel("true class", color=_FAINT, fontsize=9)
    axes.tick_params(length=0, labelcolor=_FAINT, labelsize=8)
    axes.spines[:].set_color(_PALE)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.6, ticks=(0, 1, 5, 20, 50, 100))
    bar.ax.set_title("%", fontsize=8, color=_FAINT)
    bar.ax.tick_params(length=0, labelcolor=_FAINT, labelsize=8)
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
            colour = "white" if percent > 35 else _INK
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
        0, 1, "\n".join(lines), fontsize=7.5, family="monospace", va="top", color=_INK,
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


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold", color=_INK)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_FAINT, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=_PALE)


def _line(run: _Run, axes: Axes, name: str, label: str, colour: str, dashes: str = "-") -> None:
    """Draw a curve where there is one; an empty label leaves it out of the legend."""
    epochs, values = run.curve(name)
    if epochs:
        marker = "." if len(epochs) < _FEW_EPOCHS else ""
        shown = label or "_"
        axes.plot(epochs, values, dashes, color=colour, linewidth=1.8, marker=marker, label=shown)


def _legend(axes: Axes) -> None:
    """Above the curves, beside the title, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.02, 0.985), ncols=3, fontsize=8, frameon=False,
            labelcolor=_INK, handlelength=1.8, handletextpad=0.5, columnspacing=1.0,
        )  # fmt: skip


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png")
    return picture.getvalue()
