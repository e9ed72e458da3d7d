"""A reproduced table as one picture: figures on the left, gains on the right, the paper's and ours.

Drawn with matplotlib's objects: no global state is touched, so it may run in any thread.
"""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.reproduction.lines import Line
from pipeline.reproduction.report import Report

MOST_LINES = 60
"""A picture of more could not be read; the tables have them all."""

# Told apart by readers who see few colours, and in print.
_OURS, _PAPER, _INK, _PALE = "#0072b2", "#d55e00", "#1c1e22", "#e6e8eb"
_ROW_INCHES, _WIDTH_INCHES, _HEAD_INCHES = 0.26, 11.0, 1.4


def as_png(report: Report, *, dpi: int = 150) -> bytes:
    """The picture, as the bytes of a PNG file; first the lines that have a figure of ours."""
    lines = sorted(report.lines, key=lambda line: line.measured is None)[:MOST_LINES]
    figure = Figure(
        (_WIDTH_INCHES, _HEAD_INCHES + _ROW_INCHES * len(lines)),
        dpi=dpi,
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08),
    )
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    _draw_figures(left, lines)
    _draw_gains(right, lines)
    for axes in (left, right):
        axes.grid(axis="x", color=_PALE)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False, colors=_INK)
    left.set_yticks(range(len(lines)), [line.cell.words for line in lines], fontsize=8)
    left.set_ylim(len(lines) - 0.5, -0.5)
    shown = f" (the first {MOST_LINES})" if len(report.lines) > MOST_LINES else ""
    figure.suptitle(f"{report.title}{shown}", x=0.01, ha="left", color=_INK, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_figures(axes: Axes, lines: Sequence[Line]) -> None:
    paper = [
        (place, line.cell.published.value)
        for place, line in enumerate(lines)
        if line.cell.published
    ]
    ours = [(place, line.measured) for place, line in enumerate(lines) if line.measured]
    axes.scatter(
        [x for _, x in paper],
        [y for y, _ in paper],
        marker="D",
        facecolors="none",
        edgecolors=_PAPER,
        label="paper",
        zorder=3,
    )
    axes.scatter(
        [one.value for _, one in ours],
        [y for y, _ in ours],
        color=_OURS,
        s=24,
        label="ours",
        zorder=4,
    )
    for place, one in ours:
        if one.interval is not None:
            axes.plot(one.interval, [place, place], color=_OURS, lw=1.5)
    axes.set_xlabel("figure (%)", color=_INK)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8)


def _draw_gains(axes: Axes, lines: Sequence[Line]) -> None:
    axes.axvline(0, color=_INK, lw=0.8)
    for place, line in enumerate(lines):
        if line.published_gain is not None:
            axes.scatter(
                line.published_gain,
                place,
                marker="D",
                facecolors="none",
                edgecolors=_PAPER,
                zorder=3,
            )
        if line.gain is not None:
            axes.scatter(line.gain.value, place, color=_OURS, s=24, zorder=4)
            if line.gain.interval is not None:
                axes.plot(line.gain.interval, [place, place], color=_OURS, lw=1.5)
    axes.set_xlabel("gain over the compared row (percentage points), 95 % interval", color=_INK)
