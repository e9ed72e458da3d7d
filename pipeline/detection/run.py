"""One detector's run from its settings to its results, on this worker; knows no Ray."""

import copy
from collections.abc import Sequence
from typing import Any

from pipeline.config import TrainDetectorJob
from pipeline.detection.batch_norm import precise_bn
from pipeline.detection.box_loader import SeenSize
from pipeline.detection.detector import Detector
from pipeline.detection.exported_detector import write_detector
from pipeline.detection.predictor import Predictor
from pipeline.detection.probe import DetectionProbe, read_probe
from pipeline.detection.setup import DetectorSetup, set_up
from pipeline.errors import DataError
from pipeline.runs.curves import curves_picture
from pipeline.runs.folder import RunFolder
from pipeline.runs.life import (
    Outside,
    Telling,
    TrainingRun,
    summary_of,
)
from pipeline.runs.record import Epoch
from pipeline.tracking.tracker import Tracker
from pipeline.training.workers import Workers

_TOLD = ("probe/ap50", "probe/ap", "probe/ar_100", "probe/corloc")
_LABELS = "labels.json"


def train_detector_here(
    job: TrainDetectorJob, folder: RunFolder, workers: Workers, outside: Outside
) -> dict[str, Any]:
    """Train on this worker, or tell what was trained; see ``TrainingRun.run``."""
    return _DetectorRun(job, folder, workers, outside).run()


class _DetectorRun(TrainingRun):
    """Probes, and the detector written at the end; an epoch is a window of steps."""

    job: TrainDetectorJob
    setup: DetectorSetup
    probe: DetectionProbe | None

    def set_up(self) -> DetectorSetup:
        setup = set_up(self.job, self.workers)
        _require_same_labels(setup, self.folder, self.workers)
        self.probe = read_probe(self.job)
        return setup

    def telling(self) -> Telling:
        return Telling(_described(self.job, self.setup), _tagged(self.setup), _shown)

    def look(self, epoch: int, numbers: dict[str, float]) -> float | None:
        last = epoch + 1 == self.job.num_epochs
        if self.probe is not None and ((epoch + 1) % self.job.probe.every == 0 or last):
            predictor = Predictor(self._measured(), self._seen_size)
            numbers |= self.probe.numbers(predictor, self.workers)
        if self.workers.is_first:
            # Not before: a run that has learnt nothing is bound to no table.
            self.folder.write_json(_LABELS, _hashes(self.setup))
        return None

    def _measured(self) -> Detector:
        """The detector as it detects; the one that trains keeps its running statistics."""
        detector = copy.deepcopy(self.setup.task.objective)
        if self.setup.measured is not None:
            precise_bn(detector, self.setup.batches_to_measure(), self.job.precise_bn)
        return detector

    @property
    def _seen_size(self) -> SeenSize:
        return SeenSize(self.job.data.test_short_side, self.job.data.max_side)

    def finish(self, tracker: Tracker) -> dict[str, Any]:
        """Write the detector and the summary."""
        detector = self._measured()
        metrics = self.last_numbers(lambda name: name.startswith("train/loss") or name in _TOLD)
        summary = {**summary_of(self.job, self.workers, metrics), **_lineage(self.setup)}
        if self.record is not None:
            self._write(detector, summary, tracker)
        return summary

    def _write(self, detector: Detector, summary: dict[str, Any], tracker: Tracker) -> None:
        assert self.record is not None
        model = self.folder.place.child("model")
        write_detector(
            detector,
            model,
            size=self._seen_size,
            classes=_classes(detector.options.num_classes),
            made_by=summary,
        )
        self.publish(summary, {"curves": curves_picture(self.record.history, None)}, tracker)


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


def _tagged(setup: DetectorSetup) -> dict[str, Any]:
    manifests = enumerate(_hashes(setup)["manifest_sha256"])
    lineage = {f"manifest_sha256.{number}": sha256 for number, sha256 in manifests}
    return {"num_images": len(setup.table), **lineage}


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
