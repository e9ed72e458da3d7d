"""The sheet of failures: which images are on it, and in which colours what is drawn."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.evaluation.all_boxes import (
    DetectionEvaluation,
    DetectionOptions,
    measure_all_boxes,
)
from pipeline.evaluation.average_precision import average_precision
from pipeline.evaluation.predictions import Detections, Prediction
from pipeline.evaluation.worst_cases import (
    FALSE,
    MISSED,
    TRUE,
    most_missed,
    surest_false_boxes,
    worst_cases_png,
)
from tests.evaluation.annotated import found, truth

A, B, C = [5, 5, 35, 35], [50, 50, 90, 95], [55, 5, 95, 40]


def test_images_with_most_misses_come_first_and_those_without_never() -> None:
    truths = [truth(boxes, name=f"{i}.jpg") for i, boxes in enumerate([[A], [A, B], [A], []])]
    matches = average_precision(truths, [found(), found(), found([A]), found([C])]).matches
    assert most_missed(matches, 9) == [1, 0]
    assert most_missed(matches, 1) == [1]


def test_false_boxes_come_by_their_score_once_per_image() -> None:
    truths = [truth([A], name=f"{i}.jpg") for i in range(3)]
    boxes = [found([A, B], [0.9, 0.2]), found([B, C], [0.6, 0.7]), found([A], [0.9])]
    matches = average_precision(truths, boxes).matches
    assert surest_false_boxes(matches, 9) == [(1, 0.7), (0, 0.2)]
    assert surest_false_boxes(matches, 1) == [(1, 0.7)]


def evaluation_of(path: Path, boxes: Detections) -> DetectionEvaluation:
    Image.new("RGB", (100, 100), (40, 40, 120)).save(path)
    prediction = Prediction(str(path), None, detections=boxes)
    return measure_all_boxes(
        [truth([A, B])], [prediction], DetectionOptions(), num_resamples=100, seed=0
    )


def colours_on(sheet: bytes | None) -> set[tuple[int, ...]]:
    assert sheet is not None
    with Image.open(BytesIO(sheet)) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    return {
        colour for colour in (MISSED, TRUE, FALSE) if (abs(pixels - colour) < 8).all(axis=1).any()
    }


def test_missed_found_and_false_have_their_own_colours(tmp_path: Path) -> None:
    all_three = evaluation_of(tmp_path / "1.png", found([A, C]))
    assert colours_on(worst_cases_png(all_three)) == {MISSED, TRUE, FALSE}
    only_missed = evaluation_of(tmp_path / "2.png", found())
    assert colours_on(worst_cases_png(only_missed)) == {MISSED}


def test_without_a_failure_or_an_image_there_is_no_sheet(tmp_path: Path) -> None:
    assert worst_cases_png(evaluation_of(tmp_path / "1.png", found([A, B]))) is None
    gone = evaluation_of(tmp_path / "2.png", found())
    (tmp_path / "2.png").unlink()
    assert worst_cases_png(gone) is None
