"""An evaluation as a table for people and as one JSON object for programs."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.evaluation.ap_report import detection_json
from pipeline.evaluation.corloc import THRESHOLD
from pipeline.evaluation.one_box import BASELINES, THRESHOLDS, Evaluation, Group, Interval, Score

TITLES = {
    "full_image": "full image",
    "central_70": "central 70 % box",
    "single_object": "one object",
    "multi_object": "several objects",
}


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
    for title in ("95 % interval", "mean best IoU"):
        table.add_column(title, justify="right", overflow="fold")
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
