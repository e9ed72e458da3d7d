"""Detection numbers: lines for people, JSON for programs, and precision over recall drawn.

Every AP names its rule for difficult objects: with another it may be ten points off.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.evaluation.all_boxes import DetectionEvaluation
from pipeline.evaluation.average_precision import MAX_BOXES, RecallGroup
from pipeline.evaluation.class_matching import ClassMatching

RULES = {
    "drop": "difficult objects dropped",
    "ignore": "difficult objects ignored",
    "keep": "difficult objects kept",
}
_ROWS = (
    ("AP50", "ap50"),
    ("AP75", "ap75"),
    ("AP", "ap"),
    ("APs / APm / APl", "ap_small", "ap_medium", "ap_large"),
    ("AR@1 / 10 / 100", "ar_1", "ar_10", "ar_100"),
)


def print_detection_report(evaluation: DetectionEvaluation, console: Console) -> None:
    """The headline, the table, and whatever the reader has to know to trust them."""
    rule = RULES[evaluation.options.difficult]
    stats, interval = evaluation.precision.stats, evaluation.interval
    span = f", 95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    console.print(
        f"[bold]AP50 {_shown(stats['ap50'], 2)} %[/] ({rule}){span}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"COCO (%), {rule}", overflow="fold")
    table.add_column("", justify="right", overflow="fold")
    for title, *names in _ROWS:
        table.add_row(title, " / ".join(_shown(stats[name], 1) for name in names))
    console.print(table)
    for line in _remarks(evaluation):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if evaluation.classes:
        _print_classes(evaluation.classes, console)
    console.print()


def detection_json(evaluation: DetectionEvaluation) -> dict[str, Any]:
    """Every number, ready for ``json.dumps``: percent with three decimals; null, never -1."""
    counts = evaluation.box_counts
    return {
        "difficult": evaluation.options.difficult,
        "scores": evaluation.options.scores,
        **{name: _percent(value) for name, value in evaluation.precision.stats.items()},
        "ap50_interval": evaluation.interval and [_percent(end) for end in evaluation.interval],
        "ap50_num_resamples": evaluation.num_resamples,
        "num_images": len(evaluation.truths),
        "num_objects": evaluation.precision.num_objects,
        "num_crowds": sum(len(truth.crowds_M4) for truth in evaluation.truths),
        "max_boxes": MAX_BOXES,
        "recall_by_num_objects": {
            name: {
                "recall": _percent(group.num_found / group.num_objects),
                "num_found": group.num_found,
                "num_objects": group.num_objects,
                "num_images": group.num_images,
            }
            for name, group in evaluation.recall.items()
        },
        "boxes_per_image": {
            "total": counts.total,
            "mean": round(counts.mean, 3),
            "median": counts.median,
            "most": counts.most,
            "images_by_num_boxes": counts.groups,
        },
        "classes": evaluation.classes and _classes_json(evaluation.classes),
        "warnings": list(evaluation.warnings),
        "sha256": evaluation.hashes,
    }


def _classes_json(matching: ClassMatching) -> dict[str, Any]:
    return {
        "metric": "VOC, all points, IoU > 0.5, difficult objects ignored",
        "mean_ap50": _percent(matching.mean_ap50),
        "ap50": {name: _percent(value) for name, value in matching.ap50_of.items()},
        "cluster_of": matching.cluster_of,
        "class_names": list(matching.classes),
        "cluster_labels": list(matching.clusters),
        "ap50_matrix": [[_percent(value) for value in row] for row in matching.ap50_KC.tolist()],
    }


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else round(100 * fraction, 3)


def _shown(fraction: float | None, decimals: int) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.{decimals}f}"


def _remarks(evaluation: DetectionEvaluation) -> Iterator[str]:
    counts = evaluation.box_counts
    yield (
        f"{evaluation.precision.num_objects:,} objects and {counts.total:,} boxes in "
        f"{len(evaluation.truths):,} images ({RULES[evaluation.options.difficult]})."
    )
    if evaluation.options.scores == "equal":
        yield "Every box scores 1: equal ones stand in the order of the images."
    yield (
        f"Boxes per image: {counts.mean:.1f} on average, {counts.median:g} in the middle, "
        f"{counts.most} at most."
    )
    yield "Images by boxes: " + ", ".join(f"{n} with {name}" for name, n in counts.groups.items())
    for name, group in evaluation.recall.items():
        yield _recall_line(name, group)
    if counts.num_over_limit:
        yield (
            f"{counts.num_over_limit} images have over {MAX_BOXES} boxes: their best {MAX_BOXES} "
            "count."
        )
    yield from (f"WARNING: {line}" for line in evaluation.warnings)


def _recall_line(name: str, group: RecallGroup) -> str:
    return (
        f"Recall on images with {name} object{'' if name == '1' else 's'}: "
        f"{100 * group.num_found / group.num_objects:.1f} "
        f"({group.num_found}/{group.num_objects}, {group.num_images} images)"
    )


def _print_classes(matching: ClassMatching, console: Console) -> None:
    console.print(
        f"\n[bold]Mean AP50 over classes {100 * matching.mean_ap50:.2f} %[/] (VOC metric, "
        f"difficult objects ignored; {len(matching.clusters)} clusters on "
        f"{len(matching.classes)} classes)",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("class", "cluster", "AP50 (%)"):
        table.add_column(title, justify="left" if title == "class" else "right", overflow="fold")
    for name, ap50 in matching.ap50_of.items():
        cluster = matching.cluster_of[name]
        # The name is the annotator's: rich would read square brackets in it.
        shown = name.replace("[", "\\[")
        table.add_row(shown, "none" if cluster is None else str(cluster), f"{100 * ap50:.1f}")
    console.print(table)
    without = sum(cluster is None for cluster in matching.cluster_of.values())
    if without:
        console.print(f"  WARNING: {without} classes have no cluster left: they count as 0.")


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
