"""The detection job: a trained detector and its limits; the rest is any bulk job's life."""

import dataclasses
import json
import logging
from typing import Any

from pipeline.cluster.bulk_job import ImageList, Work, run_bulk_job
from pipeline.config import DetectJob
from pipeline.data.lake import Collection, TableImages
from pipeline.data.places import with_absolute_places
from pipeline.detection.exported_detector import StoredDetector, read_detector
from pipeline.detection.labeller import DetectedBoxes, method_of
from pipeline.errors import ConfigError
from pipeline.storage import Location


def detect_images(job: DetectJob) -> int:
    """Give every image of ``job.images``, or of ``job.labels``, one row of the table at
    ``job.output``.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; the output then still holds what is done.
    """
    logging.basicConfig(level=logging.INFO if job.debug else logging.WARNING, format="%(message)s")
    job = with_absolute_places(job)
    if job.output == job.labels:
        raise ConfigError(f"--output must not be the folder of --labels, got {job.output}")
    stored = read_detector(
        Location.parse(job.detector),
        score_threshold=job.score_threshold,
        max_detections=job.max_detections,
    )
    return run_bulk_job(job, _work(job, stored))


def _work(job: DetectJob, stored: StoredDetector) -> Work:
    method = method_of(stored.made_by)

    def images() -> ImageList:
        return Collection(str(job.images)) if job.labels is None else TableImages(job.labels)

    return Work(
        name="detect_images",
        verb="detect",
        run_name=f"detect-{method}",
        images=images,
        recipe=DetectedBoxes(stored, method, job.compute.precision, job.compute.batch_size),
        weights_sha256=stored.sha256,
        config=job.what_decides_the_boxes(_detector_as_told(stored)),
    )


def _detector_as_told(stored: StoredDetector) -> dict[str, Any]:
    """All that decides what it finds, as JSON values."""
    told: dict[str, Any] = {
        "weights_sha256": stored.sha256,
        "classes": stored.classes,
        "test": dataclasses.asdict(stored.size),
        "options": dataclasses.asdict(stored.detector.options),
    }
    # Tuples would not equal the lists that a resumed run reads.
    return dict(json.loads(json.dumps(told)))
