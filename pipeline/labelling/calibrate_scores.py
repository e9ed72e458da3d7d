"""Scores of a table -> probabilities, told in order: labelled images, map, the new table, report.

A box's probability is that it has IoU >= 0.5 with some object. The map is fitted on the boxes of
the labelled images (evaluation/score_maps.py) and applied to every box of the table; what it is
worth is measured on images it was not fitted on. The new table is the old one but for its scores;
how they came about stands in its manifest, under ``calibration.``, and in ``_calibration`` beside.

Shape letters:  D boxes of all labelled images   C columns, of which the first is the score
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import CalibrateJob
from pipeline.config.calibration import CalibrationMethod
from pipeline.data.ground_truth import GroundTruth, read_ground_truth
from pipeline.data.places import with_absolute_places
from pipeline.data.pseudo_labels import (
    SCHEMA,
    Manifest,
    iterate_labels,
    manifest_sha256,
    read_manifest,
    versions,
)
from pipeline.drawing.tables import markdown_table
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.all_boxes import hash_of_truth
from pipeline.evaluation.predictions import EVIDENCE, Prediction, match, read_predictions
from pipeline.evaluation.report import ranking_text, reliability_png
from pipeline.evaluation.score_maps import (
    NUM_FOLDS,
    LogisticMap,
    ScoreMap,
    as_columns,
    cross_validated,
    fit_score_map,
)
from pipeline.evaluation.scored_boxes import (
    ScoredBoxes,
    ScoreQuality,
    measure_scores,
    scored_boxes,
)
from pipeline.labelling.run import CALIBRATION_FOLDER, open_run, require_free, with_all_columns
from pipeline.lease import Lease
from pipeline.storage import Location

REPORT, PICTURE = "report.md", "reliability.png"

MIN_IMAGES = 10
"""Labelled images with a box: two for each fold."""

FEW_IMAGES: dict[CalibrationMethod, int] = {"logistic": 50, "isotonic": 100}
"""Below these the error was over .1 for half of all draws of images (docs/label.md)."""

_NUM_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class LabelledSample:
    """What the ground truth says of the table.

    Attributes:
        boxes: of all labelled images.
        evidence: the columns beside the score that every box of the whole table has.
        num_images: labelled ones that have a box.
        num_boxless: labelled ones that are in the table and have none.
        num_missing: labelled ones that are not in the table.
    """

    boxes: ScoredBoxes
    evidence: tuple[str, ...]
    num_images: int
    num_boxless: int
    num_missing: int


@dataclass(frozen=True, eq=False)
class ScoreCalibration:
    """A map, and what scores are worth without it and with it.

    Attributes:
        score_map: fitted on all labelled images.
        columns: what it takes, the score first.
        before: the table's scores; None where there are none.
        after: probabilities of each box by a map that was fitted on other images.
    """

    score_map: ScoreMap
    columns: tuple[str, ...]
    before: ScoreQuality | None
    after: ScoreQuality


def calibrate_scores(job: CalibrateJob) -> int:
    """Write the table of ``job.labels`` with probabilities for scores, and a report of them.

    Returns:
        The exit code: 0.

    Raises:
        ConfigError: a place is not one we read or write.
        DataError: table or ground truth are missing, damaged, or do not belong together; there are
            too few labelled images, or all of their boxes are right, or all wrong; or the table
            changes while it is read.
        StorageError: the output holds something, is in use, or cannot be written.
    """
    job = with_absolute_places(job)
    labels, output = Location.parse(job.labels), Location.parse(job.output)
    _require_another_folder(output, labels)
    source, source_hash = read_manifest(labels), manifest_sha256(labels)
    truths = read_ground_truth(Location.parse(job.ground_truth))
    sample = labelled_sample(labels, truths)
    _require_enough(sample, job)
    found = calibrate(sample, method=job.method, seed=job.seed)
    said = job.what_decides_the_scores(hash_of_truth(truths), source_hash) | _told(sample, found)
    config = {k: v for k, v in source.config.items() if not k.startswith("calibration.")} | said
    report, picture = _report(sample, found, said), _picture(found)
    with Lease(output) as lease:
        require_free(output, overwrite=job.overwrite, resumable=False)
        if manifest_sha256(labels) != source_hash:
            raise DataError(f"{labels} was written anew while it was read; start again")
        lease.check()
        run = open_run(output, config, resume=False, overwrite=job.overwrite)
        output.child(CALIBRATION_FOLDER).child(PICTURE).write_bytes(picture)
        output.child(CALIBRATION_FOLDER).child(REPORT).write_bytes(report.encode())
        manifest = run.commit_rows(
            rescored(labels, found),
            weights_sha256=source.weights_sha256,
            collection=source.collection,
            job=source.job | {"calibration": job.model_dump(mode="json")},
            versions=versions(),
        )
    _summarise(job, manifest, sample, found)
    return 0


def labelled_sample(labels: Location, truths: Sequence[GroundTruth]) -> LabelledSample:
    """The boxes of the labelled images, of a pass over the whole table.

    Raises:
        DataError: the table is damaged, or no image of it is labelled.
    """
    evidence = set(EVIDENCE)

    def watched() -> Iterator[Prediction]:
        for one in read_predictions(labels):
            if len(one.detections):
                evidence.intersection_update(one.detections.evidence)
            yield one

    held = match(watched(), truths).predictions
    known = [(truth, one.detections) for truth, one in zip(truths, held, strict=True) if one]
    with_boxes = [(truth, found) for truth, found in known if len(found)]
    return LabelledSample(
        scored_boxes([truth for truth, _ in with_boxes], [found for _, found in with_boxes]),
        tuple(name for name in EVIDENCE if name in evidence),
        num_images=len(with_boxes),
        num_boxless=len(known) - len(with_boxes),
        num_missing=held.count(None),
    )


def calibrate(sample: LabelledSample, *, method: CalibrationMethod, seed: int) -> ScoreCalibration:
    """Fit a map on all labelled images, and measure such maps on images they were not fitted on.

    The sample must hold right boxes and wrong ones.
    """
    boxes = sample.boxes
    names = sample.evidence if method == "logistic" else ()
    columns_DC = as_columns(boxes.score_D, [boxes.evidence[name] for name in names])
    held_out_D, fold_D = cross_validated(columns_DC, boxes.hit_D, boxes.image_D, method, seed=seed)
    before, after = (
        measure_scores(one, num_resamples=_NUM_RESAMPLES, seed=seed)
        for one in (boxes, replace(boxes, score_D=held_out_D, evidence={}, fold_D=fold_D))
    )
    if after is None:
        raise ValueError("the boxes must be right and wrong ones")
    score_map = fit_score_map(columns_DC, boxes.hit_D, method)
    return ScoreCalibration(score_map, ("scores", *names), before, after)


def rescored(labels: Location, found: ScoreCalibration) -> Iterator[pa.Table]:
    """The whole table with probabilities for scores; all else stays as it is."""
    for table in iterate_labels(labels):
        whole = with_all_columns(table)
        rows = whole.select(["boxes", *found.columns]).to_pylist()
        # Boxes without scores count as sure ones, as everywhere in evaluation/.
        values = [
            value
            for row in rows
            if row["boxes"]
            for value in zip(
                row["scores"] or [1.0] * len(row["boxes"]),
                *(row[name] for name in found.columns[1:]),
                strict=True,
            )
        ]
        columns_DC = np.array(values, np.float64).reshape(-1, len(found.columns))
        left = iter(found.score_map(columns_DC).tolist())
        scores = [
            [next(left) for _ in row["boxes"]] if row["boxes"] else row["scores"] for row in rows
        ]
        field = SCHEMA.field("scores")
        place = whole.schema.get_field_index("scores")
        yield whole.set_column(place, field, pa.array(scores, field.type))


def _require_another_folder(output: Location, labels: Location) -> None:
    if os.path.realpath(output.path) == os.path.realpath(labels.path):
        raise ConfigError(f"--output must not be the table of --labels itself, got {output}")
    if output.kind() == "file":
        raise ConfigError(f"--output must be a folder, got the file {output}")


def _require_enough(sample: LabelledSample, job: CalibrateJob) -> None:
    if sample.num_images < MIN_IMAGES:
        raise DataError(
            f"at least {MIN_IMAGES} images of {job.ground_truth} must have a box in {job.labels}, "
            f"got {sample.num_images} ({sample.num_boxless} have none, {sample.num_missing} are "
            f"not in the table): label more; {FEW_IMAGES[job.method]} is a good number"
        )
    hit_D = sample.boxes.hit_D
    if hit_D.all() or not hit_D.any():
        fate = "right" if hit_D.all() else "wrong"
        raise DataError(
            f"all {len(hit_D):,} boxes of {sample.num_images} labelled images are {fate} (IoU >= "
            "0.5 with an object): nothing tells sure boxes from others; label more images"
        )


def _told(sample: LabelledSample, found: ScoreCalibration) -> dict[str, Any]:
    """What the manifest says of the map, flat."""
    told: dict[str, Any] = {
        "num_images": sample.num_images,
        "num_boxes": len(sample.boxes),
        "num_right": found.after.num_right,
        "columns": list(found.columns),
        **found.score_map.told(),
    }
    for when, quality in (("before", found.before), ("cross_validated", found.after)):
        told |= {
            f"{when}.{name}": None if value is None else round(value, 4)
            for name, value in _figures(quality).items()
        }
    return {f"calibration.{name}": value for name, value in told.items()}


def _figures(quality: ScoreQuality | None) -> dict[str, float | None]:
    if quality is None:
        return dict.fromkeys(("auroc", "ece", "brier"))
    return {
        "auroc": quality.ranking["scores"].auroc,
        "ece": quality.ece,
        "brier": quality.brier,
    }


_AFTER = "after, on images not fitted on"


def _comparison(found: ScoreCalibration) -> list[tuple[str, str, str]]:
    """What is measured, before and after."""
    shown: list[list[str]] = []
    for quality in (found.before, found.after):
        figures = _figures(quality)
        ends = ["n/a" if (v := figures[name]) is None else f"{v:.3f}" for name in ("ece", "brier")]
        auroc = "n/a" if quality is None else ranking_text(quality.ranking["scores"])
        shown.append([auroc, *ends])
    return list(zip(("AUROC", "ECE", "Brier score"), *shown, strict=True))


def _report(sample: LabelledSample, found: ScoreCalibration, said: dict[str, Any]) -> str:
    lines = [
        "# Scores as probabilities",
        "",
        f"{_sample_text(sample, found)} {_left_out_text(sample)}",
        "",
        *(f"**{line}**\n" for line in _warnings(sample, found, said["calibration.method"])),
        markdown_table(("", "before", _AFTER), _comparison(found), right=(1, 2)),
        f"AUROC with its 95 % interval over images. After: {NUM_FOLDS} folds of images, and only "
        "boxes of one fold are ranked against each other.",
        "",
        f"![Share of right boxes over what scores say]({PICTURE})",
        "",
        "How it was made, as in the manifest:",
        "",
        markdown_table(
            ("setting", "value"),
            [
                (name, json.dumps(v) if isinstance(v, list | tuple) else v)
                for name, v in said.items()
            ],
        ),
    ]
    return "\n".join(lines)


def _picture(found: ScoreCalibration) -> bytes:
    curves = {"before": found.before, _AFTER: found.after}
    some = {name: one.reliability for name, one in curves.items() if one and one.reliability}
    what = f"{found.after.num_boxes:,} boxes, {found.after.num_right:,} right at IoU 0.5"
    return reliability_png(some, what)


def _sample_text(sample: LabelledSample, found: ScoreCalibration) -> str:
    return (
        f"{found.after.num_right:,} of {len(sample.boxes):,} boxes in {sample.num_images:,} "
        "labelled images are right (IoU >= 0.5 with an object)."
    )


def _left_out_text(sample: LabelledSample) -> str:
    return (
        f"Of further labelled images {sample.num_boxless:,} have no box, and "
        f"{sample.num_missing:,} are not in the table."
    )


def _warnings(
    sample: LabelledSample, found: ScoreCalibration, method: CalibrationMethod
) -> Iterator[str]:
    few = FEW_IMAGES[method]
    if sample.num_images < few:
        yield (
            f"FEW LABELS: {sample.num_images} images; below {few}, by --method {method}, the "
            "ECE is as often as not over 0.1 (docs/label.md). Label more, drawn at random"
        )
    if isinstance(found.score_map, LogisticMap) and not any(found.score_map.weights):
        yield "SCORES SAY NOTHING on these images: every box gets the share of right ones"
    before = None if found.before is None else found.before.brier
    if before is not None and found.after.brier is not None and found.after.brier > before:
        yield "THE SCORES WERE BETTER BEFORE, by the Brier score: label more images, or keep them"


def _summarise(
    job: CalibrateJob, manifest: Manifest, sample: LabelledSample, found: ScoreCalibration
) -> None:
    _say(f"{manifest.rows:,} rows in {job.output}, their scores are probabilities now")
    _say(f"  {_sample_text(sample, found)}")
    if sample.num_boxless or sample.num_missing:
        _say(f"  {_left_out_text(sample)}")
    _say(f"  {job.method} on {', '.join(found.columns)}")
    for name, before, after in _comparison(found):
        _say(f"  {name + ':':12} {before} before, {after} {_AFTER}")
    for line in _warnings(sample, found, job.method):
        _say(f"  {line}")
    _say(f"Report:      {Location.parse(job.output).child(CALIBRATION_FOLDER).child(REPORT)}")
    _say(f"Measure:     python jobs/evaluate_boxes.py --labels {job.output} --ground-truth GT")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
