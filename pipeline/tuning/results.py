"""What a sweep came to: the table, the best settings, which knob matters, and their files.

To write one more file: a line in ``result_files``.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from pipeline.drawing.figures import BLUE, ORANGE, new_figure, png, quiet
from pipeline.drawing.tables import csv_table, markdown_table
from pipeline.tuning.proposals import direction_of, frozen
from pipeline.tuning.space import Space, Span
from pipeline.tuning.trials import Trial, best_of
from pipeline.tuning.tuned_job import Tree, best_yaml

_COLUMNS, _INCHES = 3, (4.2, 3.0)
_MARKS = {"ok": ("o", BLUE, "to the end"), "stopped": ("x", ORANGE, "stopped")}
_MOST_LABELS = 12


def slices_png(space: Space, trials: Sequence[Trial]) -> bytes:
    """A panel per knob: each trial's metric over the knob's value, where the knob counted."""
    names = [name for name in space.knobs if any(name in one.values for one in trials)]
    names += sorted({name for one in trials for name in one.values} - set(space.knobs))
    rows = max(1, math.ceil(len(names) / _COLUMNS))
    columns = min(_COLUMNS, max(1, len(names)))
    figure = new_figure(_INCHES[0] * columns, _INCHES[1] * rows)
    first: Axes | None = None
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1, sharey=first)
        first = first or axes
        _slice(axes, space, name, trials)
        if place % columns == 0:
            axes.set_ylabel(space.metric)
        if place == 0 and any(one.status == "stopped" for one in trials):
            axes.legend(fontsize=7, loc="best")
    return png(figure)


def importance_png(weights: Mapping[str, float], metric: str) -> bytes:
    """A bar per knob, the most important above."""
    figure = new_figure(6.0, 0.8 + 0.35 * len(weights))
    axes = figure.add_subplot()
    names = list(weights)[::-1]
    axes.barh(names, [weights[name] for name in names], color=BLUE)
    axes.set_xlabel(f"importance for {metric} (PED-ANOVA, shares)")
    quiet(axes, "x")
    return png(figure)


def _slice(axes: Axes, space: Space, name: str, trials: Sequence[Trial]) -> None:
    quiet(axes, "both", frame=True)
    knob = space.knobs.get(name)
    seen = [one.values[name] for one in trials if name in one.values]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in seen)
    order = sorted(set(seen)) if numeric else list(dict.fromkeys(map(str, seen)))
    for status, (mark, colour, label) in _MARKS.items():
        shown = [
            one
            for one in trials
            if one.status == status and one.metric is not None and name in one.values
        ]
        if not shown:
            continue
        across = [
            one.values[name] if numeric else order.index(str(one.values[name])) for one in shown
        ]
        heights = [one.metric or 0.0 for one in shown]
        axes.scatter(across, heights, s=16, marker=mark, color=colour, alpha=0.7, label=label)
    if not numeric:
        axes.set_xticks(range(len(order)), [text[:_MOST_LABELS] for text in order], fontsize=7)
        axes.set_xlim(-0.5, len(order) - 0.5)
    elif isinstance(knob, Span) and knob.log:
        axes.set_xscale("log")
    axes.set_xlabel(name, fontsize=8)


SHOWN = 10
_RATES = ("corloc", "accuracy", "knn", "ap", "ap50", "mean_best_iou")
FEWEST_FOR_IMPORTANCE = 8
"""With fewer finished trials any importance would be noise; none is told."""


def result_files(space: Space, base: Tree, trials: Sequence[Trial]) -> dict[str, bytes]:
    """The files of a sweep's results by name; without a trial that ended well only its tables."""
    best = best_of(space, tuple(trials))
    titles, rows = _rows(space, trials)
    files = {
        "table.md": markdown_table(titles, rows).encode(),
        "trials.csv": csv_table(titles, rows).encode(),
    }
    if best is None:
        return files
    text, _ = best_yaml(space, base, best.values)
    header = f"# {space.metric} {best.metric:.6g}, trial {best.number} of {len(trials)}\n"
    files["best.yaml"] = (header + text).encode()
    weights = importance(space, trials)
    if weights:
        files["importance.json"] = (json.dumps(weights, indent=1) + "\n").encode()
        files["pictures/importance.png"] = importance_png(weights, space.metric)
    files["pictures/slices.png"] = slices_png(space, trials)
    return files


def importance(space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """Each knob's share in what tells good trials from bad ones, adding to 1, the largest first.

    PED-ANOVA (Watanabe et al., IJCAI 2023), as Optuna has it. Of knobs that do not count in every
    trial it knows nothing: those are left out. Nothing for fewer than ``FEWEST_FOR_IMPORTANCE``.
    """
    import optuna

    ended = [one for one in trials if one.status == "ok" and one.metric is not None]
    if len(ended) < FEWEST_FOR_IMPORTANCE or len({one.metric for one in ended}) < 2:
        return {}
    always = [
        name
        for name in space.knobs
        if all(name in one.values for one in ended)
        and len({json.dumps(one.values[name]) for one in ended}) > 1
    ]
    if not always:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction_of(space))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in ended:
            study.add_trial(frozen(space, one))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=always)
    return {name: float(value) for name, value in found.items()}


def ranked(space: Space, trials: Sequence[Trial]) -> list[Trial]:
    """Finished ones from the best, then stopped and failed ones."""
    order = {"ok": 0, "stopped": 1, "failed": 2}
    sign = -1 if space.mode == "max" else 1
    return sorted(
        trials,
        key=lambda one: (
            order[one.status],
            sign * (one.metric or 0.0),
            one.number,
        ),
    )


def print_results(space: Space, trials: Sequence[Trial], console: Console) -> None:
    """The best trials, and why others failed."""
    table = Table(title=f"best trials by {space.metric} ({space.mode})", title_justify="left")
    table.add_column("trial", justify="right")
    table.add_column(space.metric, justify="right")
    table.add_column("values")
    for one in ranked(space, trials)[:SHOWN]:
        if one.status == "ok":
            table.add_row(
                str(one.number), shown_metric(space.metric, one.metric), shown_values(one)
            )
    if table.row_count:
        console.print(table)
    counts = {name: sum(one.status == name for one in trials) for name in ("stopped", "failed")}
    for name, count in counts.items():
        if count:
            console.print(f"{name}: {count} of {len(trials)} trials", highlight=False)


def shown_metric(name: str, metric: float | None) -> str:
    """For people: rates in %."""
    if metric is None:
        return "-"
    return f"{metric:.1%}" if name.rpartition("/")[2] in _RATES else f"{metric:.4g}"


def shown_values(trial: Trial) -> str:
    """``rule=lost num_candidates=100``."""
    parts = []
    for name, value in trial.values.items():
        short = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name.rpartition('.')[2]}={short}")
    return " ".join(parts)


def _rows(space: Space, trials: Sequence[Trial]) -> tuple[list[str], list[list[Any]]]:
    names = list(dict.fromkeys(name for one in trials for name in one.values))
    header = ["trial", "status", space.metric, "epochs", "seconds", *names, "reason"]
    rows = [
        [
            one.number,
            one.status,
            one.metric,
            one.epochs,
            one.seconds,
            *(one.values.get(name) for name in names),
            one.reason,
        ]
        for one in ranked(space, trials)
    ]
    return header, rows
