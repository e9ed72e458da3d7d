"""What surrounds the numbers: known sets, how many boxes, the export, hashes, the picture."""

import io
from contextlib import redirect_stdout
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pipeline.data.ground_truth import GroundTruth
from pipeline.evaluation.all_boxes import (
    KNOWN_SETS,
    DetectionEvaluation,
    DetectionOptions,
    coco_results,
    count_boxes,
    image_ids,
    measure_all_boxes,
)
from pipeline.evaluation.predictions import Detections, Prediction
from pipeline.evaluation.report import detection_json, precision_recall_png
from tests.evaluation.annotated import found, truth

A, B = [0, 0, 20, 20], [30.5, 30, 60, 60]


def measure(
    truths: list[GroundTruth], boxes: list[Detections | None], **options: Any
) -> DetectionEvaluation:
    predictions = [None if one is None else Prediction("x", None, detections=one) for one in boxes]
    return measure_all_boxes(
        truths, predictions, DetectionOptions(**options), num_resamples=100, seed=0
    )


def test_known_number_of_images_with_other_objects_is_told() -> None:
    name, expected = KNOWN_SETS[4952]
    assert (name, expected) == ("VOC2007 test", 12_032)
    one = truth([])
    truths = [one] * 4951 + [truth([A] * 12_032)]
    nothing: list[Detections | None] = [None] * 4952
    assert measure(truths, nothing).warnings == ()
    # One more that is difficult changes nothing, one more that is not does.
    hard = truth([A] * 12_033, [False] * 12_032 + [True])
    assert measure([one] * 4951 + [hard], nothing).warnings == ()
    (told,) = measure([one] * 4951 + [truth([A] * 12_033)], nothing).warnings
    assert "4,952 images are VOC2007 test's number, but its 12,032 objects" in told
    assert "are 12,033 here" in told
    (fewer,) = measure([one] * 4951 + [truth([A])], nothing).warnings
    assert "are 1 here" in fewer
    assert measure(truths[1:], nothing[1:]).warnings == ()


def test_equal_scores_forget_the_tables_ranking() -> None:
    truths, boxes = [truth([A])], [found([B, A], [0.1, 0.9])]
    assert measure(truths, [*boxes]).precision.stats["ap50"] == pytest.approx(1)
    equal = measure(truths, [*boxes], scores="equal")
    assert equal.precision.stats["ap50"] == pytest.approx(0.5)
    assert detection_json(equal)["scores"] == "equal"


def test_boxes_per_image_count_images_without_any() -> None:
    counts = count_boxes([found(), found([A]), found([A] * 4), found([A] * 101)])
    assert (counts.total, counts.mean, counts.median, counts.most) == (106, 26.5, 2.5, 101)
    assert counts.groups == {"0": 1, "1": 1, "3-4": 1, "50+": 1}
    assert counts.num_over_limit == 1


def test_classes_are_matched_where_labels_go_beyond_one_or_when_asked() -> None:
    truths = [truth([A], classes=["cat"])]
    assert measure(truths, [found([A])]).classes is None
    assert measure(truths, [found([A])], class_aware=True).classes is not None
    classes = measure(truths, [found([A], labels=[2])]).classes
    assert classes is not None
    assert classes.cluster_of == {"cat": 2}


def test_results_are_what_pycocotools_loads() -> None:
    truths = [truth([A], image_id=17), truth([B], name="2.jpg", image_id=9)]
    evaluation = measure(truths, [found([A, B], [0.25, 1 / 3]), None])
    entries = coco_results(evaluation)
    assert entries == [
        {"image_id": 17, "category_id": 1, "bbox": [0, 0, 20, 20], "score": 0.25},
        {"image_id": 17, "category_id": 1, "bbox": [30.5, 30, 29.5, 30], "score": 1 / 3},
    ]
    coco = COCO()
    coco.dataset = {"info": {}, "images": [{"id": 17}, {"id": 9}], "categories": [{"id": 1}]}
    coco.dataset["annotations"] = []
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
        assert len(coco.loadRes(entries).anns) == 2
    labelled = measure(
        [replace(one, classes_N=("cat",)) for one in truths], [found([A], labels=[3]), None]
    )
    assert [one["category_id"] for one in coco_results(labelled)] == [3]


def test_images_without_ids_of_their_own_are_numbered() -> None:
    assert image_ids([truth([], image_id=5), truth([], image_id=2)]) == [5, 2]
    assert image_ids([truth([], image_id=5), truth([])]) == [1, 2]
    assert image_ids([truth([], image_id=5), truth([], image_id=5)]) == [1, 2]


def test_hashes_change_with_what_was_read_and_with_nothing_else() -> None:
    one = measure([truth([A])], [found([A], [0.5])])
    assert one.hashes == measure([truth([A])], [found([A], [0.5])], scores="equal").hashes
    other = measure([truth([A])], [found([A], [0.6])])
    assert one.hashes["labels"] != other.hashes["labels"]
    assert one.hashes["ground_truth"] == other.hashes["ground_truth"]
    assert one.hashes["ground_truth"] != measure([truth([B])], [found([A])]).hashes["ground_truth"]


@pytest.mark.parametrize("objects", [[A, B], []])
def test_picture_of_precision_over_recall_is_drawn_also_of_nothing(objects: Any) -> None:
    evaluation = measure([truth(objects)], [found([A])])
    with Image.open(BytesIO(precision_recall_png(evaluation, dpi=50))) as picture:
        blue = (np.asarray(picture.convert("RGB")) == (0, 0x72, 0xB2)).all(axis=-1).any()
    assert blue == bool(objects)
