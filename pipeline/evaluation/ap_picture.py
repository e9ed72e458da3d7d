"""Precision over recall as one picture, at IoU 0.5 and 0.75.

Drawn with matplotlib's objects: no global state is touched, so it may run in any thread.
"""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from pipeline.evaluation.ap_report import RULES
from pipeline.evaluation.evaluate_detections import DetectionEvaluation

# Told apart by readers who see few colours, and by their dashes in print.
_LOOKS = {0.5: ("#0072b2", "-", "ap50"), 0.75: ("#d55e00", "--", "ap75")}
_INK, _FAINT, _PALE = "#1c1e22", "#69707a", "#e6e8eb"


def precision_recall_png(evaluation: DetectionEvaluation, *, dpi: int = 150) -> bytes:
    """The picture as the bytes of a PNG file; without objects it says so."""
    figure = Figure((6.4, 4.8), dpi=dpi, layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    recalls_Q = np.linspace(0, 1, 101)
    for at, precision_Q in evaluation.precision.precision_Q.items():
        colour, dashes, name = _LOOKS[at]
        value = evaluation.precision.stats[name] or 0.0
        label = f"IoU {at:g}: AP {100 * value:.1f}"
        if name == "ap50" and evaluation.interval:
            low, high = evaluation.interval
            label += f" [{100 * low:.1f}, {100 * high:.1f}]"
        axes.plot(recalls_Q, precision_Q, dashes, color=colour, linewidth=1.8, label=label)
    if evaluation.precision.precision_Q:
        axes.legend(fontsize=9, frameon=False, labelcolor=_INK)
    else:
        axes.text(0.5, 0.5, "no object", ha="center", va="center", color=_FAINT)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    for axis, title in ((axes.xaxis, "recall"), (axes.yaxis, "precision, as COCO interpolates it")):
        axis.set_major_formatter(PercentFormatter(1.0))
        axis.set_label_text(title, color=_FAINT, fontsize=9)
    axes.grid(color=_PALE, linewidth=0.8)
    axes.tick_params(length=0, labelcolor=_FAINT, labelsize=8)
    axes.spines[:].set_color(_PALE)
    axes.set_title(
        f"{evaluation.precision.num_objects:,} objects, {evaluation.box_counts.total:,} boxes, "
        f"{len(evaluation.truths):,} images; {RULES[evaluation.options.difficult]}",
        loc="left",
        fontsize=10,
        color=_INK,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
