"""AP50 of a resample without matching again: equal to COCOeval on the images drawn."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.labelling import Difficult
from pipeline.evaluation.average_precision import (
    Matches,
    ap50_interval,
    average_precision,
    resampled_ap50,
    weighted_ap50,
)
from tests.evaluation.annotated import IMAGES, found, images_of, truth


def scene(num_images: int, seed: int = 0) -> Matches:
    """Two objects in each image; boxes on them, beside them, and some nowhere."""
    rng = np.random.default_rng(seed)
    truths, boxes = [], []
    for number in range(num_images):
        objects = [[0, 0, 40, 40], [50, 50, 90, 90]]
        near = (np.array(objects * 2) + rng.normal(0, 6, (4, 4))).tolist()
        keep = [b for b in near if b[2] > b[0] and b[3] > b[1] and rng.random() < 0.7]
        truths.append(truth(objects, name=f"{number}.jpg"))
        boxes.append(found(keep, rng.random(len(keep)).round(1).tolist()))
    return average_precision(truths, boxes).matches


@given(IMAGES)
@settings(max_examples=40, deadline=None)
def test_each_image_once_is_pycocotools_own_number(drawn: Any) -> None:
    truths, boxes = images_of(drawn)
    rules: Sequence[Difficult] = ("drop", "ignore", "keep")
    for rule in rules:
        result = average_precision(truths, boxes, difficult=rule)
        got = weighted_ap50(result.matches)(np.ones(len(truths), dtype=np.int64))
        expected = result.stats["ap50"]
        assert np.isnan(got) if expected is None else got == pytest.approx(expected, abs=1e-12)


@given(IMAGES, st.lists(st.integers(0, 3), min_size=5, max_size=5))
@settings(max_examples=60, deadline=None)
def test_image_drawn_again_is_an_image_more(drawn: Any, counts: list[int]) -> None:
    truths, boxes = images_of(drawn)
    # No two boxes of an image alike: COCOeval would have an image's copy follow the whole image.
    boxes = [replace(one, scores_D=one.scores_D - 1e-6 * np.arange(len(one))) for one in boxes]
    count_N = np.array(counts[: len(truths)])
    drawn_N = np.repeat(np.arange(len(truths)), count_N)
    got = weighted_ap50(average_precision(truths, boxes).matches)(count_N)
    if not len(drawn_N):
        assert np.isnan(got)
        return
    expected = average_precision([truths[i] for i in drawn_N], [boxes[i] for i in drawn_N]).stats[
        "ap50"
    ]
    assert np.isnan(got) if expected is None else got == pytest.approx(expected, abs=1e-12)


def test_resamples_repeat_with_their_seed_alone() -> None:
    matches = scene(20)
    one, same, other = (
        resampled_ap50(matches, num_resamples=20, rng=np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert (one == same).all()
    assert (one != other).any()


def test_interval_holds_the_number_and_narrows_with_the_images() -> None:
    widths = []
    for num_images in (25, 400):
        matches = scene(num_images)
        interval = ap50_interval(matches, num_resamples=300, seed=0)
        assert interval is not None
        value = weighted_ap50(matches)(np.ones(num_images, dtype=np.int64))
        assert interval[0] < value < interval[1]
        widths.append(interval[1] - interval[0])
    # Sixteen times the images: a quarter of the width.
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)


@pytest.mark.slow
def test_interval_holds_the_truth_as_often_as_it_claims() -> None:
    scenes = [scene(60, seed) for seed in range(40)]
    truth_of_all = np.mean([weighted_ap50(one)(np.ones(60, dtype=np.int64)) for one in scenes])
    covered = []
    for one in scenes:
        interval = ap50_interval(one, num_resamples=200, seed=0)
        assert interval is not None
        covered.append(bool(interval[0] <= truth_of_all <= interval[1]))
    # Binomial(40, .95) is below 34 once in a hundred times; of an 80 % interval it mostly would be.
    assert covered.count(True) >= 34


def test_no_object_has_no_interval() -> None:
    nothing = average_precision([truth([])], [found([[0, 0, 5, 5]])]).matches
    assert ap50_interval(nothing, num_resamples=100, seed=0) is None
    # And images of which only one has objects leave out the resamples without it.
    lonely = average_precision([truth([]), truth([[0, 0, 5, 5]])], [found(), found()]).matches
    assert ap50_interval(lonely, num_resamples=100, seed=0) == (0, 0)
