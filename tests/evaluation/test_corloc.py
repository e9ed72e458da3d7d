"""CorLoc against hand-made cases, a slow loop, the binomial, and the published boxes of LOST."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.boxes import as_boxes
from pipeline.evaluation.corloc import (
    best_ious,
    central_boxes,
    corloc,
    interval_95,
    resampled_rates,
)
from pipeline.evaluation.one_box import Evaluation, measure_labels

BOX = st.tuples(*[st.integers(0, 12)] * 4).map(list)


def slow_best_iou(box: list[int], objects: list[list[int]]) -> float:
    """Pixel by pixel, written to be obviously right."""

    def pixels(x0: int, y0: int, x1: int, y1: int) -> set[tuple[int, int]]:
        return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}

    best = 0.0
    for other in objects:
        ours, theirs = pixels(*box), pixels(*other)
        if ours | theirs:
            best = max(best, len(ours & theirs) / len(ours | theirs))
    return best


@pytest.mark.parametrize(
    ("box", "objects", "iou"),
    [
        ([0, 0, 10, 10], [[0, 0, 10, 5]], 0.5),
        ([0, 0, 10, 10], [[50, 50, 60, 60], [0, 0, 10, 9]], 0.9),
        ([0, 0, 10, 10], [[0, 0, 10, 4]], 0.4),
        ([0, 0, 10, 10], [], 0),
        ([0, 0, 0, 0], [[0, 0, 10, 10]], 0),
        ([0, 0, 10, 10], [[3, 3, 3, 9]], 0),
    ],
)
def test_best_iou_of_hand_made_images(box: list[int], objects: list[Any], iou: float) -> None:
    assert best_ious(as_boxes([box]), [as_boxes(objects)]).tolist() == [iou]


def test_exactly_one_half_counts_and_just_below_does_not() -> None:
    assert corloc(np.array([0.5, np.nextafter(0.5, 0), 1.0, 0.0])) == 0.5
    boxes = as_boxes([[0, 0, 10, 10], [0, 0, 10, 10]])
    objects = [as_boxes([[0, 0, 5, 10]]), as_boxes([[0, 0, 4.999999, 10]])]
    assert corloc(best_ious(boxes, objects)) == 0.5


def test_corloc_of_no_image_is_not_a_number() -> None:
    assert np.isnan(corloc(np.array([])))


@given(st.lists(st.tuples(BOX, st.lists(BOX, max_size=4)), max_size=6))
def test_all_images_at_once_equal_one_pixel_at_a_time(images: list[Any]) -> None:
    found = best_ious(as_boxes([box for box, _ in images]), [as_boxes(gt) for _, gt in images])
    expected = [slow_best_iou(box, objects) for box, objects in images]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert [iou >= 0.5 for iou in found] == [iou >= 0.5 for iou in expected]


def test_central_box_has_that_fraction_of_each_side() -> None:
    sizes = np.array([[100.0, 50.0], [30.0, 60.0]])
    assert central_boxes(sizes, 1.0).tolist() == [[0, 0, 100, 50], [0, 0, 30, 60]]
    np.testing.assert_allclose(
        central_boxes(sizes, 0.7), [[15, 7.5, 85, 42.5], [4.5, 9, 25.5, 51]], rtol=1e-12
    )


# ---- bootstrap


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def slow_resampled_rates(hits_MN: Any, num_resamples: int, generator: Any) -> Any:
    """The textbook: draw N image numbers with replacement, look each method's hits up."""
    count = hits_MN.shape[1]
    draws = (generator.integers(count, size=count) for _ in range(num_resamples))
    return np.array([hits_MN[:, draw].mean(axis=1) for draw in draws])


def test_bootstrap_has_the_moments_of_resampling_image_by_image() -> None:
    # Correlated methods: the pairing is what the covariance shows.
    first = rng(1).random(300) < 0.6
    second = np.where(rng(2).random(300) < 0.7, first, rng(3).random(300) < 0.4)
    hits = np.stack([first, second])
    fast = resampled_rates(hits, num_resamples=20_000, rng=rng())
    slow = slow_resampled_rates(hits, 4_000, rng())
    np.testing.assert_allclose(fast.mean(axis=0), hits.mean(axis=1), atol=1e-3)
    np.testing.assert_allclose(np.cov(fast.T), np.cov(slow.T), rtol=0.15)
    assert np.cov(fast.T)[0, 1] > 1e-4


def test_interval_covers_a_known_probability_as_often_as_it_claims() -> None:
    probability, generator, covered = 0.6, rng(5), 0
    for _ in range(300):
        hits = generator.random((1, 400)) < probability
        low, high = interval_95(resampled_rates(hits, num_resamples=600, rng=generator)[:, 0])
        covered += low <= probability <= high
    # Binomial(300, .95) leaves [.92, .98] once in a few hundred seeds; a 90 % interval would too.
    assert 0.92 <= covered / 300 <= 0.98


def test_interval_has_the_width_of_the_binomial() -> None:
    hits = np.arange(5011)[None] < 3102
    low, high = interval_95(resampled_rates(hits, num_resamples=20_000, rng=rng())[:, 0])
    error = np.sqrt(0.619 * 0.381 / 5011)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_bootstrap_repeats_with_its_seed_alone() -> None:
    hits = rng(9).random((2, 50)) < 0.5
    one, same, other = (
        resampled_rates(hits, num_resamples=40, rng=rng(seed)) for seed in (1, 1, 2)
    )
    assert (one == same).all()
    assert (one != other).any()


def test_equal_methods_never_differ_in_any_resample() -> None:
    hits = np.repeat(rng(4).random((1, 80)) < 0.5, 2, axis=0)
    rates = resampled_rates(hits, num_resamples=500, rng=rng())
    assert (rates[:, 0] == rates[:, 1]).all()
    assert rates.std() > 0


@pytest.mark.parametrize(("hit", "rate"), [(True, 1.0), (False, 0.0)])
def test_interval_of_unanimous_images_has_no_width(hit: bool, rate: float) -> None:
    rates = resampled_rates(np.full((1, 7), hit), num_resamples=10, rng=rng())
    assert interval_95(rates[:, 0]) == (rate, rate)


# ---- the published boxes


def measure_lost(shared: Path, *, ignore_difficult: bool = False) -> Evaluation:
    return measure_labels(
        str(shared / "golden" / "lost_voc07_predictions.json"),
        str(shared / "golden" / "voc07_trainval_gt.json"),
        ignore_difficult=ignore_difficult,
        num_resamples=2000,
        seed=0,
    )


def test_released_boxes_of_lost_reproduce_the_published_number(shared: Path) -> None:
    found = measure_lost(shared)
    assert (found.labels.hits, found.num_images, found.num_difficult) == (3102, 5011, 3054)
    assert {at: round(100 * rate, 1) for at, rate in found.labels.at.items()} == {
        0.3: 79.8,
        0.5: 61.9,
        0.7: 38.0,
    }
    assert round(found.labels.mean_best_iou, 3) == 0.562
    single, several = found.groups["single_object"], found.groups["multi_object"]
    assert (single.num_images, several.num_images) == (1865, 3146)
    assert round(100 * single.hits / single.num_images, 1) == 73.9
    assert round(100 * several.hits / several.num_images, 1) == 54.8


def test_leaving_difficult_objects_out_loses_37_hits_and_no_image(shared: Path) -> None:
    found = measure_lost(shared, ignore_difficult=True)
    assert (found.labels.hits, found.num_images, found.num_without_objects) == (3065, 5011, 0)
