"""What every training run goes through, whatever it learns: its tracker, its past, its end.

Rank 0 alone writes; all read the same folder.
"""

import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.config import TrainingJob, flatten
from pipeline.data.pseudo_labels import config_hash
from pipeline.errors import StorageError
from pipeline.pretraining.run_folder import RunFolder, run_name
from pipeline.pretraining.run_record import RunRecord, log_history, log_results, open_tracker
from pipeline.tracking import OFF, NoTracker, Tracker
from pipeline.training.loop import LoopState
from pipeline.training.workers import Workers


@dataclass(frozen=True)
class Outside:
    """What a run tells to whoever started it, rank 0 alone but for ``report``."""

    tell: Callable[[str], None]
    """A line for people."""

    report: Callable[[dict[str, float]], None] = lambda numbers: None
    """An epoch's numbers, from every worker: Ray Train counts the calls."""


def finished_results(
    job: TrainingJob,
    folder: RunFolder,
    workers: Workers,
    outside: Outside,
    tags: Mapping[str, str],
) -> dict[str, Any] | None:
    """The summary of a run that is finished, told and sent to MLflow once more; else None."""
    finished = workers.from_first(folder.summary() if workers.is_first else None)
    if finished is None:
        return None
    if workers.is_first:
        outside.tell(f"{folder.place} is finished already: these are its results")
        with open_job_tracker(job, folder) as tracker:
            log_settings(tracker, job, tags)
            latest = folder.checkpoints.latest()
            if latest is not None:
                log_history(tracker, latest.state["history"])
            log_results(tracker, finished, {})
    outside.report(finished["metrics"])
    return dict(finished)


def open_job_tracker(job: TrainingJob, folder: RunFolder) -> Tracker:
    """The MLflow run of the job's run folder."""
    if job.tracking_uri == OFF:
        return NoTracker()
    name = job.run_name or run_name(job)
    local = Path(folder.place.path) if folder.place.is_local else Path(tempfile.gettempdir())
    return open_tracker(
        folder,
        uri=job.tracking_uri,
        experiment=job.experiment,
        run_name=name,
        spool=local / "_tracking",
    )


def log_settings(tracker: Tracker, job: TrainingJob, tags: Mapping[str, str]) -> None:
    """All settings, and the tags by which runs are found; ``tags`` are the job's own."""
    tracker.log_params(flatten(job.model_dump(mode="json")))
    tracker.set_tags(
        {
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
        record.tell(f"going on after epoch {epoch + 1} of {num_epochs}")


def summary_of(
    job: TrainingJob, kind: str, workers: Workers, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """What every finished run says of itself; a job adds its own."""
    return {
        "kind": kind,
        "finished": True,
        "name": run_name(job),
        "config_hash": config_hash(job.what_decides_the_weights()),
        "config": job.model_dump(mode="json"),
        "metrics": dict(metrics),
        "num_workers": workers.size,
        "versions": versions(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """What the numbers may depend on."""
    packages = ("patchseed", "torch", "torchvision", "timm")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
