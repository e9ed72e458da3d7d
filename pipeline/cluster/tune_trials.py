"""The trials of a sweep as Ray Tune's: who runs where, and who is stopped.

Ray Tune gets its trials from our search, by ``_Search``, and tells us of them, by ``_Recorder``;
what is kept, and what a resume needs, is ours (tuning/trials.py). So nothing that Tune pickles is
ever read again. A function as its trainable keeps its process between trials: torch is imported
once per place, not once per trial. A trial with several workers is a process that waits for a Ray
Train run of its own.
"""

import logging
import os
import time
import uuid
from dataclasses import asdict
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from pipeline.cluster.session import count
from pipeline.cluster.training import WorkerTask, fit_with_workers
from pipeline.config import TrainingJob
from pipeline.errors import ClusterError, one_line
from pipeline.runs.folder import RunFolder
from pipeline.runs.life import TrainHere
from pipeline.tuning.run_trial import TrialOutcome, TrialTask, Watch, ended, run_trial
from pipeline.tuning.sweep import Sweep
from pipeline.tuning.trials import Proposal
from pipeline.tuning.tuned_job import num_epochs

_METRIC, _EPOCH, _OUTCOME = "metric", "epoch", "outcome"
_OF_RAY = "_ray-"
# For a space's own run, whose epochs nobody knows.
_MANY_EPOCHS = 10_000

# Where a trial waits for its workers; a resource that takes nothing from them.
_AT_THE_HEAD = {"node:__internal_head__": 0.001}

_ENVIRONMENT = {
    # A trial that fails has no metric to tell.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # The sweep's own files and MLflow say it all.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The newer output tells much, also where it is asked to be silent.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ctrl-C and SIGTERM are the job's (command_line.py).
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Places that a space's own run names stay relative to where the sweep was started.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def run_with_ray(sweep: Sweep) -> None:
    """Run the trials in Ray's processes, as many at a time as there is room for.

    Raises:
        ClusterError: the cluster has no room for a single trial, or Ray Tune broke.
        PatchseedError: what could not be written, or who took the sweep over.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sweep.job.debug:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    recorder = _Recorder(sweep)
    place = sweep.folder.place
    for left in place.names():
        if left.startswith(_OF_RAY):
            # Of a driver that was killed; nobody reads it.
            place.child(left).delete()
    name = f"{_OF_RAY}{uuid.uuid4().hex[:8]}"
    alone = sweep.job.trial_workers == 1
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, task=sweep.task),
            {"CPU": sweep.job.trial_cpus, "GPU": sweep.job.trial_gpus} if alone else _AT_THE_HEAD,
        ),
        tune_config=tune.TuneConfig(
            metric=_METRIC,
            mode=sweep.space.mode,
            search_alg=_Search(sweep, recorder),
            scheduler=_scheduler(sweep),
            num_samples=sweep.num_trials - len(sweep.folder.trials),
            max_concurrent_trials=max_concurrent(sweep),
            # The process of a stopped trial must end for its workers to end.
            reuse_actors=alone,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(place),
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=sweep.job.trial_retries),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except Exception as fault:
        if recorder.fault is not None:
            raise recorder.fault from fault
        _raise_interruption(fault)
        raise ClusterError(
            f"the sweep ended inside Ray Tune ({one_line(fault)}); --resume {place.name} goes on"
        ) from fault
    finally:
        place.child(name).delete()
    if recorder.fault is not None:
        raise recorder.fault


def _raise_interruption(fault: BaseException) -> None:
    """Raise the Ctrl-C or SIGTERM behind a fault: Ray's core makes a SystemError of it."""
    below: BaseException | None = fault
    while below is not None:
        if not isinstance(below, Exception):
            raise below
        below = below.__cause__ or below.__context__


def max_concurrent(sweep: Sweep) -> int:
    """Trials that run beside each other.

    Raises:
        ClusterError: there is no room for one.
    """
    job = sweep.job
    cpus, gpus = job.trial_cpus * job.trial_workers, job.trial_gpus * job.trial_workers
    # Tune itself does not count a trial's Train workers: more trials would wait for each other.
    room = [int(count(name) // each) for name, each in (("CPU", cpus), ("GPU", gpus)) if each]
    if min(room) < 1:
        raise ClusterError(
            f"a trial needs {cpus} CPUs and {gpus:g} GPUs, the cluster has {count('CPU'):g} and "
            f"{count('GPU'):g}; lower --trial-workers, --trial-cpus or --trial-gpus"
        )
    return min([*room, job.max_concurrent or room[0]])


def _scheduler(sweep: Sweep) -> Any:
    if sweep.job.scheduler == "none":
        return None
    return ASHAScheduler(
        time_attr=_EPOCH,
        max_t=num_epochs(sweep.space, sweep.task.base) or _MANY_EPOCHS,
        grace_period=sweep.job.grace_epochs,
        reduction_factor=sweep.job.reduction_factor,
    )


def _trial(config: dict[str, Any], task: TrialTask) -> None:
    """One trial's life, in a process of Ray's."""

    def report(epoch: int, metric: float) -> None:
        tune.report({_EPOCH: epoch, _METRIC: metric})

    fit = _fit_with_workers if task.num_workers > 1 else None
    outcome = run_trial(task, config["values"], report, fit)
    told: dict[str, Any] = {_EPOCH: outcome.epochs or 1, _OUTCOME: asdict(outcome)}
    if outcome.status == "ok":
        told[_METRIC] = outcome.metric
    tune.report(told)


def _fit_with_workers(
    job: TrainingJob, folder: RunFolder, train: TrainHere, watch: Watch
) -> dict[str, Any]:
    """Train with Ray Train's workers, from a trial's process."""
    return fit_with_workers(WorkerTask(job, folder, train, _Unheard()), [_ToTune(watch)])


class _Unheard:
    """In the place of the driver's terminal: a sweep has a line for a trial's end alone."""

    def put_nowait(self, line: str) -> None:
        """Nothing."""


class _ToTune(TuneReportCallback):  # type: ignore[misc]
    """Tells Tune of a trial's epochs; Ray Train calls it when all workers have reported."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        latest = self._watch.latest()
        if latest is not None:
            told = {_EPOCH: latest[0], _METRIC: latest[1]}
            super().after_report(run_context, [told], None)


class _Search(Searcher):  # type: ignore[misc]
    """Our proposals, one by one."""

    def __init__(self, sweep: Sweep, recorder: "_Recorder") -> None:
        super().__init__(metric=_METRIC, mode=sweep.space.mode)
        self._sweep, self._recorder = sweep, recorder

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its settings for a restore of its own, which never comes.
        return {}

    def suggest(self, trial_id: str) -> Any:
        proposed = self._recorder.guarded(self._sweep.next)
        if proposed is None:
            return Searcher.FINISHED
        self._recorder.running[trial_id] = (proposed, time.monotonic())
        return {"values": proposed.values}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the recorder is told, and the sweep's folder knows."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's folder has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is ever restored from Ray's files."""


class _Recorder(tune.Callback):  # type: ignore[misc]
    """Notes trials as they end. A fault of ours ends the sweep, and is kept as it is."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self.running: dict[str, tuple[Proposal, float]] = {}
        self.fault: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def guarded(self, action: Any, *args: Any) -> Any:
        """What the action gives; None once anything has gone wrong."""
        if self.fault is not None:
            return None
        try:
            return action(*args)
        except Exception as fault:
            self.fault = fault
            return None

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        found = result.get(_OUTCOME)
        self._end(
            trial,
            TrialOutcome(**found)
            if found
            else TrialOutcome("stopped", result.get(_METRIC), epochs=result.get(_EPOCH)),
        )

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        # What a trial raises is caught in it: here are those whose process is gone.
        result = trial.last_result or {}
        reason = "the trial's process died: killed, or out of memory"
        self._end(
            trial, TrialOutcome("failed", result.get(_METRIC), reason, epochs=result.get(_EPOCH))
        )

    def _end(self, trial: Any, outcome: TrialOutcome) -> None:
        proposed, began = self.running.pop(trial.trial_id)
        self.guarded(self._sweep.end, ended(proposed, outcome, began))
