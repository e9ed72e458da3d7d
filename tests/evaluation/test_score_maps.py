"""Maps from scores to probabilities: what they recover, what they do not believe, their folds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from pipeline.config.calibration import CalibrationMethod
from pipeline.evaluation.calibration import reliability
from pipeline.evaluation.score_maps import (
    IsotonicMap,
    LogisticMap,
    as_columns,
    cross_validated,
    fit_isotonic,
    fit_logistic,
    fit_score_map,
)
from pipeline.localization.ranking import area_under_curve

METHODS: tuple[CalibrationMethod, ...] = ("logistic", "isotonic")


def drawn(probability: np.ndarray, seed: int = 0) -> np.ndarray:
    hits: np.ndarray = np.random.default_rng(seed).random(len(probability)) < probability
    return hits


@pytest.mark.parametrize("method", METHODS)
def test_known_probabilities_are_recovered(method: CalibrationMethod) -> None:
    score = np.random.default_rng(1).random(20_000)
    true = expit(6 * score - 4)
    fitted = fit_score_map(as_columns(score, []), drawn(true), method)
    assert np.abs(fitted(as_columns(score, [])) - true).mean() < 0.02


def test_a_logistic_map_weighs_what_scores_rest_on_in_the_columns_own_units() -> None:
    rng = np.random.default_rng(1)
    score, contrast = rng.random(50_000), 100 * rng.random(50_000)
    true = expit(2 * score + 0.05 * contrast - 3)
    fitted = fit_logistic(as_columns(score, [contrast]), drawn(true))
    assert fitted.weights == pytest.approx((2, 0.05), rel=0.05)
    assert fitted.bias == pytest.approx(-3, rel=0.05)
    assert fitted.log_above is None


def test_scores_beyond_one_are_seen_by_their_logarithm() -> None:
    score = np.random.default_rng(1).lognormal(0, 1, 50_000)
    true = expit(1.5 * np.log(score) - 0.5)
    fitted = fit_logistic(as_columns(score, []), drawn(true))
    assert fitted.weights == pytest.approx((1.5,), rel=0.05)
    assert fitted.log_above == score.min()
    # A score of another image may be lower than all that the map has seen, or 0.
    below = fitted(np.array([[0.0], [score.min() / 2], [score.min()]]))
    assert below == pytest.approx(below[2])


@given(st.integers(0, 1000))
def test_surer_is_never_less_probable_whatever_few_labels_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = rng.random((12, 3))
    hits = rng.random(12) < 0.5
    hits[:2] = True, False
    for method in METHODS:
        fitted = fit_score_map(columns, hits, method)
        higher = columns + rng.random((12, 3))
        assert (fitted(higher) >= fitted(columns) - 1e-12).all()
        assert ((fitted(columns) >= 0) & (fitted(columns) <= 1)).all()


def test_a_column_that_says_nothing_or_the_contrary_weighs_nothing() -> None:
    score = np.linspace(0, 1, 200)
    hits = drawn(1 - score)
    columns = as_columns(score, [np.full(200, 0.3)])
    fitted = fit_logistic(columns, hits)
    assert list(fitted.weights) == [0, 0]
    assert fitted(columns) == pytest.approx(hits.mean())


def test_an_isotonic_map_is_straight_between_its_corners_and_level_beyond() -> None:
    fitted = fit_isotonic(
        np.array([1.0, 2, 3, 4, 5, 6]), np.array([False, False, True, False, True, True])
    )
    assert fitted == IsotonicMap((1, 2, 3, 4, 5, 6), (0, 0, 0.5, 0.5, 1, 1))
    assert fitted(np.array([[0.0], [2.5], [9.0]])).tolist() == [0, 0.25, 1]


def test_maps_tell_all_of_themselves() -> None:
    assert LogisticMap((1.0,), -2.0).told() == {"weights": (1,), "bias": -2, "log_above": None}
    assert IsotonicMap((1.0,), (0.5,)).told() == {"scores": (1,), "probabilities": (0.5,)}


def test_no_box_is_judged_by_a_map_that_saw_its_image() -> None:
    # The score names the image, and two boxes of an image are alike: whoever saw one knows both.
    images = np.repeat(np.arange(200), 2)
    hits = drawn(np.full(200, 0.5))[images]
    columns = as_columns(images.astype(float) / 200, [])
    assert area_under_curve(fit_score_map(columns, hits, "isotonic")(columns), hits) > 0.5
    said, folds = cross_validated(columns, hits, images, "isotonic", seed=0)
    assert (folds[::2] == folds[1::2]).all()
    assert np.bincount(folds).tolist() == [80] * 5
    assert area_under_curve(said, hits, folds) < 0.6
    again, _ = cross_validated(columns, hits, images, "isotonic", seed=0)
    assert (again == said).all()


def test_folds_of_one_kind_get_the_share_with_one_of_each_kind_added() -> None:
    hits = np.array([True] + [False] * 9)
    said, folds = cross_validated(
        as_columns(np.linspace(0, 1, 10), []), hits, np.arange(10), "logistic", seed=0
    )
    # The fold of the only right box was judged by eight wrong ones.
    assert said[folds == folds[0]] == pytest.approx([0.1, 0.1])
    assert reliability(said, hits).error < 0.2
