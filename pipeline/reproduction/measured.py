"""Finished runs -> a cell's figure, how far it is from the cell it is compared with, and the lines.

Classifiers and detectors are measured once per seed: differences are paired over seeds, their
interval is Student's. Pseudo-boxes have no seed: their CorLoc is resampled over photos, and
differences are paired over them. A line of the report has the paper's figure beside ours.

Shape letters:  N photos   S seeds   R resamples
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import as_boxes
from pipeline.comparison.paired import difference_of, holm
from pipeline.data.pseudo_labels import read_manifest
from pipeline.errors import DataError
from pipeline.evaluation.average_precision import average_precision
from pipeline.evaluation.corloc import THRESHOLD, best_ious, interval_95, resampled_rates
from pipeline.evaluation.predictions import detections, match, read_predictions
from pipeline.evaluation.scored_boxes import ranking_of
from pipeline.reproduction.cells import BoxesRecipe, Cell, Metric, Run
from pipeline.reproduction.inputs import Photos
from pipeline.reproduction.plan import Plan, PlannedCell
from pipeline.storage import Location

_ACCURACY = "test/accuracy_selected"
_NUM_RESAMPLES = 10_000
_CONFIDENCE = 0.95

Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Measured:
    """A cell's figure, in per cent.

    Attributes:
        value: mean over seeds, or CorLoc over photos.
        spread: standard deviation over seeds; None without two.
        interval: 95 %, of the mean over seeds (Student's) or over photos; None for a single seed.
        by_seed: the figure of each finished seed; empty where there are none.
        hits_N: bool, photos whose box found an object; None for what has seeds.
    """

    value: float
    spread: float | None = None
    interval: Interval | None = None
    by_seed: dict[int, float] = field(default_factory=dict)
    hits_N: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Gain:
    """A cell's figure minus that of the cell it is compared with, in percentage points.

    Attributes:
        value: the mean.
        interval: 95 %; None where it cannot be told (one seed).
        num_pairs: seeds, or photos.
        p: two-sided, Student's; None as the interval, and for photos.
    """

    value: float
    interval: Interval | None
    num_pairs: int
    p: float | None = None


def measure(planned: PlannedCell) -> Measured | None:
    """The figure of the cell's finished runs; None while there is none.

    Raises:
        DataError: a result cannot be read.
    """
    done = {seed: run for seed, run in enumerate(planned.runs) if run.is_done}
    if not done:
        return None
    metric = planned.cell.metric
    if isinstance(planned.cell.recipe, BoxesRecipe):
        if metric == "CorLoc":
            return _corloc_of_photos(done[0], _photos(planned))
        return _of_table(done[0], _photos(planned), metric)
    by_seed = {seed: result_of(run, planned.photos, metric) for seed, run in done.items()}
    values_S = np.array(list(by_seed.values()))
    # Against 0: the interval of a mean is that of its difference from any fixed number.
    found = difference_of(np.zeros_like(values_S), values_S, _CONFIDENCE)
    return Measured(found.mean, found.sd, found.interval, by_seed)


def difference(measured: Measured, base: Measured) -> Gain | None:
    """How far a cell is from the one it is compared with; None where no seed has both."""
    if measured.hits_N is not None and base.hits_N is not None:
        return _over_photos(measured.hits_N, base.hits_N)
    if not measured.by_seed and not base.by_seed:
        # Two tables of boxes by another measure: no resamples of it are kept.
        return Gain(measured.value - base.value, None, 1)
    # A single table of boxes stands beside every seed of a detector trained on it.
    of_base = base.by_seed or dict.fromkeys(measured.by_seed, base.value)
    seeds = sorted(measured.by_seed.keys() & of_base.keys())
    if not seeds:
        return None
    sides = [np.array([side[seed] for seed in seeds]) for side in (of_base, measured.by_seed)]
    found = difference_of(sides[0], sides[1], _CONFIDENCE)
    return Gain(found.mean, found.interval, len(seeds), found.p_student)


def result_of(run: Run, photos: Photos | None, metric: Metric) -> float:
    """What one finished run came to, in per cent.

    Raises:
        DataError: its result cannot be read.
    """
    if photos is None:
        return 100 * _accuracy(run.result)
    labels, truths = run.folder, photos.truths
    found = match(read_predictions(labels), truths).predictions
    if metric == "CorLoc":
        return 100 * float(_hits(labels, photos).mean())
    boxes = [detections([]) if one is None else one.detections for one in found]
    if metric == "AUROC":
        area = ranking_of(truths, boxes).auroc
        return 100 * area if area is not None else math.nan
    name = "ap50" if metric == "AP50" else "ar_10"
    value = average_precision(truths, boxes, difficult="drop").stats[name]
    return 100 * value if value is not None else math.nan


def _of_table(run: Run, photos: Photos, metric: Metric) -> Measured:
    value = result_of(run, photos, metric)
    if metric != "AUROC":
        return Measured(value)
    found = match(read_predictions(run.folder), photos.truths).predictions
    boxes = [detections([]) if one is None else one.detections for one in found]
    interval = ranking_of(photos.truths, boxes).interval
    return Measured(value, interval=interval and (100 * interval[0], 100 * interval[1]))


def _accuracy(summary: Location) -> float:
    try:
        return float(json.loads(summary.read_bytes())["metrics"][_ACCURACY])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise DataError(
            f"{summary} tells no {_ACCURACY} ({fault}): delete the run's folder to run it again"
        ) from fault


def _photos(planned: PlannedCell) -> Photos:
    if planned.photos is None:
        raise ValueError(f"{planned.cell.name} is measured on photos, and has none")
    return planned.photos


def _corloc_of_photos(run: Run, photos: Photos) -> Measured:
    hits_N = _hits(run.folder, photos)
    rates_RM = resampled_rates(
        hits_N[None], num_resamples=_NUM_RESAMPLES, rng=np.random.default_rng(0)
    )
    low, high = interval_95(100 * rates_RM[:, 0])
    return Measured(100 * float(hits_N.mean()), interval=(low, high), hits_N=hits_N)


def _hits(labels: Location, photos: Photos) -> NDArray[np.bool_]:
    """``(N,)`` whether the best box of each photo finds an object; a photo without one does not."""
    found = match(read_predictions(labels), photos.truths).predictions
    boxes_N4 = as_boxes([(one and one.box) or (0, 0, 0, 0) for one in found])
    hits_N: NDArray[np.bool_] = (
        best_ious(boxes_N4, [truth.boxes_N4 for truth in photos.truths]) >= THRESHOLD
    )
    return hits_N


def _over_photos(hits_N: NDArray[np.bool_], base_N: NDArray[np.bool_]) -> Gain:
    rates_RM = resampled_rates(
        np.stack([base_N, hits_N]), num_resamples=_NUM_RESAMPLES, rng=np.random.default_rng(0)
    )
    low, high = interval_95(100 * (rates_RM[:, 1] - rates_RM[:, 0]))
    value = 100 * float(hits_N.mean() - base_N.mean())
    return Gain(value, (low, high), hits_N.size)


@dataclass(frozen=True)
class Line:
    """One cell of the report; all numbers in per cent or percentage points.

    Attributes:
        cell: what was measured.
        measured: ours; None where nothing is finished.
        published_gain: the paper's figure minus that of the cell it is compared with.
        gain: ours, likewise.
        p_holm: of ``gain``, adjusted for all lines that have one; None without seeds.
        state: ``ok``, or what is missing.
        num_photos: that boxes were measured on; None for classifiers.
    """

    cell: Cell
    measured: Measured | None
    published_gain: float | None
    gain: Gain | None
    state: str
    p_holm: float | None = None
    num_photos: int | None = None


def lines_of(plan: Plan, failed: Mapping[str, str], chosen: Sequence[str]) -> list[Line]:
    """The table's lines, those of earlier runs among them.

    Args:
        plan: of all cells.
        failed: why runs failed, by their names.
        chosen: names of the cells that were to be run.
    """
    measured: dict[str, Measured | None] = {}
    figures = {one.cell.name: one.cell.published for one in plan.cells}
    lines = []
    for planned in plan.cells:
        cell = planned.cell
        found, state = _measured(planned, failed, cell.name in chosen)
        measured[cell.name] = found
        base = measured.get(cell.base) if cell.base else None
        figure, under = cell.published, figures.get(cell.base or "")
        lines.append(
            Line(
                cell=cell,
                measured=found,
                published_gain=figure.value - under.value if figure and under else None,
                gain=difference(found, base) if found and base else None,
                state=state,
                num_photos=None if planned.photos is None else len(planned.photos.uris),
            )
        )
    return _judged_together(lines)


def _measured(
    planned: PlannedCell, failed: Mapping[str, str], chosen: bool
) -> tuple[Measured | None, str]:
    """A cell's figure, and what has to be said of it."""
    if planned.missing:
        return None, planned.missing
    reasons = [failed[run.name] for run in planned.runs if run.name in failed]
    try:
        found = measure(planned)
    except DataError as fault:
        return None, f"cannot be read: {fault}"
    num_done = sum(run.is_done for run in planned.runs)
    if num_done == len(planned.runs):
        return found, "ok" + _told_of_head(planned)
    state = f"{num_done} of {len(planned.runs)} runs"
    if reasons:
        return found, f"{state}; failed: {reasons[0]}"
    return found, state if chosen else f"{state}; not asked for (--rows)"


def _told_of_head(planned: PlannedCell) -> str:
    """That the boxes are the cut's, where the head was refused."""
    for run in planned.runs:
        if (
            run.job == "label_images"
            and "localization.head_refused" in read_manifest(run.folder).config
        ):
            return "; the head was refused: the cut's boxes"
    return ""


def _judged_together(lines: Sequence[Line]) -> list[Line]:
    tested = [
        (place, line.gain.p)
        for place, line in enumerate(lines)
        if line.gain is not None and line.gain.p is not None
    ]
    judged = list(lines)
    for (place, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        judged[place] = replace(judged[place], p_holm=p)
    return judged
