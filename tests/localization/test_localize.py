"""The batched localization keeps its promises, with and without the golden data."""

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import LocalizationConfig
from pipeline.localization.affinity import compare, count_similar
from pipeline.localization.localize import Localization, localize
from tests.localization.slow_localize import slow_localize

RULES = ["lost", "solost"]


@st.composite
def small_features(draw: st.DrawFn) -> Tensor:
    """Small integers: every product is exact, and zeros, ties and zero patches are common."""
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    channels = draw(st.integers(1, 4))
    count = height * width * channels
    values = draw(st.lists(st.integers(-2, 2), min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).reshape(1, height, width, channels)


def random_features(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(left: Localization, right: Localization) -> None:
    for field in ("boxes_B4", "found_B", "seed_B", "degree_BN", "mask_BHW", "score_B"):
        assert torch.equal(getattr(left, field), getattr(right, field)), field


@settings(max_examples=300, deadline=None)
@given(
    small_features(),
    st.sampled_from(RULES),
    st.sampled_from([0.05, 0.25, 0.5, 0.6, 1.0]),
    st.sampled_from([1, 3, 100]),
)
def test_every_result_equals_the_slow_loop(features: Tensor, rule: Any, m: float, k: int) -> None:
    # Dot products of small integers are exact, so equality is exact for both rules.
    fast = localize(features, rule=rule, similarity="dot", keep_fraction=m, num_candidates=k)
    _, height, width, channels = features.shape
    patches = features.reshape(height * width, channels).tolist()
    slow = slow_localize(patches, width, rule=rule, cosine=False, m=m, k=k)
    assert fast.degree_BN[0].tolist() == slow.degree
    assert bool(fast.found_B[0]) == slow.found
    assert int(fast.seed_B[0]) == slow.seed
    assert set(fast.mask_BHW.flatten().nonzero().flatten().tolist()) == slow.component
    assert fast.boxes_B4[0].tolist() == slow.box
    assert 0 <= fast.score_B[0] <= 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(10))
def test_cosine_votes_equal_the_slow_loop(rule: Any, seed: int) -> None:
    features = random_features(seed, 1, 7, 5, 6)
    fast = localize(features, rule=rule, similarity="cosine", num_candidates=10)
    patches = features.double().reshape(35, 6).tolist()
    slow = slow_localize(patches, 5, rule=rule, cosine=True, m=0.5, k=10)
    assert fast.boxes_B4[0].tolist() == slow.box
    assert int(fast.seed_B[0]) == slow.seed


@pytest.mark.parametrize("similarity", ["dot", "cosine", "pearson"])
@pytest.mark.parametrize("rule", RULES)
def test_an_image_gets_the_same_box_alone_and_in_any_batch(rule: Any, similarity: Any) -> None:
    features = random_features(0, 9, 23, 30, 48)
    batch = localize(features, rule=rule, similarity=similarity)
    for image in range(9):
        alone = localize(features[image : image + 1], rule=rule, similarity=similarity)
        assert torch.equal(alone.boxes_B4[0], batch.boxes_B4[image])
        assert torch.equal(alone.mask_BHW[0], batch.mask_BHW[image])
        assert torch.equal(alone.degree_BN[0], batch.degree_BN[image])


@pytest.mark.parametrize("memory_mib", [1, 2, 7, 4096])
def test_the_memory_budget_changes_no_result(memory_mib: int) -> None:
    # Integers, so that a different tiling cannot round differently: 1200 patches are 5.5 MiB.
    features = random_features(1, 3, 30, 40, 16).mul(4).round()
    assert_same(
        localize(features, affinity_memory_mib=memory_mib),
        localize(features, affinity_memory_mib=512),
    )


def test_the_products_stay_within_the_memory_budget() -> None:
    patches = random_features(2, 2, 4800, 8)
    usable = torch.ones(2, 4800, dtype=torch.bool)
    largest = 0
    real_matmul = Tensor.__matmul__

    class Watched(Tensor):
        def __matmul__(self, other: Any) -> Any:
            nonlocal largest
            tile = real_matmul(self.as_subclass(Tensor), other.as_subclass(Tensor))
            largest = max(largest, tile.nbytes)
            return tile

    count_similar(patches.as_subclass(Watched), usable, memory_mib=8)
    assert 4 * 2**20 < largest <= 8 * 2**20


def test_ties_go_to_the_lowest_row_major_patch() -> None:
    # Two equal strangers to an all-alike ground: both have degree 0.
    features = torch.zeros(1, 3, 4, 3)
    features[..., 0] = 1.0
    features[0, 1, 2] = torch.tensor([0.0, 1.0, 0.0])
    features[0, 2, 0] = torch.tensor([0.0, 0.0, 1.0])
    found = localize(features)
    assert found.seed_B.tolist() == [1 * 4 + 2]
    assert found.boxes_B4.tolist() == [[2, 1, 3, 2]]


def test_patches_that_touch_only_at_a_corner_do_not_connect() -> None:
    features = torch.full((1, 4, 4, 2), 0.0)
    features[..., 0] = 1.0
    for row, column in [(1, 1), (2, 2)]:
        features[0, row, column] = torch.tensor([0.0, 1.0])
    assert localize(features, keep_fraction=1.0).boxes_B4.tolist() == [[1, 1, 2, 2]]


def test_a_single_patch_is_the_whole_box() -> None:
    found = localize(torch.ones(1, 1, 1, 3))
    assert found.found_B.tolist() == [True]
    assert found.boxes_B4.tolist() == [[0, 0, 1, 1]]


def test_an_all_equal_image_gives_the_whole_grid() -> None:
    found = localize(torch.ones(1, 4, 5, 3))
    assert found.boxes_B4.tolist() == [[0, 0, 5, 4]]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("rule", RULES)
def test_an_image_without_a_usable_patch_is_not_found(rule: Any, value: float) -> None:
    found = localize(torch.full((1, 3, 3, 2), value), rule=rule)
    assert found.found_B.tolist() == [False]
    assert found.boxes_B4.tolist() == [[0, 0, 0, 0]]
    assert found.score_B.tolist() == [0.0]


@pytest.mark.parametrize("value", [0.0, math.nan, -math.inf])
@pytest.mark.parametrize("rule", RULES)
def test_a_broken_patch_is_never_the_seed_and_harms_no_other(rule: Any, value: float) -> None:
    features = random_features(3, 1, 5, 5, 8)
    features[0, 2, 3] = value
    found = localize(features, rule=rule)
    assert found.found_B.tolist() == [True]
    assert int(found.seed_B) != 2 * 5 + 3
    assert not found.mask_BHW[0, 2, 3]
    # Every other patch has the degree it would have were the broken one not there.
    usable = torch.ones(1, 25, dtype=torch.bool)
    usable[0, 13] = False
    rest = compare(
        torch.cat([features.flatten(1, 2)[:, :13], features.flatten(1, 2)[:, 14:]], 1), "dot"
    )
    expected = count_similar(rest.patch_BND, rest.usable_BN, memory_mib=1)
    assert torch.equal(found.degree_BN[usable], expected[0])


def test_an_isolated_seed_is_kept_where_the_published_code_fails() -> None:
    # One similar patch (itself): int(0.5 * 1) = 0 voters in the published code.
    features = torch.full((1, 3, 3, 2), 0.0)
    features[..., 0] = 1.0
    features[0, 1, 1] = torch.tensor([-1.0, 0.0])
    assert localize(features).boxes_B4.tolist() == [[1, 1, 2, 2]]


def test_the_sign_of_an_exact_zero_product_survives_normalisation() -> None:
    # Orthogonal vectors whose fp32 cosines come out as noise around zero.
    features = torch.tensor([[[[3.0, 1.0, 7.0], [1.0, -3.0, 0.0], [7.0, 0.0, -3.0]]]])
    found = localize(features, similarity="cosine")
    assert found.degree_BN.tolist() == [[0, 1, 1]]


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert localize(torch.zeros(0, 4, 4, 3)).boxes_B4.shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"keep_fraction": 0.0}, r"keep_fraction must be in \(0, 1\], got 0.0"),
        ({"keep_fraction": 1.5}, r"keep_fraction must be in \(0, 1\], got 1.5"),
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"affinity_memory_mib": 0}, "affinity_memory_mib must be at least 1"),
        ({"similarity": "l2"}, "similarity must be one of cosine, dot, pearson, got 'l2'"),
        ({"rule": "most"}, "rule must be one of solost, lost, ncut, head, got 'most'"),
    ],
)
def test_an_argument_outside_its_range_is_named(arguments: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        localize(torch.ones(1, 2, 2, 3), **arguments)


def test_the_knobs_are_those_of_the_configuration_with_the_same_defaults() -> None:
    """Whoever takes the group hands it on whole, with the head that its place names."""
    _, *knobs = inspect.signature(localize).parameters.values()
    defaults = {knob.name: knob.default for knob in knobs}
    assert defaults.pop("head") is None
    assert defaults == LocalizationConfig().arguments()


def test_features_of_the_wrong_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"got \(4, 3\)"):
        localize(torch.ones(4, 3))


def test_half_precision_features_are_compared_in_fp32() -> None:
    features = random_features(4, 2, 6, 6, 16).bfloat16()
    assert_same(localize(features), localize(features.float()))
