"""The door of jobs/train_detector.py: a detector's run, and its rounds of self-training."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from pipeline.cluster.detect_images import detect_images
from pipeline.cluster.training import run_training, say
from pipeline.config import DetectJob, TrainDetectorJob
from pipeline.data.places import require_places, with_absolute_places
from pipeline.detection.exported_detector import read_detector
from pipeline.detection.onnx_export import export_detector_onnx
from pipeline.detection.setup import read_table
from pipeline.errors import ConfigError
from pipeline.runs.folder import RunFolder
from pipeline.storage import Location


def train_detector(job: TrainDetectorJob) -> int:
    """Train what ``job`` describes, or go on with it, and write the detector to its output.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; finished windows and rounds are kept.
    """
    job = with_absolute_places(job)
    if job.rounds > 1 and "WORLD_SIZE" in os.environ:
        raise ConfigError(
            f"--rounds must be 1 under torchrun, got {job.rounds}: between rounds the images are "
            "gone over with Ray; start this job without torchrun"
        )
    while True:
        if job.rounds > 1:
            say(f"round {job.round} of {job.rounds}")
        run_training(job, partial(_finish, job), partial(_check, job))
        if job.round == job.rounds:
            return 0
        job = _next_round(job)


def _check(job: TrainDetectorJob) -> None:
    require_places(job)
    read_table(job)


def _finish(job: TrainDetectorJob, folder: RunFolder, summary: dict[str, Any]) -> None:
    target = Location.parse(job.output)
    folder.copy_model(target)
    if job.export is not None and job.round == job.rounds:
        for line in _export(folder, Location.parse(job.export), onnx=job.onnx):
            say(line)
    _tell_results(summary, folder, target)


def _export(folder: RunFolder, target: Location, *, onnx: bool) -> Iterator[str]:
    """Write the run's detector to ``target``; a line for each thing written."""
    for copy in folder.copy_model(target):
        yield f"exported {copy}"
    if onnx:
        check = export_detector_onnx(read_detector(target), target)
        yield (
            f"exported {check.file}: {check.num_detections} boxes on {check.num_images} images "
            f"differ by at most {check.max_box_difference:.1e} px from the detector's, "
            f"{check.num_unlike} have no partner"
        )


def _next_round(job: TrainDetectorJob) -> TrainDetectorJob:
    """The job of the round after ``job``: its detections are found, and become labels.

    The network goes on from where the round before ended; DropLoss, which keeps the first rounds
    from unlearning what has no box yet, is off (CutLER, section 3.3).
    """
    folder = RunFolder.of(job).place
    found = folder.child("detections")
    detect_images(
        DetectJob(
            labels=job.labels,
            detector=str(folder.child("model")),
            output=str(found),
            resume=True,
            tracking_uri=job.tracking_uri,
            experiment=job.experiment,
            debug=job.debug,
        )
    )
    detector = job.detector.model_copy(
        update={"init": str(folder.child("model")), "droploss": None}
    )
    return job.model_copy(
        update={"round": job.round + 1, "add_labels": str(found), "detector": detector}
    )


def _tell_results(summary: dict[str, Any], folder: RunFolder, target: Location) -> None:
    for name in ("ap50", "ap", "ar_100", "corloc"):
        value = summary["metrics"].get(f"probe/{name}_last")
        if value is not None:
            say(f"{name:8} {value:.2%}")
    say(f"detector {target}")
    say(f"figures  {folder.place.child('figures')}")
    say(f"detect   python jobs/detect_images.py --detector {target} --images ... --output ...")
