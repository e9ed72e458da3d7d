"""COCO's numbers against hand-made cases, a slow loop, pycocotools itself, and LOST's boxes."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.boxes import as_boxes, xyxy_to_xywh
from pipeline.config.labelling import Difficult
from pipeline.data.ground_truth import GroundTruth, read_coco
from pipeline.evaluation.average_precision import (
    STATS,
    average_precision,
    equally_sure,
    recall_by_num_objects,
    weighted_ap50,
)
from pipeline.evaluation.predictions import Detections, match, read_predictions
from pipeline.storage import Location
from tests.evaluation.annotated import IMAGES, found, images_of, iou, truth

LEFT, RIGHT, FAR = [0, 0, 40, 40], [50, 50, 90, 90], [0, 60, 30, 90]


def ap50(
    truths: list[GroundTruth], boxes: list[Detections], difficult: Difficult = "drop"
) -> float | None:
    return average_precision(truths, boxes, difficult=difficult).stats["ap50"]


def test_false_box_before_the_true_one_halves_the_precision() -> None:
    image = [truth([LEFT])]
    assert ap50(image, [found([LEFT], [0.9])]) == pytest.approx(1)
    assert ap50(image, [found([RIGHT, LEFT], [0.9, 0.1])]) == pytest.approx(0.5)
    assert ap50(image, [found([RIGHT, LEFT], [0.1, 0.9])]) == pytest.approx(1)


def test_object_found_twice_is_a_false_box_and_a_missed_one_costs_recall() -> None:
    image = [truth([LEFT, RIGHT])]
    # 51 of the 101 recalls are at most one half.
    assert ap50(image, [found([LEFT, LEFT])]) == pytest.approx(51 / 101)
    # The second of three boxes is false: precision is 2/3 beyond half of the recall.
    boxes = [found([LEFT, LEFT, RIGHT], [0.9, 0.8, 0.7])]
    assert ap50(image, boxes) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_box_in_an_image_without_objects_is_false() -> None:
    images = [truth([LEFT]), truth([], name="2.jpg")]
    assert ap50(images, [found([LEFT], [0.1]), found([LEFT], [0.9])]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("difficult", "expected"),
    [
        # Both boxes on the difficult object are false, and come first.
        ("drop", 1 / 3),
        # One of them is nobody's business; the other one has no object left.
        ("ignore", 1 / 2),
        # True, false, true: precision 1 for half of the recall, then 2/3.
        ("keep", (51 + 50 * 2 / 3) / 101),
    ],
)
def test_each_rule_for_difficult_objects_by_hand(difficult: Difficult, expected: float) -> None:
    image = [truth([LEFT, RIGHT], [False, True])]
    boxes = [found([RIGHT, RIGHT, LEFT], [0.9, 0.8, 0.7])]
    result = average_precision(image, boxes, difficult=difficult)
    assert result.stats["ap50"] == pytest.approx(expected)
    assert result.num_objects == (2 if difficult == "keep" else 1)
    assert result.difficult == difficult


def test_crowd_takes_any_number_of_boxes_and_is_no_object() -> None:
    inside = [[50, 50, 60, 60], [70, 70, 80, 80], [60, 60, 70, 70]]
    boxes = [found([*inside, LEFT], [0.9, 0.8, 0.7, 0.6])]
    assert ap50([truth([LEFT])], boxes) == pytest.approx(1 / 4)
    assert ap50([truth([LEFT], crowds_M4=as_boxes([RIGHT]))], boxes) == pytest.approx(1)


def test_small_and_large_objects_go_by_the_annotated_area() -> None:
    boxes = [found([LEFT])]
    by_box = average_precision([truth([LEFT])], boxes).stats
    assert (by_box["ap_small"], by_box["ap_large"]) == (None, None)
    assert by_box["ap_medium"] == pytest.approx(1)
    by_mask = average_precision([truth([LEFT], areas_N=np.array([100.0]))], boxes).stats
    assert by_mask["ap_small"] == pytest.approx(1)
    assert by_mask["ap_medium"] is None


def test_without_objects_there_is_no_number_not_a_negative_one() -> None:
    result = average_precision([truth([LEFT], [True])], [found([LEFT])])
    assert set(result.stats.values()) == {None}
    assert result.precision_Q == {}
    assert list(result.matches.true_D) == [False]
    empty = average_precision([truth([])], [found()])
    assert (empty.num_objects, len(empty.matches.image_D)) == (0, 0)


def test_pycocotools_does_not_talk(capsys: pytest.CaptureFixture[str]) -> None:
    average_precision([truth([LEFT])], [found([LEFT])])
    assert capsys.readouterr().out == ""


def test_wrong_numbers_of_images_and_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="found must have 1 entries, got 0"):
        average_precision([truth([LEFT])], [])
    with pytest.raises(ValueError, match="difficult must be one of drop, ignore, keep, got 'x'"):
        average_precision([truth([LEFT])], [found()], difficult="x")  # type: ignore[arg-type]


def test_matches_say_what_was_found_and_missed() -> None:
    truths = [truth([]), truth([LEFT, RIGHT], name="2.jpg")]
    matches = average_precision(
        truths, [found(), found([FAR, RIGHT, [0, 0, 40, 25]], [0.1, 0.9, 0.5])]
    ).matches
    assert matches.image_D.tolist() == [1, 1, 1]
    assert matches.score_D.tolist() == [0.9, 0.5, 0.1]
    assert matches.true_D.tolist() == [True, True, False]
    assert matches.boxes_D4.tolist() == [RIGHT, [0, 0, 40, 25], FAR]
    assert matches.num_found_N.tolist() == [0, 2]
    (_, missed) = average_precision(truths, [found(), found([RIGHT])]).matches.missed_N
    assert missed.tolist() == [LEFT]


def test_recall_goes_by_how_many_objects_an_image_has() -> None:
    columns = [[10 * i, 0, 10 * i + 8, 50] for i in range(10)]
    truths = [truth(columns[:n], name=f"{n}.jpg") for n in (0, 1, 3, 4, 10)]
    boxes = [found(), found(columns[:1]), found(columns[:1]), found(columns[:3]), found([FAR])]
    groups = recall_by_num_objects(average_precision(truths, boxes).matches)
    assert {name: (g.num_images, g.num_objects, g.num_found) for name, g in groups.items()} == {
        "1": (1, 1, 1),
        "3-4": (2, 7, 4),
        "10+": (1, 10, 0),
    }


def test_equally_sure_boxes_keep_everything_but_their_score() -> None:
    (one,) = equally_sure([found([LEFT, RIGHT], [0.2, 0.4], labels=[3, 4])])
    assert one.scores_D.tolist() == [1, 1]
    assert (one.boxes_D4.tolist(), one.labels_D.tolist()) == ([LEFT, RIGHT], [3, 4])


# ---- oracles


def slow_ap50(images: Sequence[Any], difficult: Difficult) -> float | None:
    """COCO's rule, box by box. ``images`` as ``annotated.IMAGES`` draws them."""
    ranked, num_objects = [], 0
    for number, (objects, boxes) in enumerate(images):
        kept = [(b, hard) for b, hard in objects if not (hard and difficult == "drop")]
        aside = [hard and difficult == "ignore" for _, hard in kept]
        num_objects += aside.count(False)
        taken: set[int] = set()
        for box, score in sorted(boxes, key=lambda pair: -pair[1]):
            overlap = {
                j: iou(box, b)
                for j, (b, _) in enumerate(kept)
                if j not in taken and iou(box, b) >= 0.5
            }
            # An object that counts goes before any that is set aside; of equals, the last.
            choice = max(overlap, key=lambda j: (not aside[j], overlap[j], j), default=None)
            if choice is not None:
                taken.add(choice)
            if choice is None or not aside[choice]:
                ranked.append((-score, number, choice is not None))
    if not num_objects:
        return None
    curve, true = [], 0
    for place, (_, _, hit) in enumerate(sorted(ranked, key=lambda one: one[:2])):
        true += hit
        curve.append((true / num_objects, true / (place + 1)))
    recalls = np.linspace(0, 1, 101)
    return sum(max((p for r, p in curve if r >= at), default=0) for at in recalls) / 101


@given(IMAGES)
@settings(max_examples=60, deadline=None)
def test_all_rules_equal_the_slow_loop(drawn: Any) -> None:
    truths, boxes = images_of(drawn)
    rules: Sequence[Difficult] = ("drop", "ignore", "keep")
    for rule in rules:
        expected = slow_ap50(drawn, rule)
        got = ap50(truths, boxes, rule)
        assert got is None if expected is None else got == pytest.approx(expected, abs=1e-9)


def test_all_twelve_numbers_are_those_of_plain_cocoeval() -> None:
    rng = np.random.default_rng(0)
    truths, boxes = [], []
    for number in range(12):
        corner = rng.uniform(0, 60, (5, 2))
        objects = np.hstack([corner, corner + rng.uniform(5, 150, (5, 2))])
        moved = np.repeat(objects, 3, axis=0) + rng.normal(0, 4, (15, 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        truths.append(truth(objects.tolist(), name=f"{number}.jpg"))
        boxes.append(found(moved.tolist(), rng.random(15).tolist()))
    result = average_precision(truths, boxes)
    assert [result.stats[name] for name in STATS] == plain_cocoeval(truths, boxes)
    assert result.precision_Q[0.5].mean() == pytest.approx(result.stats["ap50"], abs=1e-12)
    assert result.precision_Q[0.75].mean() == pytest.approx(result.stats["ap75"], abs=1e-12)


def plain_cocoeval(truths: list[GroundTruth], boxes: list[Detections]) -> list[float]:
    """As COCO's demo does it: annotations, ``loadRes``, summarise."""
    gt = COCO()
    objects = [(i, box) for i, one in enumerate(truths) for box in xyxy_to_xywh(one.boxes_N4)]
    gt.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(len(truths))],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": n + 1, "image_id": i, "category_id": 1, "bbox": box.tolist(), "iscrowd": 0}
            | {"area": float(box[2] * box[3])}
            for n, (i, box) in enumerate(objects)
        ],
    }
    with redirect_stdout(io.StringIO()):
        gt.createIndex()
        results = [
            {"image_id": i, "category_id": 1, "bbox": box.tolist(), "score": float(score)}
            for i, one in enumerate(boxes)
            for box, score in zip(xyxy_to_xywh(one.boxes_D4), one.scores_D, strict=True)
        ]
        judge = COCOeval(gt, gt.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [float(value) for value in judge.stats]


# ---- the published boxes


@pytest.mark.slow
def test_released_boxes_of_lost_taken_as_detections(shared: Path) -> None:
    truths = read_coco(Location.parse(str(shared / "golden" / "voc07_trainval_gt.json")))
    place = Location.parse(str(shared / "golden" / "lost_voc07_predictions.json"))
    matching = match(read_predictions(place), truths)
    boxes = [one.detections for one in matching.predictions if one is not None]
    result = average_precision(truths, equally_sure(boxes), difficult="drop")
    assert (len(boxes), result.num_objects) == (5011, 12_608)
    ap50 = result.stats["ap50"]
    assert ap50 is not None
    assert round(100 * ap50, 1) == 15.6
    ones_N = np.ones(5011, dtype=np.int64)
    assert weighted_ap50(result.matches)(ones_N) == pytest.approx(ap50, abs=1e-12)
    # A box per image finds at most one object: the bound of one box per image is .397.
    assert sum(group.num_found for group in recall_by_num_objects(result.matches).values()) == 3065
