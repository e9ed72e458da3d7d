"""A sweep as PNG bytes: the metric over each knob, and how much each knob matters.

Drawn with matplotlib's objects, so that no global state is touched.
"""

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.tuning.space import Space, Span
from pipeline.tuning.trials import Trial

_BLUE, _ORANGE, _FAINT = "#0072b2", "#d55e00", "#69707a"
_COLUMNS, _INCHES, _DPI = 3, (4.2, 3.0), 130
_MARKS = {"ok": ("o", _BLUE, "to the end"), "stopped": ("x", _ORANGE, "stopped")}
_MOST_LABELS = 12


def slices_png(space: Space, trials: Sequence[Trial]) -> bytes:
    """A panel per knob: each trial's metric over the knob's value, where the knob counted."""
    names = [name for name in space.knobs if any(name in one.values for one in trials)]
    names += sorted({name for one in trials for name in one.values} - set(space.knobs))
    rows = max(1, math.ceil(len(names) / _COLUMNS))
    columns = min(_COLUMNS, max(1, len(names)))
    figure = Figure(figsize=(_INCHES[0] * columns, _INCHES[1] * rows), layout="constrained")
    first: Axes | None = None
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1, sharey=first)
        first = first or axes
        _slice(axes, space, name, trials)
        if place % columns == 0:
            axes.set_ylabel(space.metric)
        if place == 0 and any(one.status == "stopped" for one in trials):
            axes.legend(fontsize=7, loc="best")
    return _png(figure)


def importance_png(weights: Mapping[str, float], metric: str) -> bytes:
    """A bar per knob, the most important above."""
    figure = Figure(figsize=(6.0, 0.8 + 0.35 * len(weights)), layout="constrained")
    axes = figure.add_subplot()
    names = list(weights)[::-1]
    axes.barh(names, [weights[name] for name in names], color=_BLUE)
    axes.set_xlabel(f"importance for {metric} (PED-ANOVA, shares)")
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _slice(axes: Axes, space: Space, name: str, trials: Sequence[Trial]) -> None:
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
    axes.tick_params(labelsize=7, colors=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()
