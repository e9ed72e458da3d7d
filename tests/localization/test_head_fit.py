"""The fit of a head against one that is slow and plainly right, and the guards that refuse one."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.localization.head import Head
from pipeline.localization.head_fit import TIMID, CutImages, Fit, fit_head, why_not
from pipeline.localization.localize import localize

Floats = NDArray[np.float64]


def sample_of(seed: int, *, images: int, planted: float, size: int = 9) -> list[CutImages]:
    """One object an image, which all share a direction of; and the cuts of the images."""
    generator = torch.Generator().manual_seed(seed)
    object_D, ground_D = torch.randn(2, 16, generator=generator)
    found = []
    for _ in range(images):
        # Its own tint to each image: what differs between images is no object.
        tint_D = torch.randn(16, generator=generator)
        tokens_HWD = torch.randn(size, size, 16, generator=generator) + tint_D
        tokens_HWD += planted * ground_D
        top, left = torch.randint(1, size - 4, (2,), generator=generator).tolist()
        tokens_HWD[top : top + 3, left : left + 3] += planted * (object_D - ground_D)
        features_1HWD = tokens_HWD[None]
        found.append(CutImages(features_1HWD, localize(features_1HWD, rule="ncut").mask_BHW))
    return found


def fitted(images: list[CutImages], **knobs: int) -> Fit:
    return fit_head(lambda: images, **knobs)


class SlowHead(NamedTuple):
    weight_D: Floats
    bias: float
    value_N: Floats
    share: float


def slow_fit(images: list[CutImages], num_rounds: int) -> list[SlowHead]:
    """discovery's words in numpy: all patches in one matrix, a solve a round."""
    unit_ND = np.concatenate(
        [
            one.features_BHWD.reshape(-1, 16).double().numpy()
            / one.features_BHWD.reshape(-1, 16).double().norm(dim=1, keepdim=True).numpy()
            for one in images
        ]
    )
    cut_N = np.concatenate([one.cut_BHW.reshape(-1).numpy() for one in images]).astype(float)
    rounds: list[SlowHead] = []
    side_N, share = cut_N, 0.0
    for number in range(num_rounds):
        mean_D = unit_ND.mean(axis=0)
        centred_ND = unit_ND - mean_D
        covariance_DD = centred_ND.T @ centred_ND / len(unit_ND)
        ridge_DD = 0.1 * np.trace(covariance_DD) / 16 * np.eye(16)
        cross_D = centred_ND.T @ (side_N - side_N.mean()) / len(unit_ND)
        weight_D = np.linalg.inv(covariance_DD + ridge_DD) @ cross_D
        bias = side_N.mean() - weight_D @ mean_D
        value_N = unit_ND @ weight_D + bias
        if number == 0:
            share = (value_N > 0.5).mean()
            if share < TIMID * cut_N.mean():
                share = cut_N.mean()
        rounds.append(SlowHead(weight_D, bias, value_N, share))
        highest = np.argsort(-value_N)[: round(share * len(value_N))]
        side_N = np.zeros(len(value_N))
        side_N[highest] = 1
    return rounds


@pytest.mark.parametrize("planted", [0.3, 1.0, 3.0])
def test_every_round_is_the_slow_ones(planted: float) -> None:
    images = sample_of(1, images=30, planted=planted)
    fit = fitted(images)
    slow = slow_fit(images, 6)
    assert len(fit.rounds) == 6
    for found, expected in zip(fit.rounds, slow, strict=True):
        # The slow one makes unit vectors in double, the features' own precision is single.
        np.testing.assert_allclose(found.weight_D, expected.weight_D, rtol=1e-4, atol=1e-6)
        assert found.bias == pytest.approx(expected.bias, abs=1e-6)
        assert found.share == pytest.approx(expected.share, abs=1e-9)
        above = (expected.value_N > found.threshold).mean()
        assert above == pytest.approx(found.share, abs=1.5 / len(expected.value_N))


def test_features_that_tell_little_take_the_cuts_share() -> None:
    sure, unsure = (slow_fit(sample_of(1, images=30, planted=p), 1)[0] for p in (3.0, 0.3))
    cuts = [
        np.mean([one.cut_BHW.float().mean() for one in sample_of(1, images=30, planted=p)])
        for p in (3.0, 0.3)
    ]
    assert sure.share == pytest.approx((sure.value_N > 0.5).mean())
    assert unsure.share == pytest.approx(cuts[1])


def batched(images: list[CutImages], size: int) -> list[CutImages]:
    return [
        CutImages(
            torch.cat([one.features_BHWD for one in images[start : start + size]]),
            torch.cat([one.cut_BHW for one in images[start : start + size]]),
        )
        for start in range(0, len(images), size)
    ]


@pytest.mark.parametrize("size", [2, 7, 30])
def test_how_images_are_batched_does_not_matter(size: int) -> None:
    images = sample_of(2, images=30, planted=1.5)
    one, many = fitted(images), fitted(batched(images, size))
    np.testing.assert_allclose(one.head.weight_D, many.head.weight_D, rtol=1e-9, atol=1e-12)
    assert one.head.threshold == pytest.approx(many.head.threshold, rel=1e-9)
    for name in ("num_images", "auc", "agreement", "border", "changes"):
        assert getattr(one, name) == pytest.approx(getattr(many, name), rel=1e-9)


def test_images_without_a_cut_and_unusable_patches_take_no_part() -> None:
    images = sample_of(3, images=30, planted=1.5)
    empty = CutImages(torch.ones(1, 9, 9, 16), torch.zeros(1, 9, 9, dtype=torch.bool))
    without = fitted(images)
    among = fitted([images[0], empty, *images[1:], empty])
    assert among.num_images == without.num_images == 30
    np.testing.assert_allclose(among.head.weight_D, without.head.weight_D, rtol=1e-9)

    def with_nothing(one: CutImages) -> CutImages:
        features = one.features_BHWD.clone()
        features[:, 0] = 0
        features[:, 8] = torch.nan
        return CutImages(features, one.cut_BHW)

    assert np.isfinite(fitted([with_nothing(one) for one in images]).head.weight_D).all()


@pytest.mark.parametrize("images", [[], sample_of(0, images=1, planted=3.0)])
def test_fewer_than_two_cuts_are_told(images: list[CutImages]) -> None:
    with pytest.raises(ValueError, match="at least 2 images must have a cut"):
        fitted(images)


def test_consistent_cuts_give_a_head_that_is_kept_and_finds_what_they_show() -> None:
    images = sample_of(4, images=30, planted=3.0)
    fit = fitted(images)
    assert why_not(fit) is None
    found = [localize(one.features_BHWD, rule="head", head=fit.head) for one in images]
    sides = [(one.boxes_B4[0, 2:] - one.boxes_B4[0, :2]).tolist() for one in found]
    # The objects that were planted, where some of the cuts are a patch too large.
    assert sides.count([3, 3]) >= 27


def test_cuts_of_chance_give_a_head_that_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [
        CutImages(
            torch.randn(1, 9, 9, 16, generator=generator),
            torch.rand(1, 9, 9, generator=generator) < 0.3,
        )
        for _ in range(40)
    ]
    assert why_not(fitted(images)) is not None


GOOD = Fit(
    head=Head(np.ones(4), 0.0, 0.5, 0.3),
    num_images=100,
    auc=0.9,
    agreement=0.6,
    border=0.2,
    rounds=(),
    changes=(),
)


@pytest.mark.parametrize(
    ("worse", "reason"),
    [
        ({"num_images": 24}, "rests on 24 images"),
        ({"head": Head(np.ones(4), 0.0, 0.5, 0.04)}, "4% of all patches"),
        ({"head": Head(np.ones(4), 0.0, 0.5, 0.61)}, "61% of all patches"),
        ({"agreement": 0.09}, "mean IoU 0.09"),
        ({"border": 0.61, "auc": 0.79}, "border 0.61"),
        ({"border": 0.61, "agreement": 0.49}, "border 0.61"),
        ({"border": float("nan"), "auc": float("nan")}, "border nan"),
    ],
)
def test_each_guard_says_why(worse: dict[str, Any], reason: str) -> None:
    refused = why_not(replace(GOOD, **worse))
    assert refused is not None
    assert reason in refused


@pytest.mark.parametrize("other", [{}, {"border": 0.9}, {"auc": 0.5}, {"agreement": 0.2}])
def test_one_of_border_and_agreement_across_images_is_enough(other: dict[str, Any]) -> None:
    assert why_not(replace(GOOD, **other)) is None


def test_a_sample_is_gone_over_in_its_order_and_may_be_a_generator_each_time() -> None:
    images = sample_of(5, images=26, planted=2.0)
    calls = 0

    def again() -> Iterable[CutImages]:
        nonlocal calls
        calls += 1
        yield from images

    sample: Callable[[], Iterable[CutImages]] = again
    np.testing.assert_array_equal(fit_head(sample).head.weight_D, fitted(images).head.weight_D)
    assert calls > 1


def test_the_map_is_far_below_objects_where_a_patch_is_unusable() -> None:
    head = Head(np.array([1.0, 0.0]), 0.0, 0.2, 0.5)
    unit_BND: Tensor = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    found = head.map(unit_BND, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, torch.tensor([[0.8, -0.2, -1.0]]))
    with pytest.raises(ValueError, match="2 channels, got 3"):
        head.map(torch.zeros(1, 1, 3), torch.ones(1, 1, dtype=torch.bool))
