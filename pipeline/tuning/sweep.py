"""A sweep while it runs: which trial is next, and what is told when one ends.

Who runs the trials is another matter: this process (``run_here``), or Ray (cluster/tune_trials.py).
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pipeline.config.tuning import TuneJob
from pipeline.progress import duration
from pipeline.storage import Location
from pipeline.tuning.population import Population, generation_of, next_segment, population_of
from pipeline.tuning.proposals import propose
from pipeline.tuning.results import shown_metric
from pipeline.tuning.run_trial import TrialTask, ended, folder_of, run_trial
from pipeline.tuning.segment import SegmentTask, forget_checkpoints
from pipeline.tuning.space import Space
from pipeline.tuning.sweep_tracking import SweepTracking
from pipeline.tuning.trials import (
    DEFAULT_SAMPLES,
    Proposal,
    SweepFolder,
    Trial,
    best_of,
    proposal,
)


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
    population: Population | None = field(init=False)
    _waiting: deque[Proposal] = field(default_factory=deque)
    _began: float = field(default_factory=time.monotonic)
    _ended_before: int = 0
    _forgotten: int = 0

    def __post_init__(self) -> None:
        # Those that a kill interrupted come first: their runs have checkpoints.
        self._waiting.extend(self.folder.unfinished)
        self._ended_before = len(self.folder.trials)
        self.population = population_of(self.job, self.space, self.task.base)
        self._forget_generations()

    @property
    def num_trials(self) -> int:
        """How many there will be at most."""
        if self.population is not None:
            return self.population.num_segments
        if self.job.search == "grid":
            points = sum(1 for _ in self.space.grid_points())
            return min(points, self.job.num_samples or points)
        return self.job.num_samples or DEFAULT_SAMPLES

    def next(self) -> Proposal | None:
        """The trial to start, noted as such; None where all have been, or while it ``waits``."""
        self.check()
        if self._waiting:
            return self._waiting.popleft()
        proposed = self._proposed()
        if proposed is not None:
            self.folder.add_proposal(proposed)
        return proposed

    @property
    def waits(self) -> bool:
        """Whether there will be more to start once the trials that run have ended."""
        return self.population is not None and bool(self.folder.unfinished)

    def _proposed(self) -> Proposal | None:
        if self.population is not None:
            return next_segment(self.population, len(self.folder.proposals), self.folder.trials)
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

    def segment_of(self, proposed: Proposal) -> SegmentTask | None:
        """What a trial's run must know of the population, where there is one."""
        place = proposed.segment
        if place is None:
            return None
        parents = {one.number: one.folder for one in self.folder.trials}
        parent = None if place.parent is None else parents[place.parent]
        return SegmentTask(str(self._output_of(proposed)), place.after, place.until, parent)

    def _output_of(self, proposed: Proposal) -> Location:
        return self.folder.place.child("runs").child(proposed.id)

    def end(self, trial: Trial) -> None:
        """Write, send and tell a trial that has ended."""
        self.check()
        if trial.folder is None:
            output = None if trial.segment is None else str(self._output_of(trial))
            trial = replace(trial, folder=folder_of(self.task, trial.values, output))
        self.folder.add_trial(trial)
        self._forget_generations()
        self.tracking.trial_ended(trial, self.task.base)
        self.tell(self._line(trial))

    def _forget_generations(self) -> None:
        """Delete the checkpoints of generations that no segment can begin with any more.

        A generation's are kept until the next one is whole: until then its segments may have to
        begin again.
        """
        if self.population is None:
            return
        counts = Counter(map(generation_of, self.folder.trials))
        whole = [one for one in counts if one and counts[one] == self.population.size]
        last = max(whole, default=0) - 1
        for trial in self.folder.trials:
            if self._forgotten < (generation_of(trial) or 0) <= last:
                forget_checkpoints(self._output_of(trial))
        self._forgotten = max(self._forgotten, last)

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
        segment = sweep.segment_of(proposed)
        outcome = run_trial(sweep.task, proposed.values, _unheard, segment=segment)
        sweep.end(ended(proposed, outcome, began))


def _unheard(epoch: int, metric: float) -> None:
    """Nobody stops a trial that has no others beside it."""
