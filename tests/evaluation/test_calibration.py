"""What scores are worth, against slow loops that are obviously right and numbers made by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.calibration import (
    are_probabilities,
    auroc_interval,
    brier_score,
    precision_at_coverage,
    reliability,
)
from pipeline.evaluation.scored_boxes import measure_scores, scored_boxes
from pipeline.localization.ranking import area_under_curve, weighted_area_under_curve
from tests.evaluation.annotated import found, truth

# Few values, so that ties are many.
_SCORED = st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans()), min_size=1)


def columns(drawn: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    scores, hits = zip(*drawn, strict=True)
    return np.array(scores), np.array(hits, dtype=bool)


def interval_of(
    scores: np.ndarray, hits: np.ndarray, images: np.ndarray, *, num_resamples: int
) -> tuple[float, float] | None:
    area = weighted_area_under_curve(scores, hits)
    return auroc_interval(area, images, num_resamples=num_resamples, seed=1)


def slow_area(drawn: list[tuple[float, bool]]) -> float:
    won = [
        1.0 if hit > miss else 0.5 if hit == miss else 0.0
        for hit, is_hit in drawn
        for miss, is_miss in drawn
        if is_hit and not is_miss
    ]
    return sum(won) / len(won) if won else float("nan")


@given(_SCORED)
def test_the_area_counts_pairs_and_ties_as_half(drawn: list[tuple[float, bool]]) -> None:
    assert area_under_curve(*columns(drawn)) == pytest.approx(slow_area(drawn), nan_ok=True)


@given(_SCORED, st.data())
def test_a_weight_is_how_often_a_box_is_there(
    drawn: list[tuple[float, bool]], data: st.DataObject
) -> None:
    count = st.lists(st.integers(0, 3), min_size=len(drawn), max_size=len(drawn))
    counts = data.draw(count)
    repeated = [one for one, times in zip(drawn, counts, strict=True) for _ in range(times)]
    area = weighted_area_under_curve(*columns(drawn))
    assert area(np.array(counts, dtype=float)) == pytest.approx(slow_area(repeated), nan_ok=True)


@given(st.lists(_SCORED, min_size=1, max_size=3))
def test_what_is_ranked_apart_is_never_compared(folds: list[list[tuple[float, bool]]]) -> None:
    pairs = [sum(h for _, h in one) * sum(not h for _, h in one) for one in folds]
    won = [slow_area(one) * number for one, number in zip(folds, pairs, strict=True) if number]
    expected = sum(won) / sum(pairs) if sum(pairs) else float("nan")
    together = [one for fold in folds for one in fold]
    apart = np.repeat(np.arange(len(folds)), [len(fold) for fold in folds])
    assert area_under_curve(*columns(together), apart) == pytest.approx(expected, nan_ok=True)


@given(_SCORED, st.floats(0.01, 1))
def test_precision_at_coverage_is_the_mean_over_orders_of_equals(
    drawn: list[tuple[float, bool]], coverage: float
) -> None:
    kept = int(np.ceil(coverage * len(drawn) - 1e-9))
    best_first = sorted(drawn, reverse=True)
    # By linearity each box of the group that is cut is kept with the same probability.
    edge = best_first[kept - 1][0]
    above = [hit for score, hit in drawn if score > edge]
    equal = [hit for score, hit in drawn if score == edge]
    expected = (sum(above) + (kept - len(above)) * sum(equal) / len(equal)) / kept
    assert precision_at_coverage(*columns(drawn), [coverage])[0] == pytest.approx(expected)


@given(_SCORED)
def test_there_is_an_interval_where_there_are_hits_and_misses(
    drawn: list[tuple[float, bool]],
) -> None:
    scores, hits = columns(drawn)
    interval = interval_of(scores, hits, np.arange(len(hits)), num_resamples=200)
    if np.isnan(slow_area(drawn)):
        assert interval is None
    else:
        assert interval is not None
        assert 0 <= interval[0] <= interval[1] <= 1


def test_the_interval_holds_the_point_and_is_wider_where_boxes_share_images() -> None:
    rng = np.random.default_rng(0)
    hits = rng.random(400) < 0.5
    scores = hits + rng.normal(0, 1.5, 400)
    alone = interval_of(scores, hits, np.arange(400), num_resamples=500)
    # Ten copies of forty boxes are no four hundred.
    copies = np.arange(400) % 40
    shared = interval_of(scores[copies], hits[copies], copies, num_resamples=500)
    assert alone is not None
    assert shared is not None
    assert alone[0] < area_under_curve(scores, hits) < alone[1]
    assert alone[1] - alone[0] < 0.15
    assert shared[1] - shared[0] > 2 * (alone[1] - alone[0])


def test_calibration_by_hand() -> None:
    said = np.array([0.0, 0.05, 0.62, 0.68, 1.0, 1.0])
    right = np.array([False, True, True, False, True, True])
    bins = reliability(said, right)
    assert bins.count_K.tolist() == [2, 0, 0, 0, 0, 0, 2, 0, 0, 2]
    assert bins.mean_K[[0, 6, 9]] == pytest.approx([0.025, 0.65, 1.0])
    assert bins.rate_K[[0, 6, 9]] == pytest.approx([0.5, 0.5, 1.0])
    assert np.isnan(bins.rate_K[1])
    assert bins.error == pytest.approx((2 * 0.475 + 2 * 0.15 + 0) / 6)
    expected = (0 + 0.95**2 + 0.38**2 + 0.68**2) / 6
    assert brier_score(said, right) == pytest.approx(expected)


def test_true_probabilities_have_next_to_no_error() -> None:
    rng = np.random.default_rng(0)
    said = rng.random(100_000)
    right = rng.random(100_000) < said
    assert reliability(said, right).error < 0.01
    assert reliability(said**3, right).error > 0.2
    assert brier_score(said, right) == pytest.approx(1 / 6, abs=0.005)


@pytest.mark.parametrize(
    ("scores", "are"), [([0, 0.5, 1], True), ([0.5, 1.01], False), ([-0.1, 1], False), ([], False)]
)
def test_only_what_lies_from_zero_to_one_may_be_a_probability(
    scores: list[float], are: bool
) -> None:
    assert are_probabilities(np.array(scores, dtype=float)) is are


def test_boxes_are_right_on_any_object_and_images_without_boxes_or_objects_take_part() -> None:
    truths = [
        truth([[0, 0, 10, 10], [50, 50, 60, 60]], [False, True]),
        truth([]),
        truth([[0, 0, 9, 9]]),
    ]
    # An IoU of exactly one half; the difficult object, twice; nothing; a picture without objects.
    boxes = [
        found([[0, 0, 10, 5], [50, 50, 60, 60], [50, 50, 60, 60], [80, 80, 90, 90]], [4, 3, 2, 1]),
        found([[0, 0, 10, 10]], [5], evidence={"contrast": [0.5]}),
        found(),
    ]
    scored = scored_boxes(truths, boxes)
    assert scored.hit_D.tolist() == [True, True, True, False, False]
    assert scored.image_D.tolist() == [0, 0, 0, 0, 1]
    assert scored.score_D.tolist() == [4, 3, 2, 1, 5]
    assert np.array_equal(scored.evidence["contrast"], [np.nan] * 4 + [0.5], equal_nan=True)
    assert "agreement" not in scored.evidence
    quality = measure_scores(scored, num_resamples=100, seed=0)
    assert quality is not None
    # Of one box alone the contrast is known.
    assert list(quality.ranking) == ["scores"]
    assert quality.ranking["scores"].auroc == pytest.approx(3 / 6)


def test_no_boxes_or_no_scores_are_worth_nothing() -> None:
    truths = [truth([[0, 0, 10, 10]])]
    for boxes in ([found()], [found([[0, 0, 10, 10]])]):
        assert measure_scores(scored_boxes(truths, boxes), num_resamples=100, seed=0) is None
