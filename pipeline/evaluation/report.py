"""An evaluation as tables for people, as one JSON object for programs, and as a picture.

One box per image first, then all boxes against all objects, then what their scores are worth. Every
AP names its rule for difficult objects: with another it may be ten points off. To add a number: its
line in the table or in the remarks of its part, and in ``as_json`` or ``detection_json``.

Shape letters:  Q recalls, from 0 to 1 in hundredths   K bins of probability
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.drawing.figures import (
    BLUE,
    DPI,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    new_figure,
    png,
    quiet,
    title,
)
from pipeline.evaluation.all_boxes import DetectionEvaluation
from pipeline.evaluation.average_precision import MAX_BOXES, RecallGroup
from pipeline.evaluation.calibration import Reliability
from pipeline.evaluation.class_matching import ClassMatching
from pipeline.evaluation.corloc import THRESHOLD
from pipeline.evaluation.one_box import BASELINES, THRESHOLDS, Evaluation, Group, Interval, Score
from pipeline.evaluation.scored_boxes import Ranking, ScoreQuality

TITLES = {
    "full_image": "full image",
    "central_70": "central 70 % box",
    "single_object": "one object",
    "multi_object": "several objects",
}
RULES = {
    "drop": "difficult objects dropped",
    "ignore": "difficult objects ignored",
    "keep": "difficult objects kept",
}
_AP_ROWS = (
    ("AP50", "ap50"),
    ("AP75", "ap75"),
    ("AP", "ap"),
    ("APs / APm / APl", "ap_small", "ap_medium", "ap_large"),
    ("AR@1 / 10 / 100", "ar_1", "ar_10", "ar_100"),
)


def print_report(evaluation: Evaluation, console: Console) -> None:
    """The headline, the table, and whatever the reader has to know to trust them."""
    labels, num_images = evaluation.labels, evaluation.num_images
    low, high = labels.interval
    console.print(
        f"\n[bold]CorLoc {100 * labels.hits / num_images:.3f} %[/] ({labels.hits}/{num_images} "
        f"images), 95 % interval {100 * low:.1f} to {100 * high:.1f}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_table(evaluation))
    for line in _remarks(evaluation):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print()


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Every number, ready for ``json.dumps``: rates and intervals in percent, three decimals.

    ``baselines`` has null for a baseline that could not be computed, never 0.
    """
    baselines = {name: evaluation.baselines.get(name) for name in BASELINES}
    groups = evaluation.groups
    return {
        **_score_json(evaluation.labels, evaluation.num_images),
        "num_images": evaluation.num_images,
        **{f"corloc_{name}": _percent(_rate(group)) for name, group in groups.items()},
        **{f"num_{name}": group.num_images for name, group in groups.items()},
        "baselines": {
            name: score and {**_score_json(score, evaluation.num_images), **_lead_json(score)}
            for name, score in baselines.items()
        },
        "num_missing": evaluation.num_missing,
        "num_unmatched": evaluation.num_unmatched,
        "num_without_objects": evaluation.num_without_objects,
        "num_difficult": evaluation.num_difficult,
        "num_size_unknown": evaluation.num_size_unknown,
        "num_size_differs": evaluation.num_size_differs,
        "statuses": evaluation.statuses,
        **evaluation.provenance,
        "detection": evaluation.detection and detection_json(evaluation.detection),
    }


def _score_json(score: Score, num_images: int) -> dict[str, Any]:
    return {
        "corloc": _percent(score.hits / num_images),
        "hits": score.hits,
        "interval": [_percent(end) for end in score.interval],
        "mean_best_iou": round(score.mean_best_iou, 4),
        **{f"corloc_{round(100 * at)}": _percent(rate) for at, rate in score.at.items()},
    }


def _lead_json(score: Score) -> dict[str, Any]:
    return {
        "labels_minus_this": _percent(score.lead),
        "labels_minus_this_interval": [_percent(end) for end in score.lead_interval],
    }


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else round(100 * fraction, 3)


def _rate(group: Group) -> float | None:
    return group.hits / group.num_images if group.num_images else None


def _table(evaluation: Evaluation) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    # Never cropped: rich's ellipsis would hide digits, and breaks terminals that know ASCII alone.
    table.add_column("CorLoc (%) at IoU", overflow="fold")
    for at in THRESHOLDS:
        style = "bold" if at == THRESHOLD else ""
        table.add_column(f">= {at}", justify="right", style=style, overflow="fold")
    for heading in ("95 % interval", "mean best IoU"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_row("[bold]these boxes[/]", *_score_cells(evaluation.labels))
    for name in BASELINES:
        score = evaluation.baselines.get(name)
        cells = _score_cells(score) if score else ["n/a"] * 5
        table.add_row(TITLES[name], *cells)
    return table


def _score_cells(score: Score) -> list[str]:
    rates = [f"{100 * rate:.1f}" for rate in score.at.values()]
    return [*rates, _span(score.interval), f"{score.mean_best_iou:.3f}"]


def _span(interval: Interval) -> str:
    # Rich reads square brackets as markup.
    return f"\\[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _remarks(evaluation: Evaluation) -> Iterator[str]:
    """One line each, and only those that say something."""
    for name, score in evaluation.baselines.items():
        low, high = score.lead_interval
        yield (
            f"These boxes minus the {TITLES[name]}: {100 * score.lead:+.1f} "
            f"[{100 * low:.1f}, {100 * high:.1f}]"
        )
    for name, group in evaluation.groups.items():
        if (rate := _rate(group)) is not None:
            yield f"On the {group.num_images} images with {TITLES[name]}: {100 * rate:.1f}"
    yield from _difficult_remarks(evaluation)
    yield from _left_out_remarks(evaluation)
    if evaluation.num_size_unknown:
        yield (
            f"No baselines: the size of {evaluation.num_size_unknown} images stands neither in "
            "the ground truth nor in the labels."
        )
    if evaluation.num_size_differs:
        yield (
            f"WARNING: {evaluation.num_size_differs} images have another size in the labels than "
            "in the ground truth; were the boxes measured on resized or turned copies?"
        )


def _left_out_remarks(evaluation: Evaluation) -> Iterator[str]:
    boxless = {name: num for name, num in evaluation.statuses.items() if name != "ok"}
    if boxless:
        counts = ", ".join(f"{num} {name}" for name, num in sorted(boxless.items()))
        yield f"Labels without a box count as misses: {counts}."
    if evaluation.num_missing:
        yield (
            f"WARNING: {evaluation.num_missing} annotated images have no label: "
            "they count as misses."
        )
    if evaluation.num_unmatched:
        yield f"{evaluation.num_unmatched} labels have no annotated image: they are ignored."
    if evaluation.num_without_objects:
        yield f"{evaluation.num_without_objects} images without a counted object are left out."


def _difficult_remarks(evaluation: Evaluation) -> Iterator[str]:
    ignored = evaluation.provenance["ignore_difficult"]
    if evaluation.num_difficult:
        fate = "are left out" if ignored else "count like all others"
        yield f"The {evaluation.num_difficult} objects marked difficult {fate}."
    elif ignored:
        yield "WARNING: --ignore-difficult changes nothing: no object is marked difficult."


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
    for heading, *names in _AP_ROWS:
        table.add_row(heading, " / ".join(_shown(stats[name], 1) for name in names))
    console.print(table)
    for line in _detection_remarks(evaluation):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if evaluation.classes:
        _print_classes(evaluation.classes, console)
    if evaluation.quality:
        _print_quality(evaluation.quality, console)
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
        "score_quality": evaluation.quality and quality_json(evaluation.quality),
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


def _shown(fraction: float | None, decimals: int) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.{decimals}f}"


def _detection_remarks(evaluation: DetectionEvaluation) -> Iterator[str]:
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
    table.add_column("class", overflow="fold")
    for heading in ("cluster", "AP50 (%)"):
        table.add_column(heading, justify="right", overflow="fold")
    for name, ap50 in matching.ap50_of.items():
        cluster = matching.cluster_of[name]
        # The name is the annotator's: rich would read square brackets in it.
        shown = name.replace("[", "\\[")
        table.add_row(shown, "none" if cluster is None else str(cluster), f"{100 * ap50:.1f}")
    console.print(table)
    without = sum(cluster is None for cluster in matching.cluster_of.values())
    if without:
        console.print(f"  WARNING: {without} classes have no cluster left: they count as 0.")


def ranking_text(ranking: Ranking) -> str:
    """An AUROC with its interval, for people."""
    if ranking.auroc is None or ranking.interval is None:
        return "n/a"
    low, high = ranking.interval
    return f"{ranking.auroc:.3f} [{low:.3f}, {high:.3f}]"


def quality_json(quality: ScoreQuality) -> dict[str, Any]:
    """Every number: precision in percent with three decimals, all else from 0 to 1 with four."""
    return {
        "num_boxes": quality.num_boxes,
        "num_right": quality.num_right,
        "lowest": quality.span[0],
        "highest": quality.span[1],
        "auroc": {name: _rounded(one.auroc) for name, one in quality.ranking.items()},
        "auroc_interval": {
            name: one.interval and [_rounded(end) for end in one.interval]
            for name, one in quality.ranking.items()
        },
        "precision_at_coverage": {
            f"{100 * share:g}": _percent(value) for share, value in quality.precision_at.items()
        },
        "ece": _rounded(quality.ece),
        "brier": _rounded(quality.brier),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _print_quality(quality: ScoreQuality, console: Console) -> None:
    # Rich reads square brackets as markup.
    auroc = ranking_text(quality.ranking["scores"]).replace("[", "\\[")
    console.print(f"\n[bold]AUROC of the scores {auroc}[/]", highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("of the best boxes", overflow="fold")
    for share in quality.precision_at:
        table.add_column(f"{share:.0%}", justify="right", overflow="fold")
    cells = [f"{100 * value:.1f}" for value in quality.precision_at.values()]
    table.add_row("are right (%)", *cells)
    console.print(table)
    for line in _quality_remarks(quality):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def _quality_remarks(quality: ScoreQuality) -> Iterator[str]:
    yield (
        f"Right is an IoU >= 0.5 with some object: {quality.num_right:,} of "
        f"{quality.num_boxes:,} boxes."
    )
    for name, one in quality.ranking.items():
        if name != "scores":
            yield f"AUROC of the column {name}: {ranking_text(one)}"
    if quality.ranking["scores"].auroc is None:
        yield (
            "No AUROC: all boxes are right." if quality.num_right else "No AUROC: no box is right."
        )
    low, high = quality.span
    if quality.ece is None:
        yield (
            f"No ECE: scores from {low:.3g} to {high:.3g} are no probabilities; "
            "jobs/calibrate_scores.py makes some."
        )
    else:
        yield (f"As probabilities: ECE {quality.ece:.3f}, Brier score {quality.brier:.3f}.")


# Told apart by readers who see few colours, and by their dashes in print.
_LOOKS = {0.5: (BLUE, "-", "ap50"), 0.75: (ORANGE, "--", "ap75")}


def precision_recall_png(evaluation: DetectionEvaluation, *, dpi: int = DPI) -> bytes:
    """Precision over recall at IoU 0.5 and 0.75, as the bytes of a PNG; without objects it says so.

    Drawn with matplotlib's objects: no global state is touched, so it may run in any thread.
    """
    figure = new_figure(6.4, 4.8, dpi=dpi)
    axes = figure.add_subplot()
    quiet(axes, "both", frame=True)
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
        axes.legend(fontsize=9, frameon=False, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no object", ha="center", va="center", color=FAINT)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    for axis, name in ((axes.xaxis, "recall"), (axes.yaxis, "precision, as COCO interpolates it")):
        axis.set_major_formatter(PercentFormatter(1.0))
        axis.set_label_text(name, color=FAINT, fontsize=9)
    title(
        axes,
        f"{evaluation.precision.num_objects:,} objects, {evaluation.box_counts.total:,} boxes, "
        f"{len(evaluation.truths):,} images; {RULES[evaluation.options.difficult]}",
    )
    return png(figure)


def reliability_png(curves: Mapping[str, Reliability], what: str, *, dpi: int = DPI) -> bytes:
    """The share of right boxes over what probabilities say, bin by bin, as the bytes of a PNG.

    Args:
        curves: by their names; at most three.
        what: the title.
        dpi: dots per inch.
    """
    figure = new_figure(6.4, 5.6, dpi=dpi)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for axes in (above, below):
        quiet(axes, "both", frame=True)
    above.plot((0, 1), (0, 1), ":", color=FAINT, linewidth=1)
    styles = zip((BLUE, ORANGE, GREEN), ("o-", "s--", "^:"), strict=True)
    for (name, bins), (colour, look) in zip(curves.items(), styles, strict=False):
        some_K = bins.count_K > 0
        label = f"{name}: ECE {bins.error:.3f}"
        above.plot(bins.mean_K[some_K], bins.rate_K[some_K], look, color=colour, label=label)
        edges = np.linspace(0, 1, len(bins.count_K) + 1)
        below.stairs(bins.count_K, edges, color=colour, linewidth=1.8)
    above.legend(fontsize=9, frameon=False, labelcolor=INK)
    above.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    above.set_ylabel("share of boxes that are right", color=FAINT, fontsize=9)
    below.set_xlabel("probability that the score says", color=FAINT, fontsize=9)
    below.set_ylabel("boxes", color=FAINT, fontsize=9)
    title(above, what)
    return png(figure)
