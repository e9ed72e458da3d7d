"""A sweep while it runs: which trial is next, and what is told when one ends.

Who runs the trials is another matter: this process (``run_here``), or Ray (cluster/tune_trials.py).
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pipeline.config.tuning import TuneJob
from pipeline.progress import duration
from pipeline.tuning.proposals import propose
from pipeline.tuning.results import shown_metric
from pipeline.tuning.run_trial import TrialTask, ended, folder_of, run_trial
from pipeline.tuning.space import Space
from pipeline.tuning.sweep_tracking import SweepTracking
from pipeline.tuning.trials import Proposal, SweepFolder, Trial, best_of, proposal

DEFAULT_SAMPLES = 16


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
        if values is None:
            return None
        proposed = proposal(len(before) + 1, values)
        self.folder.add_proposal(proposed)
        return proposed

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
        outcome = run_trial(sweep.task, proposed.values, lambda epoch, metric: None)
        sweep.end(ended(proposed, outcome, began))
