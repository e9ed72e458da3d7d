"""One detector's run from its settings to its results, on this worker; knows no Ray."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import TrainDetectorJob
from pipeline.data.box_transform import fixed_size
from pipeline.detection.batch_norm import precise_bn
from pipeline.detection.detector import Detector
from pipeline.detection.exported_detector import TestSize, write_detector
from pipeline.detection.predictor import Predictor
from pipeline.detection.probe import DetectionProbe, read_probe
from pipeline.detection.setup import DetectorSetup, set_up
from pipeline.errors import DataError
from pipeline.pretraining.figures import curves_picture
from pipeline.pretraining.run_folder import RunFolder
from pipeline.pretraining.run_life import (
    Outside,
    finished_results,
    go_back_to_latest,
    log_settings,
    open_job_tracker,
    summary_of,
)
from pipeline.pretraining.run_record import Epoch, RunRecord, log_results
from pipeline.tracking import NoTracker, Tracker
from pipeline.training.loop import Hooks, train
from pipeline.training.workers import Workers

KIND = "detector"
"""Of these runs, in summaries and MLflow."""

_TOLD = ("probe/ap50", "probe/ap", "probe/ar_100", "probe/corloc")
_LABELS = "labels.json"


def train_detector_here(
    job: TrainDetectorJob, folder: RunFolder, workers: Workers, outside: Outside
) -> dict[str, Any]:
    """Train until the last window, from where the folder's checkpoints end.

    A finished run is not trained again: its results are told, and sent to MLflow, once more.

    Returns:
        The summary that also lies in the folder.

    Raises:
        PatchseedError: as errors.py lists; finished windows are kept.
    """
    tags = {"patchseed.kind": KIND}
    finished = finished_results(job, folder, workers, outside, tags)
    if finished is not None:
        return finished
    setup = set_up(job, workers)
    _require_same_labels(setup, folder, workers)
    probe = read_probe(job)
    record = _open_record(job, folder, setup, outside, tags) if workers.is_first else None
    with record.tracker if record else NoTracker() as tracker:
        go_back_to_latest(folder, setup.state, setup.settings.num_epochs, workers, record)
        run = _Run(job, folder, workers, outside, setup, record, probe)
        train(setup.task, setup.state, setup.settings, workers, run.hooks())
        return run.finish(tracker)


@dataclass
class _Run:
    """The run while it trains: what happens after each window, and at the end."""

    job: TrainDetectorJob
    folder: RunFolder
    workers: Workers
    outside: Outside
    setup: DetectorSetup
    record: RunRecord | None
    probe: DetectionProbe | None
    _began: float = 0.0

    def hooks(self) -> Hooks:
        self._began = time.monotonic()
        return Hooks(
            on_epoch_end=self._after_window,
            on_step=self.record.on_step if self.record else lambda key, num_images: None,
        )

    def _after_window(self, epoch: int, numbers: dict[str, float]) -> None:
        """Measure, write a checkpoint, and tell."""
        last = epoch + 1 == self.job.num_epochs
        if self.probe is not None and ((epoch + 1) % self.job.probe.every == 0 or last):
            numbers |= self.probe.numbers(self._predictor(), self.workers)
        numbers["seconds"] = time.monotonic() - self._began
        self._began = time.monotonic()
        if self.record is not None:
            self.record.on_epoch(epoch, numbers)
            # Not before: a run that has learnt nothing is bound to no table.
            self.folder.write_json(_LABELS, _hashes(self.setup))
            state = {"loop": self.setup.state.state_dict(), "history": self.record.history}
            self.folder.checkpoints.save(epoch, state, score=None)
        self.outside.report(numbers)

    def _measured(self) -> Detector:
        """The detector as it detects; the one that trains keeps its running statistics."""
        detector = copy.deepcopy(self.setup.task.objective)
        if self.setup.measured is not None:
            precise_bn(detector, self.setup.batches_to_measure(), self.job.precise_bn)
        return detector

    def _predictor(self) -> Predictor:
        data = self.job.data
        transform = fixed_size(data.test_short_side, max_side=data.max_side)
        return Predictor(self._measured(), transform)

    def finish(self, tracker: Tracker) -> dict[str, Any]:
        """Write the detector and the summary."""
        detector = self._measured()
        metrics: dict[str, float] = {}
        if self.record is not None:
            last = self.record.history[-1]
            losses = [name for name in last if name.startswith("train/loss")]
            metrics = {f"{name}_last": last[name] for name in (*losses, *_TOLD) if name in last}
        metrics = self.workers.from_first(metrics)
        summary = {
            **summary_of(self.job, KIND, self.workers, metrics),
            **_lineage(self.setup),
        }
        if self.record is not None:
            self._write(detector, summary, tracker)
        self.workers.wait()
        self.outside.report(metrics)
        return summary

    def _write(self, detector: Detector, summary: dict[str, Any], tracker: Tracker) -> None:
        assert self.record is not None
        model = self.folder.place.child("model")
        data = self.job.data
        write_detector(
            detector,
            model,
            size=TestSize(data.test_short_side, data.max_side),
            classes=_classes(detector.options.num_classes),
            made_by=summary,
        )
        picture = curves_picture(self.record.history, None)
        self.folder.place.child("figures").child("curves.png").write_bytes(picture)
        self.folder.write_json("summary.json", summary)
        log_results(tracker, summary, {"curves": picture})
        for file in model.files():
            tracker.log_artifact_bytes(file.read_bytes(), f"model/{file.name}")


def _classes(count: int) -> list[str]:
    return ["object"] if count == 1 else [f"cluster {number}" for number in range(1, count + 1)]


def _lineage(setup: DetectorSetup) -> dict[str, Any]:
    """From the detector to the boxes it learnt from, and the weights it started from."""
    return {
        "num_images": len(setup.table),
        "num_boxes": len(setup.table.boxes_M4),
        "labels": [
            {"place": source.place, "manifest_sha256": source.manifest_sha256}
            for source in setup.table.sources
        ],
        "started_from": {"source": setup.start.source, "sha256": setup.start.sha256},
    }


def _require_same_labels(setup: DetectorSetup, folder: RunFolder, workers: Workers) -> None:
    """A run goes on with the very boxes it began with."""
    then = workers.from_first(folder.read_json(_LABELS) if workers.is_first else None)
    if then is not None and then != _hashes(setup):
        raise DataError(
            f"the labels have changed since this run began in {folder.place}; train anew with "
            "--overwrite, or restore the table"
        )


def _hashes(setup: DetectorSetup) -> dict[str, list[str]]:
    return {"manifest_sha256": [source.manifest_sha256 for source in setup.table.sources]}


def _open_record(
    job: TrainDetectorJob,
    folder: RunFolder,
    setup: DetectorSetup,
    outside: Outside,
    tags: dict[str, str],
) -> RunRecord:
    for line in _described(job, setup):
        outside.tell(line)
    tracker = open_job_tracker(job, folder)
    log_settings(tracker, job, tags)
    lineage = {
        f"labels.manifest_sha256.{number}": source.manifest_sha256
        for number, source in enumerate(setup.table.sources)
    }
    tracker.set_tags({"data.num_images": str(len(setup.table)), **lineage})
    return RunRecord(
        folder=folder,
        tracker=tracker,
        tell=outside.tell,
        num_epochs=setup.settings.num_epochs,
        steps_per_epoch=setup.task.steps_per_epoch,
        every_s=job.progress_seconds,
        shown=_shown,
    )


def _described(job: TrainDetectorJob, setup: DetectorSetup) -> list[str]:
    detector = setup.task.objective
    num_weights = sum(one.numel() for one in detector.parameters())
    num_steps = job.num_epochs * job.steps_per_epoch
    lines = [
        f"{len(setup.table):,} images with {len(setup.table.boxes_M4):,} boxes; left out: "
        + "; ".join(source.describe() for source in setup.table.sources),
        f"detector: {job.detector.kind}, {num_weights:,} weights, from {setup.start.source}",
    ]
    reference = job.optim.reference_batch
    line = f"{num_steps:,} steps of {job.batch_size} images at rate {job.lr:g}"
    if reference is not None and reference != job.batch_size:
        line += (
            f", scaled from {job.steps:,} steps of {reference} images at {job.optim.lr:g} "
            "(--optim.reference-batch)"
        )
    return [*lines, line]


def _shown(history: Sequence[Epoch]) -> str:
    """The last window, for people."""
    numbers = history[-1]
    losses = {name: value for name, value in numbers.items() if name.startswith("train/loss_")}
    told = f"loss {sum(losses.values()):.3f} (" + " ".join(
        f"{name.removeprefix('train/loss_')} {value:.3f}" for name, value in losses.items()
    )
    told += ")"
    for name, word in (("probe/ap50", "AP50"), ("probe/corloc", "CorLoc")):
        if name in numbers:
            told += f" {word} {numbers[name]:.1%}"
    return told
