"""What a run looked like over its epochs, as PNG bytes.

Curves are told apart by their dashes too, and by colours that most readers can tell apart.

To add a curve: a line in a panel's function. To add a panel: a function that draws it, and in
``_PANELS`` the number without which it is left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.drawing.figures import DPI, FAINT, INK, PALE, png, title

_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
_PANEL_INCHES, _COLUMNS = (4.8, 3.2), 3
# Fewer epochs than this get a dot each: a single one would be no line at all.
_FEW_EPOCHS = 25


@dataclass(frozen=True)
class _Recorded:
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
    run = _Recorded(history, floor_cells)
    drawn = [draw for draw, name in _PANELS if run.has(name)]
    columns = 2 if len(drawn) == 4 else min(_COLUMNS, max(1, len(drawn)))
    rows = max(1, math.ceil(len(drawn) / columns))
    figure = Figure(
        (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows),
        dpi=DPI,
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1),
    )
    for number, draw in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, number + 1)
        _plain(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        if number + columns >= len(drawn):
            axes.set_xlabel("epoch", color=FAINT, fontsize=9)
        draw(run, axes)
        axes.set_xlim(*run.span)
        _legend(axes)
    if not drawn:
        figure.text(0.5, 0.5, "no epoch is finished yet", ha="center", va="center", color=FAINT)
    return png(figure)


def _draw_loss(run: _Recorded, axes: Axes) -> None:
    if run.has("train/drloc_weighted"):
        title(axes, "training loss")
        _line(run, axes, "train/loss", "total", INK)
        _line(run, axes, "train/cross_entropy", "cross-entropy", _BLUE, "--")
    else:
        title(axes, "training loss (cross-entropy)")
        _line(run, axes, "train/cross_entropy", "", _BLUE)


def _draw_drloc(run: _Recorded, axes: Axes) -> None:
    title(axes, "DRLoc")
    _line(run, axes, "train/drloc", "raw", _ORANGE)
    _line(run, axes, "train/drloc_weighted", "times lambda", _BLUE, "--")
    axes.set_ylim(bottom=0)
    if run.has("drloc/weight"):
        twin = axes.twinx()
        _line(run, twin, "drloc/weight", "lambda (right)", FAINT, ":")
        twin.set_ylim(bottom=0)
        twin.tick_params(axis="y", length=0, labelcolor=FAINT, labelsize=8)
        twin.spines[:].set_visible(False)
        # For the legend, which is that of the left axis.
        axes.plot([], [], ":", color=FAINT, linewidth=1.8, label="lambda (right axis)")


def _draw_position_error(run: _Recorded, axes: Axes) -> None:
    title(axes, "position error, cells")
    _line(run, axes, "train/drloc_error_cells", "head", _ORANGE)
    if run.floor_cells is not None:
        told = f"best constant, {run.floor_cells:.2f}"
        axes.axhline(run.floor_cells, color=INK, linestyle="--", linewidth=1.2, label=told)
    axes.set_ylim(bottom=0)


def _draw_accuracy(run: _Recorded, axes: Axes) -> None:
    title(axes, "validation accuracy")
    _line(run, axes, "val/accuracy", "", _GREEN)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    epochs, values = run.curve("val/accuracy")
    # Of equal ones the earliest, as the checkpoint is chosen.
    best = max(range(len(values)), key=lambda index: (values[index], -epochs[index]))
    told = f"best: {100 * values[best]:.2f} % in epoch {epochs[best]:.0f}"
    axes.plot(
        epochs[best], values[best], "o", color=INK, markersize=8, fillstyle="none", label=told
    )
    axes.margins(y=0.1)


def _draw_learning_rate(run: _Recorded, axes: Axes) -> None:
    title(axes, "learning rate")
    _line(run, axes, "lr", "", _PURPLE)
    axes.set_ylim(bottom=0)
    # A common factor would stand above the axis, in the title's way.
    axes.yaxis.set_major_formatter("{x:g}")


def _draw_gradient_norms(run: _Recorded, axes: Axes) -> None:
    title(axes, "gradient norms")
    looks = {
        "grad_norm/total": ("total", INK, "-"),
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


def _draw_dino_loss(run: _Recorded, axes: Axes) -> None:
    title(axes, "loss to the teacher")
    _line(run, axes, "train/dino", "cross-entropy", _BLUE)
    _line(run, axes, "train/teacher_entropy", "the teacher's own entropy", _ORANGE, "--")


def _draw_collapse(run: _Recorded, axes: Axes) -> None:
    title(axes, "collapse: where either is 0")
    _line(run, axes, "train/divergence", "divergence from the teacher", _BLUE)
    _line(run, axes, "train/feature_std", "spread of the features", _GREEN, "--")
    axes.set_ylim(bottom=0)


def _draw_detection_losses(run: _Recorded, axes: Axes) -> None:
    title(axes, "losses of proposals and boxes")
    looks = {
        "train/loss_objectness": ("proposals: object?", _BLUE, "--"),
        "train/loss_rpn_box_reg": ("proposals: box", _ORANGE, "--"),
        "train/loss_classifier": ("object?", _BLUE, "-"),
        "train/loss_box_reg": ("box", _ORANGE, "-"),
    }
    for name, (label, colour, dashes) in looks.items():
        _line(run, axes, name, label, colour, dashes)
    axes.set_ylim(bottom=0)


def _draw_probes(run: _Recorded, axes: Axes) -> None:
    title(axes, "probes")
    looks = {
        "probe/corloc": ("CorLoc", _BLUE, "-"),
        "probe/knn": ("neighbours", _ORANGE, "--"),
        "probe/ap50": ("AP50", _GREEN, "-"),
        "probe/ar_100": ("AR@100", _PURPLE, "--"),
    }
    for name, (label, colour, dashes) in looks.items():
        _line(run, axes, name, label, colour, dashes)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


_PANELS: tuple[tuple[Callable[[_Recorded, Axes], None], str], ...] = (
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


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=FAINT, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=PALE)


def _line(
    run: _Recorded, axes: Axes, name: str, label: str, colour: str, dashes: str = "-"
) -> None:
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
            labelcolor=INK, handlelength=1.8, handletextpad=0.5, columnspacing=1.0,
        )  # fmt: skip
