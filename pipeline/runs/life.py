"""What every training run goes through, whatever it learns: its tracker, its past, its end.

Rank 0 alone writes; all read the same folder. A kind of run is a ``TrainingRun`` with its own
``set_up``, ``telling``, ``look`` and ``finish`` (classification/run.py, pretraining/run.py); which
kinds there are stands in kinds.py.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from pipeline.config import TrainingJob, flatten
from pipeline.data.pseudo_labels import config_hash, versions
from pipeline.errors import StorageError
from pipeline.runs.folder import RunFolder, run_name
from pipeline.runs.record import (
    Epoch,
    RunRecord,
    log_history,
    log_results,
    open_tracker,
)
from pipeline.tracking.tracker import OFF, NoTracker, Tracker
from pipeline.training.loop import Hooks, LoopSettings, LoopState, Task, train
from pipeline.training.workers import Workers


@dataclass(frozen=True)
class Outside:
    """What a run tells to whoever started it, rank 0 alone but for ``report``."""

    tell: Callable[[str], None]
    """A line for people."""

    report: Callable[[dict[str, float]], None] = lambda numbers: None
    """An epoch's numbers, from every worker: Ray Train counts the calls."""


TrainHere = Callable[[Any, RunFolder, Workers, Outside], dict[str, Any]]
"""A job's run on one of its workers, from its settings to its summary."""


class Setup(Protocol):
    """What each kind's ``set_up`` gives: all of a run but its past."""

    @property
    def task(self) -> Task:
        """What is trained on what."""

    @property
    def state(self) -> LoopState:
        """Of the loop."""

    @property
    def settings(self) -> LoopSettings:
        """Of the loop."""


@dataclass(frozen=True)
class Telling:
    """What a kind of run tells of itself."""

    lines: Iterable[str]
    """For people, before it trains."""

    data: Mapping[str, Any]
    """Tags ``data.NAME`` of MLflow."""

    shown: Callable[[Sequence[Epoch]], str]
    """The last epoch of a history, for people."""


class TrainingRun:
    """A run on one worker: its past, what happens after each epoch, and its end."""

    job: Any
    setup: Any
    """A ``Setup``; each kind knows its own."""

    def __init__(
        self, job: TrainingJob, folder: RunFolder, workers: Workers, outside: Outside
    ) -> None:
        self.job = job
        self.folder = folder
        self.workers = workers
        self.outside = outside
        self.record: RunRecord | None = None
        """Of rank 0 alone."""

        self._began = 0.0

    def set_up(self) -> Any:
        """The ``Setup`` that the job describes, the same on every worker; what else can be wrong
        with a run that begins or goes on is told here too.
        """
        raise NotImplementedError

    def telling(self) -> Telling:
        """What is told of the run before it trains, and after each epoch."""
        raise NotImplementedError

    def tags(self) -> dict[str, str]:
        """By which the runs of the kind are found in MLflow, beside those of every kind."""
        return {}

    def look(self, epoch: int, numbers: dict[str, float]) -> float | None:
        """Add to an epoch's numbers what is measured after it; the score the best one is kept by,
        None where only the last ones are.
        """
        raise NotImplementedError

    def finish(self, tracker: Tracker) -> dict[str, Any]:
        """Write the results, on rank 0; the summary that then also lies in the folder."""
        raise NotImplementedError

    def hooks(self) -> Hooks:
        """What the loop calls; a kind may add to it."""
        return Hooks(
            on_epoch_end=self._after_epoch,
            on_step=self.record.on_step if self.record else lambda key, num_images: None,
        )

    def run(self) -> dict[str, Any]:
        """Train until the last epoch, from where the folder's checkpoints end.

        A finished run is not trained again: its results are told, and sent to MLflow, once more.

        Returns:
            The summary that also lies in the folder.

        Raises:
            PatchseedError: as errors.py lists; finished epochs are kept.
        """
        finished = self.workers.from_first(self.folder.summary() if self.workers.is_first else None)
        if finished is not None:
            if self.workers.is_first:
                self._tell_again(finished)
            self.outside.report(finished["metrics"])
            return dict(finished)
        self.setup = self.set_up()
        if self.workers.is_first:
            self.record = self._open_record(self.telling())
        return self._train()

    def _tell_again(self, finished: Mapping[str, Any]) -> None:
        self.outside.tell(f"{self.folder.place} is finished already: these are its results")
        with open_job_tracker(self.job, self.folder, again=True) as tracker:
            log_settings(tracker, self.job, {**self.tags(), "patchseed.finished": "true"})
            tracker.set_tags(_data_tags(finished))
            log_history(tracker, self.folder.history())
            log_results(tracker, self.folder, finished)

    def _open_record(self, telling: Telling) -> RunRecord:
        """Tell what is about to be trained, here and to MLflow."""
        for line in telling.lines:
            self.outside.tell(line)
        tracker = open_job_tracker(self.job, self.folder)
        log_settings(tracker, self.job, self.tags())
        tracker.set_tags({f"data.{name}": str(value) for name, value in telling.data.items()})
        setup: Setup = self.setup
        return RunRecord(
            folder=self.folder,
            tracker=tracker,
            tell=self.outside.tell,
            num_epochs=setup.settings.num_epochs,
            steps_per_epoch=setup.task.steps_per_epoch,
            every_s=self.job.progress_seconds,
            shown=telling.shown,
        )

    def _train(self) -> dict[str, Any]:
        setup: Setup = self.setup
        with self.record.tracker if self.record else NoTracker() as tracker:
            last = setup.settings.num_epochs
            go_back_to_latest(self.folder, setup.state, last, self.workers, self.record)
            self._began = time.monotonic()
            train(setup.task, setup.state, setup.settings, self.workers, self.hooks())
            summary = self.finish(tracker)
            self.workers.wait()
            self.outside.report(summary["metrics"])
            return summary

    def _after_epoch(self, epoch: int, numbers: dict[str, float]) -> None:
        """Measure, tell, and write a checkpoint."""
        score = self.look(epoch, numbers)
        numbers["seconds"] = time.monotonic() - self._began
        self._began = time.monotonic()
        if self.record is not None:
            self.record.on_epoch(epoch, numbers)
            state = {"loop": self.setup.state.state_dict(), "history": self.record.history}
            self.folder.checkpoints.save(epoch, state, score=score)
        self.outside.report(numbers)

    def last_numbers(self, told: Callable[[str], bool]) -> dict[str, float]:
        """``NAME_last`` of the last epoch's numbers that are to be told, on every worker."""
        last = self.record.history[-1] if self.record is not None else {}
        found = {f"{name}_last": value for name, value in last.items() if told(name)}
        of_first: dict[str, float] = self.workers.from_first(found)
        return of_first

    def publish(
        self, summary: Mapping[str, Any], figures: Mapping[str, bytes], tracker: Tracker
    ) -> None:
        """Write pictures and summary, and send them with the files of the folder's ``model``."""
        for name, picture in figures.items():
            self.folder.place.child("figures").child(f"{name}.png").write_bytes(picture)
        self.folder.write_json("summary.json", dict(summary))
        log_results(tracker, self.folder, summary)


def _data_tags(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's ``Telling`` called ``data``, from the summary of any kind of run."""
    data = dict(summary.get("data", {}))
    if "num_images" in summary:
        data["num_images"] = summary["num_images"]
    for number, labels in enumerate(summary.get("labels", [])):
        data[f"manifest_sha256.{number}"] = labels["manifest_sha256"]
    return {f"data.{name}": value for name, value in data.items()}


def open_job_tracker(job: TrainingJob, folder: RunFolder, *, again: bool = False) -> Tracker:
    """The MLflow run of the job's run folder; ``again`` says that the run is finished."""
    if job.tracking_uri == OFF:
        return NoTracker()
    name = job.run_name or run_name(job)
    return open_tracker(
        folder,
        uri=job.tracking_uri,
        experiment=job.experiment,
        run_name=name,
        again=again,
    )


def log_settings(tracker: Tracker, job: TrainingJob, tags: Mapping[str, str]) -> None:
    """All settings, and the tags by which runs are found; ``tags`` are the kind's own."""
    tracker.log_params(flatten(job.model_dump(mode="json")))
    tracker.set_tags(
        {
            "patchseed.kind": job.kind,
            "patchseed.finished": "false",
            "patchseed.config_hash": config_hash(job.what_decides_the_weights()),
            "patchseed.run": run_name(job),
            **tags,
        }
    )


def go_back_to_latest(
    folder: RunFolder,
    state: LoopState,
    num_epochs: int,
    workers: Workers,
    record: RunRecord | None,
) -> None:
    """Continue after the newest whole checkpoint, if there is one.

    Raises:
        StorageError: the workers do not see the same folder, or no checkpoint can be read.
    """
    latest = folder.checkpoints.latest()
    epoch = -1 if latest is None else latest.epoch
    if workers.from_first(epoch) != epoch:
        raise StorageError(
            f"--output must be on storage that all workers see, got {folder.place}: worker "
            f"{workers.rank} finds other checkpoints there than worker 0"
        )
    if latest is None:
        return
    state.load_state_dict(latest.state["loop"])
    if record is not None:
        record.history[:] = latest.state["history"]
        log_history(record.tracker, record.history)
        record.tell(f"going on after epoch {epoch + 1} of {num_epochs}")


def summary_of(job: TrainingJob, workers: Workers, metrics: Mapping[str, float]) -> dict[str, Any]:
    """What every finished run says of itself; a kind adds its own."""
    return {
        "kind": job.kind,
        "finished": True,
        "name": run_name(job),
        "config_hash": config_hash(job.what_decides_the_weights()),
        "config": job.model_dump(mode="json"),
        "metrics": dict(metrics),
        "num_workers": workers.size,
        "versions": versions(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
