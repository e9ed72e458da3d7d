"""A reproduced table for people (terminal, Markdown, a picture) and for programs (CSV).

To add a column: ``_TITLES`` and ``_cells`` for people, ``_row`` for CSV. The picture has figures on
the left and gains on the right, the paper's and ours.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from pipeline.drawing.figures import BLUE, DPI, INK, ORANGE, headline, new_figure, png, quiet
from pipeline.drawing.tables import csv_table, markdown_table
from pipeline.reproduction.measured import Line

_NONE = "-"
_TITLES = (
    *("row", "paper (%)", "ours (%)", "ours - paper", "paper's gain"),
    *("our gain [95 %]", "p, Holm", "n", "state"),
)
_NUMBERS = range(1, 8)
# A longer table, most of it without data, would hide what there is.
_MOST_SHOWN = 20


@dataclass(frozen=True)
class Report:
    """A reproduced table.

    Attributes:
        title: for people.
        lines: in the table's order.
        notes: what the reader has to know.
    """

    title: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def print_report(report: Report, console: Console) -> None:
    """The table, and its notes; of a long one the lines without a figure of ours are summed up."""
    grid = Grid(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for place, title in enumerate(_TITLES):
        grid.add_column(title, justify="right" if place in _NUMBERS else "left", overflow="fold")
    shown, summed_up = _shown(report)
    for line in shown:
        style = "" if line.state == "ok" else "dim"
        grid.add_row(*(escape(text) for text in _cells(line)), style=style)
    console.print(f"\n[bold]{escape(report.title)}[/]", highlight=False, soft_wrap=True)
    console.print(grid)
    for note in (*summed_up, *_notes(report)):
        console.print(f"  {note}", highlight=False, markup=False, soft_wrap=True)


def as_markdown(report: Report, picture: str) -> str:
    """The same as Markdown, with the sources of the paper's figures.

    Args:
        report: to be written.
        picture: file name of the picture to show under it.
    """
    table = markdown_table(_TITLES, map(_cells, report.lines), right=_NUMBERS)
    figures = [line.cell.published for line in report.lines if line.cell.published]
    sources = dict.fromkeys(figure.source for figure in figures)
    parts = [
        f"# {report.title}",
        table.rstrip("\n"),
        "\n".join(f"- {note}" for note in _notes(report)),
        f"![The paper's gain and ours]({picture})",
        "The paper's figures:\n\n" + "\n".join(f"- {source}" for source in sources),
    ]
    return "\n\n".join(parts) + "\n"


def as_csv(report: Report) -> str:
    """One line a cell, with a head; the values of the seeds are separated by spaces."""
    rows = [_row(line) for line in report.lines]
    return csv_table(list(rows[0]), (row.values() for row in rows))


def _notes(report: Report) -> list[str]:
    gains = [line.gain for line in report.lines if line.gain is not None]
    notes = list(report.notes)
    if any(gain.p is not None for gain in gains):
        notes.append(
            "A gain is the mean paired difference over seeds with Student's interval; Holm's p "
            "allows for the number of rows, the intervals do not."
        )
    if any(gain.interval is None for gain in gains):
        notes.append("A gain without an interval is of one seed, or the same in all.")
    missing = sum(line.measured is None for line in report.lines)
    if missing:
        notes.append(f"{missing} of {len(report.lines)} rows have no figure of ours: see state.")
    return notes


def _shown(report: Report) -> tuple[list[Line], list[str]]:
    """The lines that a terminal shows, and a note on each kind of the others."""
    if len(report.lines) <= _MOST_SHOWN:
        return list(report.lines), []
    left_out = Counter(line.state for line in report.lines if line.measured is None)
    notes = [f"Not shown here, {count} rows: {state}." for state, count in left_out.items()]
    return [line for line in report.lines if line.measured is not None], notes


def _cells(line: Line) -> list[str]:
    """What stands under ``_TITLES``."""
    figure, ours, gain = line.cell.published, line.measured, line.gain
    paper = _NONE if figure is None else f"{figure.value:.2f}{_spread(figure.spread)}"
    off = _NONE
    if figure is not None and ours is not None:
        off = f"{ours.value - figure.value:+.2f}{_interval(ours.interval, figure.value)}"
    return [
        line.cell.words,
        paper,
        _NONE if ours is None else f"{ours.value:.2f}{_spread(ours.spread)}{_reach(line)}",
        off,
        _NONE if line.published_gain is None else f"{line.published_gain:+.2f}",
        _NONE if gain is None else f"{gain.value:+.2f}{_interval(gain.interval)}",
        _NONE if line.p_holm is None else f"{line.p_holm:.3f}",
        _count(line),
        line.state,
    ]


def _spread(spread: float | None) -> str:
    return "" if spread is None else f" sd {spread:.2f}"


def _reach(line: Line) -> str:
    """The interval of a figure over photos; a mean over seeds shows its spread instead."""
    if line.measured is None or line.measured.by_seed or line.measured.interval is None:
        return ""
    low, high = line.measured.interval
    return f" [{low:.2f}, {high:.2f}]"


def _interval(interval: tuple[float, float] | None, minus: float = 0.0) -> str:
    if interval is None:
        return ""
    low, high = (end - minus for end in interval)
    return f" [{low:+.2f}, {high:+.2f}]"


def _count(line: Line) -> str:
    if line.measured is None:
        return _NONE
    seeds = len(line.measured.by_seed)
    return f"{seeds} seed{'s' * (seeds > 1)}" if seeds else f"{line.num_photos} photos"


def _row(line: Line) -> dict[str, Any]:
    """One cell's numbers, under the names they have in CSV."""
    figure, ours, gain = line.cell.published, line.measured, line.gain
    low, high = (ours.interval if ours else None) or (None, None)
    gain_low, gain_high = (gain.interval if gain else None) or (None, None)
    return {
        "row": line.cell.name,
        "words": line.cell.words,
        "metric": line.cell.metric,
        "compared_with": line.cell.base,
        "paper": figure.value if figure else None,
        "paper_sd": figure.spread if figure else None,
        "paper_gain": _rounded(line.published_gain),
        "ours": _rounded(ours.value) if ours else None,
        "ours_sd": _rounded(ours.spread) if ours else None,
        "ours_low": _rounded(low),
        "ours_high": _rounded(high),
        "gain": _rounded(gain.value) if gain else None,
        "gain_low": _rounded(gain_low),
        "gain_high": _rounded(gain_high),
        "p": gain.p if gain else None,
        "p_holm": line.p_holm,
        "num_pairs": gain.num_pairs if gain else None,
        "num_photos": line.num_photos,
        "seeds": " ".join(map(str, ours.by_seed)) if ours else "",
        "by_seed": " ".join(f"{value:.4f}" for value in ours.by_seed.values()) if ours else "",
        "state": line.state,
        "source": figure.source if figure else "",
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


MOST_LINES = 60
"""A picture of more could not be read; the tables have them all."""

_ROW_INCHES, _WIDTH_INCHES, _HEAD_INCHES = 0.26, 11.0, 1.4


def as_png(report: Report, *, dpi: int = DPI) -> bytes:
    """The picture, as the bytes of a PNG file; first the lines that have a figure of ours."""
    lines = sorted(report.lines, key=lambda line: line.measured is None)[:MOST_LINES]
    figure = new_figure(_WIDTH_INCHES, _HEAD_INCHES + _ROW_INCHES * len(lines), dpi=dpi)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    for axes in (left, right):
        quiet(axes, "x")
        axes.spines["bottom"].set_visible(True)
    _draw_figures(left, lines)
    _draw_gains(right, lines)
    left.set_yticks(range(len(lines)), [line.cell.words for line in lines], color=INK)
    left.set_ylim(len(lines) - 0.5, -0.5)
    shown = f" (the first {MOST_LINES})" if len(report.lines) > MOST_LINES else ""
    headline(figure, f"{report.title}{shown}")
    return png(figure)


def _draw_figures(axes: Axes, lines: Sequence[Line]) -> None:
    # Empty ones first: the legend names each colour once, also where there is no point of it.
    _papers(axes, [], [], label="paper")
    _ours(axes, [], [], label="ours")
    for place, line in enumerate(lines):
        if line.cell.published is not None:
            _papers(axes, [line.cell.published.value], [place])
        if line.measured is not None:
            _ours(axes, [line.measured.value], [place], line.measured.interval)
    axes.set_xlabel("figure (%)", color=INK)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8)


def _draw_gains(axes: Axes, lines: Sequence[Line]) -> None:
    axes.axvline(0, color=INK, lw=0.8)
    for place, line in enumerate(lines):
        if line.published_gain is not None:
            _papers(axes, [line.published_gain], [place])
        if line.gain is not None:
            _ours(axes, [line.gain.value], [place], line.gain.interval)
    axes.set_xlabel("gain over the compared row (percentage points), 95 % interval", color=INK)


def _papers(axes: Axes, x: list[float], y: list[int], *, label: str | None = None) -> None:
    axes.scatter(x, y, marker="D", facecolors="none", edgecolors=ORANGE, label=label, zorder=3)


def _ours(
    axes: Axes,
    x: list[float],
    y: list[int],
    interval: tuple[float, float] | None = None,
    *,
    label: str | None = None,
) -> None:
    axes.scatter(x, y, color=BLUE, s=24, label=label, zorder=4)
    if interval is not None:
        axes.plot(interval, [*y, *y], color=BLUE, lw=1.5)
