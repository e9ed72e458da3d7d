"""What a run tells while it trains: lines for people, numbers for MLflow, a history for both.

Only rank 0 has one. Nothing here can stop the training: MLflow may be away (tracking/tracker.py),
and what is written to the run's folder is written again after the next epoch.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import StorageError
from pipeline.progress import duration
from pipeline.runs.folder import HISTORY, RunFolder
from pipeline.tracking.tracker import Tracker, start_tracker
from pipeline.training.loop import StepKey

Epoch = dict[str, float]
"""The numbers of one epoch by name; ``epoch`` counts from 1."""

_LOG = logging.getLogger(__name__)


@dataclass
class RunRecord:
    """The telling of one run."""

    folder: RunFolder
    tracker: Tracker
    tell: Callable[[str], None]
    num_epochs: int
    steps_per_epoch: int
    every_s: float
    shown: Callable[[Sequence[Epoch]], str]
    """The last epoch of a history in a few words for people."""

    history: list[Epoch] = field(default_factory=list)
    _told: float = field(default_factory=time.monotonic)
    _epoch_began: float = field(default_factory=time.monotonic)
    _images: int = 0

    def on_step(self, key: StepKey, num_images: int) -> None:
        """Tell from time to time how far the epoch is."""
        self._images += num_images
        now = time.monotonic()
        step = key.step - key.epoch * self.steps_per_epoch + 1
        if now - self._told < self.every_s or step == self.steps_per_epoch:
            return
        self._told = now
        speed = self._images / max(now - self._epoch_began, 1e-9)
        self.tell(
            f"epoch {key.epoch + 1}/{self.num_epochs} step {step}/{self.steps_per_epoch} "
            f"{speed:,.1f} img/s eta {self._time_left(key.epoch + step / self.steps_per_epoch)}"
        )

    def on_epoch(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Keep, send and tell the numbers of a finished epoch."""
        self.history.append({"epoch": epoch + 1, **numbers})
        self.tracker.log_metrics(numbers, step=epoch + 1)
        lines = "".join(json.dumps(one) + "\n" for one in self.history)
        try:
            self.folder.place.child(HISTORY).write_bytes(lines.encode())
        except StorageError as fault:
            _LOG.warning("the history of epoch %d is not written: %s", epoch + 1, fault)
        self.tell(f"epoch {epoch + 1}/{self.num_epochs} {self._shown()}")
        self._told = self._epoch_began = time.monotonic()
        self._images = 0

    def _shown(self) -> str:
        parts = [self.shown(self.history)]
        parts.append(f"{self.history[-1]['train/images_per_second']:,.1f} img/s")
        seconds = sum(one["seconds"] for one in self.history) / len(self.history)
        left = self.num_epochs - int(self.history[-1]["epoch"])
        if left:
            parts.append(f"eta {duration(seconds * left)}")
        return " ".join(parts)

    def _time_left(self, epochs_done: float) -> str:
        """By this epoch's speed; validation is not in it."""
        here = epochs_done - int(epochs_done)
        if not here:
            return "?"
        seconds = (time.monotonic() - self._epoch_began) / here
        return duration(seconds * (self.num_epochs - epochs_done))


def open_tracker(
    folder: RunFolder, *, uri: str | None, experiment: str, run_name: str, again: bool
) -> Tracker:
    """A tracker for the run; a run that goes on, or is told again, keeps its MLflow run.

    Args:
        folder: remembers how the MLflow run is found.
        uri: where runs are recorded; another one starts a new MLflow run.
        experiment: that it belongs to; another one starts a new MLflow run.
        run_name: of the MLflow run.
        again: whether the run is finished.
    """
    place = {"uri": uri, "experiment": experiment}
    known = folder.read_json("tracking.json") or {}
    # An older folder knows an id and no tag.
    known = known if {name: known.get(name) for name in place} == place else place
    tracker = start_tracker(uri, experiment=experiment, run_name=run_name, known=known, again=again)
    if known.get("tag") != tracker.tag:
        folder.write_json("tracking.json", {**known, "tag": tracker.tag})
    return tracker


def log_results(tracker: Tracker, folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """Send what a finished run came to, as it lies in its folder."""
    tracker.log_metrics(summary["metrics"])
    tracker.set_tags({"patchseed.finished": "true"})
    tracker.log_dict(summary, "summary.json")
    for name in ("figures", "model"):
        for file in folder.place.child(name).files():
            tracker.log_artifact_bytes(file.read_bytes(), f"{name}/{file.name}")


def log_history(tracker: Tracker, history: Sequence[Epoch]) -> None:
    """Send the numbers of all epochs; those that the tracker's run has are not sent twice."""
    for numbers in history:
        told = {name: value for name, value in numbers.items() if name != "epoch"}
        tracker.log_metrics(told, step=int(numbers["epoch"]))
