"""A sweep while it runs: which trial is next, what is told when one ends, and what MLflow gets.

Who runs the trials is another matter: this process (``run_here``), or Ray (cluster/tune_trials.py).

In MLflow a sweep is a run for itself, and below it one for each trial that has ended, named by the
trial. A sweep that goes on asks the store which of them it has, and sends the others: none comes
twice, and none is lost with the process that was killed.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config.settings import flatten
from pipeline.config.tuning import TuneJob
from pipeline.errors import StorageError
from pipeline.progress import duration
from pipeline.runs.folder import RunFolder
from pipeline.storage import Location
from pipeline.tracking.tracker import OFF, NoTracker, Tracker, absolute_uri, connect, start_tracker
from pipeline.tuning.proposals import propose
from pipeline.tuning.results import shown_metric
from pipeline.tuning.run_trial import TrialTask, ended, folder_of, run_trial
from pipeline.tuning.space import Space
from pipeline.tuning.trials import (
    DEFAULT_SAMPLES,
    Proposal,
    SweepFolder,
    Trial,
    best_of,
    proposal,
)
from pipeline.tuning.tuned_job import Tree

_KNOWN = "tracking.json"


@dataclass
class SweepTracking:
    """The MLflow runs of a sweep."""

    job: TuneJob
    space: Space
    folder: Location
    parent: Tracker
    done: Mapping[str, tuple[str, bool]]
    """Trials that the store has: their run, and whether it is whole."""

    _waiting: list[tuple[Trial, Tree]] = field(default_factory=list)

    def trial_ended(self, trial: Trial, base: Tree) -> None:
        """Send a trial, unless the store has it; where MLflow is slow to begin, with a later one.

        Without its parent a trial's run could never be found again.
        """
        if isinstance(self.parent, NoTracker) or self.done.get(trial.id, (None, False))[1]:
            return
        self._waiting.append((trial, base))
        self._send_waiting()

    def _send_waiting(self) -> None:
        parent_run_id = self.parent.wait_for_run_id() if self._waiting else None
        if parent_run_id is None:
            return
        self.remember(parent_run_id)
        while self._waiting:
            self._send(*self._waiting.pop(0), parent_run_id)

    def _send(self, trial: Trial, base: Tree, parent_run_id: str) -> None:
        run_id, _ = self.done.get(trial.id, (None, False))
        tracker = start_tracker(
            self.job.tracking_uri,
            experiment=self.job.experiment,
            run_name=trial.id,
            known={"run_id": run_id},
            parent_run_id=parent_run_id,
        )
        tracker.log_params({**flatten(base), **trial.values})
        tracker.set_tags(
            {
                "patchseed.kind": "trial",
                "patchseed.sweep": self.folder.name,
                "patchseed.trial": trial.number,
                "patchseed.status": trial.status,
                **({"patchseed.reason": trial.reason} if trial.reason else {}),
            }
        )
        if trial.folder is not None:
            for numbers in RunFolder(Location.parse(trial.folder)).history():
                epoch = int(numbers.pop("epoch"))
                tracker.log_metrics(numbers, step=epoch)
        tracker.log_metrics({**trial.numbers, "seconds": trial.seconds})
        if trial.metric is not None:
            tracker.log_metrics({f"trial/{self.space.metric}": trial.metric})
        tracker.close("FAILED" if trial.status == "failed" else "FINISHED")

    def remember(self, run_id: str | None) -> None:
        """Note in the sweep's folder which MLflow run is its own."""
        file = self.folder.child(_KNOWN)
        uri = absolute_uri(self.job.tracking_uri)
        known = {"uri": uri, "experiment": self.job.experiment, "run_id": run_id}
        if _known(self.folder) != known:
            file.write_bytes(json.dumps(known).encode())

    def sweep_ended(self, metrics: Mapping[str, float], files: Mapping[str, bytes]) -> None:
        """Send what the sweep came to, and trials that could not be sent before."""
        self._send_waiting()
        self.parent.log_metrics(metrics)
        for name, content in files.items():
            self.parent.log_artifact_bytes(content, name)


def open_tracking(
    job: TuneJob, space: Space, base: Tree, folder: Location, trials: Sequence[Trial]
) -> SweepTracking:
    """The sweep's run, the one it had where it goes on; trials that were not sent are sent."""
    if job.tracking_uri == OFF:
        return SweepTracking(job, space, folder, NoTracker(), {})
    place = {"uri": absolute_uri(job.tracking_uri), "experiment": job.experiment}
    known = _known(folder)
    known = known if all(known.get(name) == value for name, value in place.items()) else {}
    parent = start_tracker(
        job.tracking_uri,
        experiment=job.experiment,
        run_name=job.run_name or folder.name,
        known=known,
    )
    settings = job.model_dump(mode="json", exclude={"debug", "resume"})
    parent.log_params({**settings, **{f"base.{k}": v for k, v in flatten(base).items()}})
    parent.set_tags({"patchseed.kind": "sweep", "patchseed.sweep": folder.name})
    run_id = parent.wait_for_run_id()
    done = _children(place["uri"], run_id) if known and run_id else {}
    tracking = SweepTracking(job, space, folder, parent, done)
    tracking.remember(run_id)
    for trial in trials:
        tracking.trial_ended(trial, base)
    return tracking


def _known(folder: Location) -> dict[str, Any]:
    file = folder.child(_KNOWN)
    if file.kind() != "file":
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as fault:
        raise StorageError(f"{file} is damaged ({fault}); delete it to record anew") from fault
    return found if isinstance(found, dict) else {}


def _children(uri: str, parent: str) -> dict[str, tuple[str, bool]]:
    """Runs below the parent by name; nothing where the store cannot be asked."""
    try:
        client, _ = connect(uri)
        experiment = client.get_run(parent).info.experiment_id
        found: dict[str, tuple[str, bool]] = {}
        token = None
        while True:
            page = client.search_runs(
                [experiment], f"tags.`mlflow.parentRunId` = '{parent}'", page_token=token
            )
            for run in page:
                whole = run.info.status in ("FINISHED", "FAILED")
                found[run.info.run_name] = (run.info.run_id, whole)
            token = page.token
            if not token:
                return found
    except Exception:  # MLflow, its drivers and the network raise all sorts; tracking stops nothing
        return {}


@dataclass
class Sweep:
    """What is to be tried, what has been, and where that is written."""

    job: TuneJob
    space: Space
    task: TrialTask
    folder: SweepFolder
    tracking: SweepTracking
    tell: Callable[[str], None]
    check: Callable[[], None] = lambda: None
    _waiting: deque[Proposal] = field(default_factory=deque)
    _began: float = field(default_factory=time.monotonic)
    _ended_before: int = 0

    def __post_init__(self) -> None:
        # Those that a kill interrupted come first: their runs have checkpoints.
        self._waiting.extend(self.folder.unfinished)
        self._ended_before = len(self.folder.trials)

    @property
    def num_trials(self) -> int:
        """How many there will be at most."""
        if self.job.search == "grid":
            points = sum(1 for _ in self.space.grid_points())
            return min(points, self.job.num_samples or points)
        return self.job.num_samples or DEFAULT_SAMPLES

    def next(self) -> Proposal | None:
        """The trial to start, noted as such; None where all have been."""
        self.check()
        if self._waiting:
            return self._waiting.popleft()
        proposed = self._proposed()
        if proposed is not None:
            self.folder.add_proposal(proposed)
        return proposed

    def _proposed(self) -> Proposal | None:
        before = [one.values for one in self.folder.proposals]
        if len(before) >= self.num_trials:
            return None
        values = propose(
            self.space,
            self.job.search,
            seed=self.job.seed,
            before=before,
            told=self.folder.trials,
        )
        return None if values is None else proposal(len(before) + 1, values)

    def end(self, trial: Trial) -> None:
        """Write, send and tell a trial that has ended."""
        self.check()
        if trial.folder is None:
            trial = replace(trial, folder=folder_of(self.task, trial.values))
        self.folder.add_trial(trial)
        self.tracking.trial_ended(trial, self.task.base)
        self.tell(self._line(trial))

    def _line(self, trial: Trial) -> str:
        done = len(self.folder.trials)
        line = f"trial {trial.number} ({done}/{self.num_trials}) {trial.status}"
        if trial.metric is not None:
            line += f" {self.space.metric} {shown_metric(self.space.metric, trial.metric)}"
        if trial.status == "stopped":
            line += f" after {trial.epochs} epochs"
        if trial.reason is not None:
            line += f": {trial.reason}"
        best = best_of(self.space, self.folder.trials)
        if best is not None:
            line += f" (best {shown_metric(self.space.metric, best.metric)}, trial {best.number})"
        left = self.num_trials - done
        if left > 0:
            pace = (time.monotonic() - self._began) / max(1, done - self._ended_before)
            line += f" eta {duration(pace * left)}"
        return line


def run_here(sweep: Sweep) -> None:
    """Run the trials one after another in this process."""
    while (proposed := sweep.next()) is not None:
        began = time.monotonic()
        outcome = run_trial(sweep.task, proposed.values, _unheard)
        sweep.end(ended(proposed, outcome, began))


def _unheard(epoch: int, metric: float) -> None:
    """Nobody stops a trial that has no others beside it."""
