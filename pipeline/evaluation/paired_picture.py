"""A paired comparison as one picture: every seed's two runs, and the differences beside them.

Left, a line for each seed from its baseline to its run with DRLoc, and below them their means;
right, the same differences with mean and interval, against 0. Each group has its own axis on the
left, so that a hard data set does not squeeze an easy one; all share the one on the right. Drawn
with matplotlib's objects: no global state is touched, so it may run in any thread.
"""

import io
from collections.abc import Iterator, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.evaluation.paired_difference import Verdict
from pipeline.evaluation.paired_report import by_group, scale, verdict_in_words
from pipeline.evaluation.paired_runs import Arm, Comparison, is_fraction

# Told apart by readers who see few colours, and in print.
COLOURS: dict[Verdict, str] = {
    "better": "#0072b2",
    "worse": "#d55e00",
    "no difference shown": "#59606a",
    "too few seeds": "#59606a",
}
MOST_ARMS = 40
"""A picture of more could not be read; the tables have them all."""

_INK, _FAINT, _PALE = "#1c1e22", "#69707a", "#e6e8eb"
# In rows: from an arm's last seed to its means, and from there to the next arm.
_TO_MEAN, _TO_NEXT = 1.15, 1.9
_ROW_INCHES, _GROUP_INCHES, _WIDTH_INCHES = 0.2, 0.75, 11.0
# With more seeds their numbers would overlap: the rows get thinner, and the numbers go.
_MOST_SEEDS_NAMED = 12


def as_png(comparison: Comparison, *, dpi: int = 150) -> bytes:
    """The picture, as the bytes of a PNG file; the first ``MOST_ARMS`` arms that have a pair."""
    arms = [arm for arm in comparison.arms if arm.seeds]
    groups = by_group(arms[:MOST_ARMS])
    heights = [_GROUP_INCHES + sum(map(_arm_inches, group)) for group in groups]
    figure = Figure(
        (_WIDTH_INCHES, sum(heights) + 1.0),
        dpi=dpi,
        layout=ConstrainedLayoutEngine(h_pad=0.08, hspace=0.02),
    )
    FigureCanvasAgg(figure)
    rows = figure.subplots(
        len(groups), 2, squeeze=False, height_ratios=heights, width_ratios=[3, 2], sharey="row"
    )
    for group, (left, right) in zip(groups, rows, strict=True):
        _draw_group(comparison, group, left, right)
        right.sharex(rows[0][1])
    _widen(rows[0][1], arms[:MOST_ARMS], comparison)
    in_unit, points = (
        (" (%)", " (percentage points)") if is_fraction(comparison.metric) else ("",) * 2
    )
    rows[-1][0].set_xlabel(f"{comparison.metric}{in_unit}", color=_INK)
    rows[-1][1].set_xlabel(f"difference{points}", color=_INK)
    figure.suptitle(_title(comparison, len(arms)), x=0.01, ha="left", color=_INK, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _title(comparison: Comparison, num_arms: int) -> str:
    shown = f" (the first {MOST_ARMS} of {num_arms} arms)" if num_arms > MOST_ARMS else ""
    return (
        f"From the baseline (hollow) to +DRLoc, seed by seed{shown}; "
        f"right: mean and {100 * comparison.confidence:g} % interval of the paired difference"
    )


def _row_height(arm: Arm) -> float:
    """Of one seed, in rows: many seeds lie closer together."""
    return min(1.0, _MOST_SEEDS_NAMED / len(arm.seeds))


def _arm_inches(arm: Arm) -> float:
    return _ROW_INCHES * (len(arm.seeds) * _row_height(arm) + _TO_MEAN + _TO_NEXT)


def _draw_group(comparison: Comparison, arms: Sequence[Arm], left: Axes, right: Axes) -> None:
    """Draw the arms of one group under each other, the first on top."""
    top, labels = 0.0, {}
    for arm in arms:
        bottom = top + (len(arm.seeds) - 1) * _row_height(arm) + _TO_MEAN
        _draw_arm(comparison, arm, (left, right), (top, bottom))
        labels[(top + bottom) / 2] = arm.setting
        top = bottom + _TO_NEXT
    left.set_ylim(bottom + 0.9, -0.9)
    left.set_yticks(list(labels), [_broken(label) for label in labels.values()])
    left.set_title(arms[0].group, loc="left", fontsize=10, fontweight="bold", color=_INK)
    right.axvline(0, color=_INK, linewidth=1, zorder=1)
    for axes in (left, right):
        axes.grid(axis="x", color=_PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.tick_params(axis="x", color=_PALE, labelcolor=_FAINT, labelsize=9)
        axes.spines[:].set_visible(False)
    right.tick_params(axis="y", labelleft=False)
    left.margins(x=0.06)


def _draw_arm(
    comparison: Comparison, arm: Arm, panels: tuple[Axes, Axes], rows: tuple[float, float]
) -> None:
    left, right = panels
    colour, factor = COLOURS[arm.verdict], scale(comparison)
    for index, (seed, before, after) in enumerate(_seeds(comparison, arm)):
        y = rows[0] + index * _row_height(arm)
        left.plot([before, after], [y, y], color=colour, alpha=0.45, linewidth=1.4, zorder=2)
        left.plot(before, y, "o", color=_FAINT, markerfacecolor="white", zorder=3, markersize=5)
        left.plot(after, y, "o", color=colour, markersize=5, zorder=4)
        right.plot(after - before, y, "o", color=colour, alpha=0.55, markersize=4.5, zorder=3)
        if len(arm.seeds) <= _MOST_SEEDS_NAMED:
            _beside(left, y, f"seed {seed}", _FAINT, 7)
    before, after = factor * mean(arm.baseline), factor * mean(arm.treated)
    left.plot([before, after], [rows[1]] * 2, color=colour, linewidth=2.6, zorder=2)
    left.plot(before, rows[1], "D", color=_FAINT, markerfacecolor="white", zorder=3, markersize=7)
    left.plot(after, rows[1], "D", color=colour, markersize=7, zorder=4)
    _beside(left, rows[1], "mean", _INK, 8)
    if arm.difference.interval is not None:
        ends = [factor * end for end in arm.difference.interval]
        right.plot(ends, [rows[1]] * 2, "|-", color=colour, linewidth=2.6, markersize=10, zorder=3)
    right.plot(factor * arm.difference.mean, rows[1], "D", color=colour, markersize=7, zorder=4)
    told = f"{factor * arm.difference.mean:+.2f}\n{_broken(verdict_in_words(comparison, arm))}"
    right.text(
        1.03, rows[1], told, color=colour, fontsize=9, va="center",
        transform=right.get_yaxis_transform(),
    )  # fmt: skip


def _seeds(comparison: Comparison, arm: Arm) -> Iterator[tuple[int, float, float]]:
    factor = scale(comparison)
    for seed, before, after in zip(arm.seeds, arm.baseline, arm.treated, strict=True):
        yield seed, factor * before, factor * after


def _beside(axes: Axes, y: float, text: str, colour: str, size: float) -> None:
    axes.text(
        1.015, y, text, color=colour, fontsize=size, va="center",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip


def _widen(axes: Axes, arms: Sequence[Arm], comparison: Comparison) -> None:
    """Have the shared axis of differences hold every seed, the intervals and 0.

    Two seeds give intervals twelve times as wide as their spread: ends far outside are cut off,
    or nobody could tell the other arms' differences from 0.
    """
    factor = scale(comparison)
    seen = [0.0, *(after - before for arm in arms for _, before, after in _seeds(comparison, arm))]
    ends = [factor * end for arm in arms for end in arm.difference.interval or ()]
    reach = 4 * max(max(seen) - min(seen), 1e-9)
    low = max(min([*seen, *ends]), min(seen) - reach)
    high = min(max([*seen, *ends]), max(seen) + reach)
    margin = 0.06 * max(high - low, 1e-9)
    axes.set_xlim(low - margin, high + margin)


def _broken(text: str) -> str:
    """``text`` with a new line after each comma."""
    return text.replace(", ", ",\n")
