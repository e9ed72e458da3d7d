"""A planned table and its finished runs -> the report's lines: the paper's figure beside ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.comparison.difference import holm
from pipeline.errors import DataError
from pipeline.reproduction.cells import Cell
from pipeline.reproduction.measured import Difference, Measured, difference, measure
from pipeline.reproduction.plan import Plan, PlannedCell


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
    gain: Difference | None
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
        return found, "ok"
    state = f"{num_done} of {len(planned.runs)} runs"
    if reasons:
        return found, f"{state}; failed: {reasons[0]}"
    return found, state if chosen else f"{state}; not asked for (--rows)"


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
