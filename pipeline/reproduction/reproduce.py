"""The door of jobs/reproduce.py: a table's cells, their runs, the report and its files."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipeline.config import ReproduceJob
from pipeline.errors import AllTrialsFailed
from pipeline.lease import Lease
from pipeline.progress import duration
from pipeline.reproduction.cells import Run, Table, Values
from pipeline.reproduction.inputs import AtHand, weights_flag
from pipeline.reproduction.measured import lines_of, result_of
from pipeline.reproduction.plan import LISTS, Choices, Plan, expected_seconds, plan_cells
from pipeline.reproduction.report import Report, as_csv, as_markdown, as_png, print_report
from pipeline.reproduction.runner import Runner, local_folder
from pipeline.reproduction.tables import TABLES, TableSize, chosen_cells
from pipeline.storage import Location
from pipeline.tracking.tracker import absolute_tracking_uri

PICTURE = "table.png"


@dataclass(frozen=True, eq=False)
class _Work:
    """A job's table, planned."""

    table: Table
    plan: Plan
    chosen: tuple[str, ...]
    runs: tuple[Run, ...]
    """Of the chosen cells, with the runs those need, in an order in which they can be done."""


def reproduce(job: ReproduceJob, jobs: Path) -> int:
    """Run the chosen rows, or tell which they are; print and write the report.

    Args:
        job: what is asked for.
        jobs: folder of the jobs' scripts, which do the runs.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; what is finished is kept.
    """
    output = Location.parse(job.output)
    local_folder(output)
    work = _planned(job, output)
    if job.dry_run:
        _tell_plan(work)
        return 0
    place = output.child("reports").child(_name(job))
    with Lease(place):
        for photos in work.plan.photos:
            photos.write_list(output.child(LISTS))
        runner = Runner(
            jobs=jobs,
            logs=local_folder(output) / "logs",
            num_parallel=job.num_parallel,
            tell=_say,
            describe=lambda run: _described(work.plan, run),
        )
        failed = runner.do(work.runs)
        report = Report(
            work.table.title,
            tuple(lines_of(work.plan, failed, work.chosen)),
            (*work.table.notes, *_cut(job)),
        )
        _write(report, place, failed)
    if failed and not any(run.is_done for run in work.runs):
        first = next(iter(failed.values()))
        raise AllTrialsFailed(f"all {len(failed)} runs failed, the first with: {first}")
    return 0


def _planned(job: ReproduceJob, output: Location) -> _Work:
    table = TABLES[job.table](TableSize(job.scale, job.recipe))
    chosen = tuple(cell.name for cell in chosen_cells(table, job.rows))
    told = {name: place for name, place in job.data.model_dump().items() if place is not None}
    uri = absolute_tracking_uri(job.tracking_uri)
    tracked: Values = {"tracking_uri": uri, "experiment": job.experiment, "debug": job.debug}
    choices = Choices(
        output=output,
        at_hand=AtHand(told, weights_flag(job.weights), job.data_root, job.fetch),
        num_seeds=job.seeds,
        epochs=job.epochs,
        num_images=job.num_images,
        training={**tracked, "num_workers": job.num_workers, "use_gpu": job.use_gpu},
        # Several local Rays side by side share the cores.
        bulk=tracked if job.num_parallel == 1 else {**tracked, "compute": {"num_actors": 1}},
    )
    plan = plan_cells(table.cells, choices)
    needed: set[str] = set()
    for planned in plan.cells:
        if planned.cell.name in chosen:
            needed |= {run.name for run in planned.runs}
    # What a run needs stands before it.
    for run in reversed(plan.runs):
        if run.name in needed:
            needed |= set(run.after)
    runs = tuple(run for run in plan.runs if run.name in needed)
    return _Work(table, plan, chosen, runs)


def _name(job: ReproduceJob) -> str:
    """Of the report's folder: what was cut short is never taken for the whole."""
    cut = [f"epochs{job.epochs}"] if job.epochs else []
    cut += [f"first{job.num_images}"] if job.num_images else []
    trained = job.scale == "paper" and job.table.startswith("drloc")
    recipe = [job.recipe] if trained else []
    return "-".join([job.table, job.scale, *recipe, *cut])


def _cut(job: ReproduceJob) -> list[str]:
    notes = []
    if job.epochs:
        notes.append(f"CUT SHORT to {job.epochs} epochs (--epochs): this measures nothing.")
    if job.num_images:
        notes.append(f"CUT SHORT to {job.num_images} photos of each set (--num-images).")
    return notes


def _described(plan: Plan, run: Run) -> str:
    """A finished run's figure, where it is one of a cell."""
    for planned in plan.cells:
        if run in planned.runs:
            metric = planned.cell.metric
            value = result_of(run, planned.photos, metric)
            return f"{metric} {value:.2f} % ({planned.cell.words})"
    return "done"


def _write(report: Report, place: Location, failed: Mapping[str, str]) -> None:
    files = {
        "table.md": as_markdown(report, PICTURE).encode(),
        "table.csv": as_csv(report).encode(),
        PICTURE: as_png(report),
    }
    # Written first: what is printed last is then the result, whole or not at all.
    for name, content in files.items():
        place.child(name).write_bytes(content)
    print_report(report, Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160))
    if failed:
        _say(f"{len(failed)} runs failed; the same command tries them again")
    _say(f"{', '.join(files)} are in {place}")


def _tell_plan(work: _Work) -> None:
    """The runs of what is chosen, and the hours of those that were measured with another seed."""
    for planned in work.plan.cells:
        cell = planned.cell
        if cell.name in work.chosen:
            done = sum(run.is_done for run in planned.runs)
            told = planned.missing or f"{len(planned.runs)} runs, {done} done"
            _say(f"{cell.name:32} {cell.words}: {told}")
    waiting = [run for run in work.runs if not run.is_done]
    kinds = {run.job: [one for one in waiting if one.job == run.job] for run in waiting}
    expected = expected_seconds(work.plan.runs)
    for kind, runs in kinds.items():
        known = [expected[run.name] for run in runs if run.name in expected]
        took = (
            f"; {len(known)} take {duration(sum(known))}, as their other seeds did" if known else ""
        )
        _say(f"{kind:18} {len(runs):4} runs{took}")
    _say(f"{len(waiting)} runs to do, {len(work.runs) - len(waiting)} are done")
    if waiting and not expected:
        _say("Hours are told of training runs that were measured with another seed: try --seeds 1")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
