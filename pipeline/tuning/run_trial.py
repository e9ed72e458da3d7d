"""One trial from its values to its outcome, in whichever process; knows no Ray.

What a trial raises is its outcome, not the sweep's. A trial's training run has a folder that its
settings name, so a trial that is started again goes on from its checkpoints.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pipeline.config import TrainingJob
from pipeline.errors import ConfigError, PatchseedError, one_line
from pipeline.runs.folder import RunFolder
from pipeline.runs.kinds import KINDS
from pipeline.runs.life import Outside, TrainHere
from pipeline.storage import Location
from pipeline.training.workers import current_workers
from pipeline.tuning.space import LOCALIZATION, OWN, Space, Values, space_of
from pipeline.tuning.trials import Proposal, Trial, TrialStatus, finite
from pipeline.tuning.tuned_job import Tree, settings_of

ReportEpoch = Callable[[int, float], None]
"""Told the epoch from 1 and the metric so far; it may not return, where the trial is stopped."""

Fit = Callable[[TrainingJob, RunFolder, TrainHere, "Watch"], dict[str, Any]]
"""Trains a trial's run, on whichever workers, and gives its summary."""


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a sweep share; it pickles. The space goes along as text."""

    space_name: str
    space_source: str
    base: Tree
    folder: str
    use_gpu: bool = False
    cpus: int | None = None
    """Threads of torch in each worker; None leaves them as they are."""

    num_workers: int = 1
    """1 trains in the trial's own process."""

    cache: str | None = None

    def space(self) -> Space:
        """The space, read anew."""
        return space_of(self.space_source, self.space_name)


@dataclass(frozen=True)
class TrialOutcome:
    """What came of a trial; JSON values."""

    status: TrialStatus
    metric: float | None = None
    reason: str | None = None
    epochs: int | None = None
    folder: str | None = None
    numbers: dict[str, float] | None = None


@dataclass(frozen=True)
class Watch:
    """How far a training run is, by what lies in its folder; it pickles."""

    space: Space
    """Without its ``run``, which does not pickle and which no training has."""

    folder: RunFolder
    num_epochs: int

    def latest(self) -> tuple[int, float] | None:
        """The epoch from 1 and the metric so far, where it is measured; None after the last epoch.

        That one is told with the results: a trial that is at its end is not stopped.
        """
        # The file and not the numbers: a run that goes on had epochs before these.
        history = self.folder.history()
        metric = judged(self.space, history)
        if metric is None or len(history) >= self.num_epochs:
            return None
        return len(history), metric


def run_trial(
    task: TrialTask,
    values: Values,
    report: ReportEpoch,
    fit: Fit | None = None,
) -> TrialOutcome:
    """Run a trial to its end; whatever goes wrong in it becomes its reason.

    Args:
        task: What all trials share.
        values: The trial's own settings.
        report: Told of its epochs, where it trains in this process.
        fit: Trains its run elsewhere, and tells of epochs itself; None trains it here.
    """
    space = task.space()
    told = _Told(report)
    if task.cpus is not None:
        torch.set_num_threads(task.cpus)
    try:
        if space.job == OWN:
            outcome = _run_own(space, values, told)
        elif space.job == LOCALIZATION:
            outcome = _localize(task, space, values)
        else:
            outcome = _train(task, space, values, fit or partial(_fit_here, told=told))
    except PatchseedError as fault:
        return TrialOutcome("failed", told.metric, one_line(fault), told.epoch)
    except Exception as fault:  # a trial may raise whatever it likes, and run out of memory
        return TrialOutcome(
            "failed", told.metric, f"{type(fault).__name__}: {one_line(fault)}", told.epoch
        )
    if outcome.status == "ok" and finite(outcome.metric) is None:
        reason = f"{space.metric} was never measured"
        if outcome.metric is not None:
            reason = f"{space.metric} is not finite: {outcome.metric}"
        return replace(outcome, status="failed", metric=None, reason=reason)
    return outcome


def ended(proposed: Proposal, outcome: TrialOutcome, began: float) -> Trial:
    """The record of a trial that began at that ``time.monotonic()``."""
    return Trial(
        number=proposed.number,
        id=proposed.id,
        values=proposed.values,
        status=outcome.status,
        metric=outcome.metric,
        seconds=round(time.monotonic() - began, 3),
        reason=outcome.reason,
        epochs=outcome.epochs,
        folder=outcome.folder,
        numbers=outcome.numbers or {},
    )


@dataclass
class _Told:
    """The last thing a trial told."""

    report: ReportEpoch
    epoch: int | None = None
    metric: float | None = None

    def __call__(self, epoch: int, metric: float) -> None:
        self.epoch, self.metric = epoch, finite(metric)
        if self.metric is not None:
            self.report(epoch, self.metric)

    def look(self, watch: Watch) -> None:
        """Tell how far the run is."""
        latest = watch.latest()
        if latest is not None:
            self(*latest)


def _run_own(space: Space, values: Values, told: _Told) -> TrialOutcome:
    assert space.run is not None
    return TrialOutcome("ok", space.run(values, told), epochs=told.epoch)


def _localize(task: TrialTask, space: Space, values: Values) -> TrialOutcome:
    from pipeline.tuning.localization_sweep import measured

    assert task.cache is not None
    settings: Any = settings_of(space, task.base, values)
    numbers = measured(Location.parse(task.cache), settings)
    return TrialOutcome("ok", numbers.get(space.metric), numbers=numbers)


def _fit_here(
    job: TrainingJob, folder: RunFolder, train: TrainHere, watch: Watch, *, told: _Told
) -> dict[str, Any]:
    """Train in this process."""

    def report(numbers: dict[str, float]) -> None:
        told.look(watch)

    device = torch.device("cuda" if job.use_gpu else "cpu")
    outside = Outside(tell=lambda line: None, report=report)
    return train(job, folder, current_workers(device), outside)


def _train(task: TrialTask, space: Space, values: Values, fit: Fit) -> TrialOutcome:
    job = training_job(task, space, values)
    folder = RunFolder.of(job)
    with folder.held(job):
        watch = Watch(replace(space, run=None), folder, job.num_epochs)
        summary = fit(job, folder, KINDS[space.job].train_here(), watch)
    history = folder.history()
    return TrialOutcome(
        "ok",
        judged(space, history),
        epochs=len(history),
        folder=str(folder.place),
        numbers=summary["metrics"],
    )


def training_job(task: TrialTask, space: Space, values: Values) -> TrainingJob:
    """A trial's training job, below the sweep's folder and told by the sweep."""
    job: Any = settings_of(space, task.base, values)
    update = {
        "output": str(Location.parse(task.folder).child("runs")),
        "tracking_uri": "off",
        "use_gpu": task.use_gpu,
        "overwrite": False,
        "num_workers": task.num_workers if task.num_workers > 1 else 0,
        "cpus_per_worker": task.cpus or job.cpus_per_worker,
        "min_workers": None,
    }
    found: TrainingJob = job.model_copy(update=update)
    return found


def folder_of(task: TrialTask, values: Values) -> str | None:
    """The folder of a trial's training run, where it has trained an epoch."""
    space = task.space()
    if space.job not in KINDS:
        return None
    try:
        run = RunFolder.of(training_job(task, space, values))
    except ConfigError:
        return None
    return str(run.place) if run.history() else None


def judged(space: Space, history: list[dict[str, float]]) -> float | None:
    """What a run is judged by: its best epoch, or the last one that was measured."""
    measured = [value for one in history if (value := finite(one.get(space.metric))) is not None]
    if not measured:
        return None
    if space.pick == "last":
        return measured[-1]
    return max(measured) if space.mode == "max" else min(measured)
