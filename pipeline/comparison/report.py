"""Recorded runs -> a paired comparison as tables for people, CSV and JSON for programs, a picture.

``compare_runs`` is the door of jobs/compare_runs.py; to write one more file: a line in ``_files``.

Accuracies are in per cent and their differences in percentage points; everything else in its own
unit. To add a column: ``_cells`` for people, ``_row`` for both CSV and JSON.

The picture: left, a line for each seed from its baseline to its run with DRLoc, and below them
their means; right, the same differences with mean and interval, against 0. Each group has its own
axis on the left, so that a hard data set does not squeeze an easy one; all share the one on the
right.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import mean, stdev
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.comparison.paired import Arm, Comparison, Verdict, compare, is_fraction
from pipeline.comparison.recorded_runs import read_experiment, read_folders
from pipeline.drawing.figures import (
    BLUE,
    DPI,
    FAINT,
    GREY,
    INK,
    ORANGE,
    headline,
    new_figure,
    png,
    quiet,
    title,
)
from pipeline.drawing.tables import csv_table, markdown_table
from pipeline.errors import ConfigError
from pipeline.storage import Location

PICTURE = "comparison.png"

STYLES = {"better": "green", "worse": "red", "no difference shown": "", "too few seeds": "dim"}
# A longer list of seeds or groups says less than its length.
_MOST_LISTED = 8
_WORDS_WIDTH = 14
_NONE = "n/a"


def compare_runs(
    *,
    experiment: str | None,
    runs: str | None,
    tracking_uri: str | None,
    metric: str,
    confidence: float,
    output: str | None,
) -> dict[str, Any]:
    """Print the paired table, write its files, and give every number as JSON values.

    Args:
        experiment: of MLflow, to read the runs from.
        runs: the folder of run folders to read instead.
        tracking_uri: None is ``$MLFLOW_TRACKING_URI``, else sqlite in ``./mlflow.db``.
        metric: what is compared.
        confidence: of the intervals, in (0, 1).
        output: folder (or URI) for table.md, table.csv, comparison.json and comparison.png, which
            are replaced; None writes nothing.

    Raises:
        ConfigError: not exactly one of ``experiment`` and ``runs``, or a URI that is not read.
        DataError: there are no such runs, or none of them pair up.
        StorageError: the runs cannot be read, or the files not written.
    """
    if experiment is not None and runs is None:
        records = read_experiment(experiment, tracking_uri)
    elif runs is not None and experiment is None:
        records = read_folders(runs)
    else:
        raise ConfigError("give --experiment NAME or --runs FOLDER, one of them")
    comparison = compare(records, metric, confidence)
    console = Console(file=sys.stdout)
    # Written first: what is printed last is then the result, whole or not at all.
    folder = None if output is None else Location.parse(output)
    if folder is not None:
        for name, data in _files(comparison).items():
            folder.child(name).write_bytes(data)
    print_report(comparison, console)
    if folder is not None:
        console.print(f"  Written to {folder}\n", highlight=False, markup=False, soft_wrap=True)
    return as_json(comparison)


def _files(comparison: Comparison) -> dict[str, bytes]:
    return {
        "table.md": as_markdown(comparison, PICTURE).encode(),
        "table.csv": as_csv(comparison).encode(),
        "comparison.json": (json.dumps(as_json(comparison), indent=2) + "\n").encode(),
        PICTURE: as_png(comparison),
    }


def print_report(comparison: Comparison, console: Console) -> None:
    """A table for each group, and whatever the reader has to know to trust it."""
    for arms in by_group(comparison.arms):
        console.print(f"\n[bold]{escape(arms[0].group)}[/]", highlight=False, soft_wrap=True)
        console.print(_table(comparison, arms))
    for line in remarks(comparison):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print()


def as_markdown(comparison: Comparison, picture: str | None = None) -> str:
    """The same as Markdown; ``picture`` is the file name of one to show under it."""
    parts = [f"# {comparison.metric}: DRLoc against its paired baseline"]
    titles = _titles(comparison)
    for arms in by_group(comparison.arms):
        rows = [_cells(comparison, arm) for arm in arms]
        table = markdown_table(titles, rows, right=range(1, len(titles) - 1))
        parts += [f"## {arms[0].group}", table.rstrip("\n")]
    parts.append("\n".join(f"- {line}" for line in remarks(comparison)))
    if picture:
        parts.append(f"![Every seed, and the differences with their intervals]({picture})")
    return "\n\n".join(parts) + "\n"


def as_csv(comparison: Comparison) -> str:
    """One line an arm, with a head; lists of numbers are separated by spaces."""
    rows = [_row(comparison, arm) for arm in comparison.arms]
    return csv_table(list(rows[0]), ([_joined(cell) for cell in row.values()] for row in rows))


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Every number, ready for ``json.dumps``; null where there is none, never NaN."""
    return {
        "metric": comparison.metric,
        "unit": unit(comparison),
        "confidence": comparison.confidence,
        "arms": [
            {**_row(comparison, arm), "drloc": dict(arm.drloc), "pair_key": arm.pair_key}
            for arm in comparison.arms
        ],
        "num_arms": len(comparison.arms),
        "num_runs": comparison.num_runs,
        "num_unfinished": comparison.num_unfinished,
        "num_without_metric": comparison.num_without_metric,
        "num_repeated": comparison.num_repeated,
        "largest_repeat_gap": _scaled(comparison, comparison.largest_repeat_gap),
        "lone_groups": list(comparison.lone_groups),
    }


def by_group(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms of each group, in their order."""
    return [list(group) for _, group in groupby(arms, key=lambda arm: arm.pair_key)]


def unit(comparison: Comparison) -> str:
    """``"%"`` for accuracies, else nothing: the metric's own."""
    return "%" if is_fraction(comparison.metric) else ""


def scale(comparison: Comparison) -> float:
    """What the metric is multiplied with before it is shown."""
    return 100.0 if is_fraction(comparison.metric) else 1.0


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1), as far as there are enough values."""
    return mean(values) if values else None, stdev(values) if len(values) > 1 else None


def _titles(comparison: Comparison) -> list[str]:
    """What stands over the columns; a second line of a cell is told by its title's second line."""
    in_unit = "\n(%)" if is_fraction(comparison.metric) else ""
    span = f"{100 * comparison.confidence:g} % interval"
    p = "p\nHolm" if len(comparison.arms) > 1 else "p"
    sides = (f"baseline{in_unit}", f"+DRLoc{in_unit}")
    return ["DRLoc", "seeds", *sides, f"difference\n{span}", p, "sign\nflip", "verdict"]


def _cells(comparison: Comparison, arm: Arm) -> list[str]:
    """What stands under ``_titles``."""
    found, number = arm.difference, _number(comparison)
    difference = f"{scale(comparison) * found.mean:+{number}}" if arm.seeds else _NONE
    if found.interval is not None:
        low, high = (f"{scale(comparison) * end:+{number}}" for end in found.interval)
        difference += f"\n[{low}, {high}]"
    p = _p(found.p_student) + (f"\n{_p(arm.p_holm)}" if len(comparison.arms) > 1 else "")
    sides = [_side(comparison, values) for values in (arm.baseline, arm.treated)]
    verdict = verdict_in_words(comparison, arm)
    return [
        *(arm.setting, str(len(arm.seeds)), *sides),
        *(difference, p, _p(found.p_sign_flip), verdict),
    ]


def verdict_in_words(comparison: Comparison, arm: Arm) -> str:
    """The arm's own verdict, and whether it outlives the number of arms compared."""
    if arm.verdict in ("better", "worse") and arm.verdict_holm != arm.verdict:
        return f"{arm.verdict} alone, not by Holm"
    return arm.verdict


def _table(comparison: Comparison, arms: Sequence[Arm]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0, collapse_padding=True)
    for heading in _titles(comparison):
        # Never cropped: rich's ellipsis would hide digits, and breaks terminals that know ASCII.
        words = heading in ("DRLoc", "verdict")
        table.add_column(heading, justify="left" if words else "right", overflow="fold")
    for arm in arms:
        setting, *numbers, verdict = _cells(comparison, arm)
        # Rich breaks a column that is too wide anywhere, also within words.
        cells = [fill(setting, _WORDS_WIDTH), *numbers, fill(verdict, _WORDS_WIDTH)]
        cells, style = [escape(cell) for cell in cells], STYLES[arm.verdict]
        cells[-1] = f"[{style}]{cells[-1]}[/]" if style else cells[-1]
        table.add_row(*cells)
    return table


def _row(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    """One arm's numbers, under the names they have in CSV and JSON."""
    found = arm.difference
    baseline, treated = spread(arm.baseline), spread(arm.treated)
    low, high = found.interval or (None, None)
    return {
        "group": arm.group,
        "setting": arm.setting,
        "num_seeds": len(arm.seeds),
        "baseline_mean": _scaled(comparison, baseline[0]),
        "baseline_sd": _scaled(comparison, baseline[1]),
        "drloc_mean": _scaled(comparison, treated[0]),
        "drloc_sd": _scaled(comparison, treated[1]),
        "difference_mean": _scaled(comparison, found.mean),
        "difference_sd": _scaled(comparison, found.sd),
        "interval_low": _scaled(comparison, low),
        "interval_high": _scaled(comparison, high),
        "p_student": found.p_student,
        "p_sign_flip": found.p_sign_flip,
        "p_holm": arm.p_holm,
        "verdict": arm.verdict,
        "verdict_holm": arm.verdict_holm,
        "seeds": list(arm.seeds),
        "baseline": [_scaled(comparison, value) for value in arm.baseline],
        "drloc_values": [_scaled(comparison, value) for value in arm.treated],
        "seeds_only_baseline": list(arm.only_baseline),
        "seeds_only_drloc": list(arm.only_treated),
    }


def remarks(comparison: Comparison) -> Iterator[str]:
    """One line each, and only those that say something."""
    yield _how_to_read(comparison)
    if len(comparison.arms) > 1:
        yield (
            f"{len(comparison.arms)} arms were compared: the more, the likelier one looks good by "
            "chance. Holm's p (and the verdict) allows for that, the intervals do not."
        )
    for arm in comparison.arms:
        yield from _arm_remarks(comparison, arm)
    yield from _left_out_remarks(comparison)


def _how_to_read(comparison: Comparison) -> str:
    most = max(len(arm.seeds) for arm in comparison.arms)
    words = f"{comparison.metric}: mean and standard deviation over the paired seeds"
    if is_fraction(comparison.metric):
        words += "; differences in percentage points"
    if most < 2:
        return f"{words}. One seed has no interval: run more with --seed."
    words += "; interval and p are Student's, of the paired difference"
    if (smallest := 2 / 2**most) > 1 - comparison.confidence:
        words += f". With {most} seeds the exact sign-flip test cannot fall below {smallest:g}"
    return words + "."


def _arm_remarks(comparison: Comparison, arm: Arm) -> Iterator[str]:
    name = arm.setting if len(comparison.arms) == 1 else f"{arm.group}, {arm.setting}"
    if len(arm.seeds) == 1:
        yield f"{name}: a single paired seed ({arm.seeds[0]}) has no interval."
    if len(arm.seeds) > 1 and arm.difference.interval is None:
        yield f"{name}: the differences are all the same, so their spread cannot be told."
    for seeds, lacking in ((arm.only_baseline, "DRLoc"), (arm.only_treated, "baseline")):
        if seeds:
            yield f"{name}: seeds without a {lacking} run are left out: {_listed(seeds)}."


def _left_out_remarks(comparison: Comparison) -> Iterator[str]:
    if comparison.num_unfinished:
        yield f"{comparison.num_unfinished} unfinished runs are left out."
    if comparison.num_without_metric:
        yield (
            f"{comparison.num_without_metric} finished runs have no finite {comparison.metric}: "
            "they are left out."
        )
    if comparison.num_repeated:
        gap = scale(comparison) * comparison.largest_repeat_gap
        yield (
            f"{comparison.num_repeated} runs were recorded again; the last one counts, the others "
            f"are up to {gap:{_number(comparison)}} off it."
        )
    groups = comparison.lone_groups
    for group in groups[:_MOST_LISTED]:
        yield f"Not compared: {group}."
    if len(groups) > _MOST_LISTED:
        yield f"Not compared: {len(groups) - _MOST_LISTED} more groups."


def _side(comparison: Comparison, values: Sequence[float]) -> str:
    centre, deviation = spread(values)
    if centre is None:
        return _NONE
    number = _number(comparison)
    text = f"{scale(comparison) * centre:{number}}"
    # Not the plus-minus sign, which terminals that know ASCII alone cannot show.
    return text if deviation is None else f"{text}\nsd {scale(comparison) * deviation:{number}}"


def _number(comparison: Comparison) -> str:
    return ".2f" if is_fraction(comparison.metric) else ".4f"


def _p(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}" if value >= 0.001 else "<0.001"


def _scaled(comparison: Comparison, value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return round(scale(comparison) * value, 6)


def _listed(seeds: Sequence[int]) -> str:
    more = f" and {len(seeds) - _MOST_LISTED} more" if len(seeds) > _MOST_LISTED else ""
    return ", ".join(map(str, seeds[:_MOST_LISTED])) + more


def _joined(cell: Any) -> Any:
    return " ".join(map(str, cell)) if isinstance(cell, list) else cell


COLOURS: dict[Verdict, str] = {
    "better": BLUE,
    "worse": ORANGE,
    "no difference shown": GREY,
    "too few seeds": GREY,
}
MOST_ARMS = 40
"""A picture of more could not be read; the tables have them all."""

# In rows: from an arm's last seed to its means, and from there to the next arm.
_TO_MEAN, _TO_NEXT = 1.15, 1.9
_ROW_INCHES, _GROUP_INCHES, _WIDTH_INCHES = 0.2, 0.75, 11.0
# With more seeds their numbers would overlap: the rows get thinner, and the numbers go.
_MOST_SEEDS_NAMED = 12


def as_png(comparison: Comparison, *, dpi: int = DPI) -> bytes:
    """The picture, as the bytes of a PNG file; the first ``MOST_ARMS`` arms that have a pair."""
    arms = [arm for arm in comparison.arms if arm.seeds]
    groups = by_group(arms[:MOST_ARMS])
    heights = [_GROUP_INCHES + sum(map(_arm_inches, group)) for group in groups]
    figure = new_figure(_WIDTH_INCHES, sum(heights) + 1.0, dpi=dpi)
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
    rows[-1][0].set_xlabel(f"{comparison.metric}{in_unit}", color=INK)
    rows[-1][1].set_xlabel(f"difference{points}", color=INK)
    headline(figure, _headline(comparison, len(arms)))
    return png(figure)


def _headline(comparison: Comparison, num_arms: int) -> str:
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
    title(left, arms[0].group)
    right.axvline(0, color=INK, linewidth=1, zorder=1)
    for axes in (left, right):
        quiet(axes, "x")
        axes.tick_params(axis="y", labelcolor=INK, labelsize=10)
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
        left.plot(before, y, "o", color=FAINT, markerfacecolor="white", zorder=3, markersize=5)
        left.plot(after, y, "o", color=colour, markersize=5, zorder=4)
        right.plot(after - before, y, "o", color=colour, alpha=0.55, markersize=4.5, zorder=3)
        if len(arm.seeds) <= _MOST_SEEDS_NAMED:
            _beside(left, y, f"seed {seed}", FAINT, 7)
    before, after = factor * mean(arm.baseline), factor * mean(arm.treated)
    left.plot([before, after], [rows[1]] * 2, color=colour, linewidth=2.6, zorder=2)
    left.plot(before, rows[1], "D", color=FAINT, markerfacecolor="white", zorder=3, markersize=7)
    left.plot(after, rows[1], "D", color=colour, markersize=7, zorder=4)
    _beside(left, rows[1], "mean", INK, 8)
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
