"""The door of jobs/evaluate_boxes.py: boxes and annotations -> the report, its files, its record.

One box per image is one_box.py, all boxes against all objects all_boxes.py, the failures'
pictures worst_cases.py. To write one more file: a line in ``_files``.
"""

import json
import sys
from typing import Any

from rich.console import Console

from pipeline.config import EvaluateJob
from pipeline.config.settings import flatten
from pipeline.data.pseudo_labels import versions
from pipeline.errors import ConfigError, StorageError
from pipeline.evaluation.all_boxes import (
    DetectionEvaluation,
    DetectionOptions,
    coco_results,
)
from pipeline.evaluation.one_box import Evaluation, measure_labels
from pipeline.evaluation.report import (
    as_json,
    precision_recall_png,
    print_detection_report,
    print_report,
    reliability_png,
)
from pipeline.evaluation.worst_cases import worst_cases_png
from pipeline.storage import Location
from pipeline.tracking.tracker import OFF, start_tracker

NUMBERS, CURVES, WORST = "evaluation.json", "precision_recall.png", "worst_cases.png"
RELIABILITY = "reliability.png"


def evaluate_boxes(job: EvaluateJob) -> dict[str, Any]:
    """Measure, write and record what the job asks for, print the report, and give every number.

    Raises:
        ConfigError: a place is not one we read or write.
        DataError: labels or ground truth are missing, damaged, or do not belong together.
        StorageError: a file cannot be written.
    """
    output = _output_of(job)
    evaluation = measure_labels(
        job.labels,
        job.ground_truth,
        ignore_difficult=job.ignore_difficult,
        num_resamples=job.num_resamples,
        seed=job.seed,
        detection=DetectionOptions(job.difficult, job.scores, job.class_aware),
    )
    detection = evaluation.detection
    if detection is None:
        raise ValueError("options of detection were given, but nothing was measured by them")
    numbers = as_json(evaluation) | {"evaluated_with": versions()}
    console = Console(file=sys.stdout)
    # Written first: what is printed last is then the result, whole or not at all.
    notes = _write(job, output, numbers, detection)
    _print(evaluation, detection, console)
    notes += _record(job, numbers, detection)
    for note in notes:
        console.print(f"  {note}", highlight=False, markup=False, soft_wrap=True)
    return numbers


def _print(evaluation: Evaluation, detection: DetectionEvaluation, console: Console) -> None:
    print_report(evaluation, console)
    print_detection_report(detection, console)


def _output_of(job: EvaluateJob) -> Location | None:
    if job.output is None:
        return None
    output = Location.parse(job.output)
    if output == Location.parse(job.labels):
        raise ConfigError(f"--output must not be the table's own folder, got {output}")
    if output.kind() == "file":
        raise StorageError(f"--output must be a folder, got the file {output}: choose another")
    return output


def _write(
    job: EvaluateJob,
    output: Location | None,
    numbers: dict[str, Any],
    detection: DetectionEvaluation,
) -> list[str]:
    """Write the files; what became of them, one line each."""
    notes: list[str] = []
    if output is not None:
        files = _files(numbers, detection)
        for name, data in files.items():
            output.child(name).write_bytes(data)
        notes.append(f"{', '.join(files)} are in {output}")
        if WORST not in files:
            notes.append(
                f"no {WORST}: nothing failed, or the images are not where labels name them"
            )
    if job.coco_results is not None:
        place = Location.parse(job.coco_results)
        place.write_bytes(json.dumps(coco_results(detection)).encode())
        notes.append(f"{detection.box_counts.total} boxes in COCO's results format: {place}")
    return notes


def _files(numbers: dict[str, Any], detection: DetectionEvaluation) -> dict[str, bytes]:
    files = {
        NUMBERS: (json.dumps(numbers, indent=2) + "\n").encode(),
        CURVES: precision_recall_png(detection),
    }
    quality = detection.quality
    if quality and quality.reliability:
        what = f"{quality.num_boxes:,} boxes, {quality.num_right:,} right at IoU 0.5"
        files[RELIABILITY] = reliability_png({"scores": quality.reliability}, what)
    worst = worst_cases_png(detection)
    return files if worst is None else files | {WORST: worst}


def _record(job: EvaluateJob, numbers: dict[str, Any], detection: DetectionEvaluation) -> list[str]:
    """A run of its own in MLflow, where one was asked for."""
    if job.tracking_uri is None or job.tracking_uri == OFF:
        return []
    tracker = start_tracker(
        job.tracking_uri,
        experiment=job.experiment,
        run_name=job.run_name or f"evaluate {Location.parse(job.labels).name}",
    )
    flat = flatten(numbers)
    tracker.log_params(job.model_dump(mode="json", exclude={"debug"}))
    tracker.log_metrics(
        {
            f"evaluation/{name}": value
            for name, value in flat.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
    )
    source = numbers["labels"]
    tracker.set_tags(
        {f"labels.{name}": source[name] for name in ("run_id", "method") if source.get(name)}
    )
    tracker.log_dict(numbers, NUMBERS)
    tracker.log_artifact_bytes(precision_recall_png(detection), f"pictures/{CURVES}")
    delivery = tracker.close()
    return [f"MLflow run {delivery.run_id}: {delivery}"]
