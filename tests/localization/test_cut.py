"""The batched cut against a dense eigen-solver, one image at a time, and where there is no cut."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor

from pipeline.localization.affinity import compare
from pipeline.localization.cut import normalized_cut
from pipeline.localization.localize import localize


class SlowCut(NamedTuple):
    side_N: NDArray[np.float64]
    degree_N: NDArray[np.int64]
    is_clear: bool
    """Whether the second eigenvector stands alone, its sign too, and the degrees tell of it."""


def slow_cut(unit_ND: NDArray[np.float64], threshold: float) -> SlowCut:
    """Shi and Malik's equation 11 as it is written, of patches that are all usable."""
    is_similar_NN = unit_ND @ unit_ND.T > threshold
    affinity_NN = np.where(is_similar_NN, 1.0, 1e-5)
    degrees_N = affinity_NN.sum(axis=1)
    values, vectors = eigh(np.diag(degrees_N) - affinity_NN, np.diag(degrees_N))
    side_N = vectors[:, 1] - vectors[:, 1].mean()
    positive = side_N > 0
    means = degrees_N[positive].mean(), degrees_N[~positive].mean()
    if means[0] > means[1]:
        side_N = -side_N
    gap = values[2] - values[1] if len(values) > 2 else 1.0
    # Where the degrees know nothing of it, as in a graph that is its own mirror image, steps that
    # begin with the degrees cannot find it.
    second_N = np.sqrt(degrees_N) * vectors[:, 1]
    start_N = np.sqrt(degrees_N) * (degrees_N - degrees_N.mean())
    overlap = abs(start_N @ second_N) / max(
        np.linalg.norm(start_N) * np.linalg.norm(second_N), 1e-9
    )
    return SlowCut(
        side_N,
        is_similar_NN.sum(axis=1) - 1,
        is_clear=gap > 1e-2 and abs(means[0] - means[1]) > 1e-3 and overlap > 1e-2,
    )


def features_of(seed: int, height: int, width: int, channels: int, planted: float) -> Tensor:
    """Noise, and ``planted`` times a direction more where the object is: a corner of the grid."""
    generator = torch.Generator().manual_seed(seed)
    noise_1HWD = torch.randn(1, height, width, channels, generator=generator)
    ground_D, object_D = torch.randn(2, channels, generator=generator)
    noise_1HWD += planted * ground_D
    noise_1HWD[:, : math.ceil(height / 2), : math.ceil(width / 3)] += planted * (
        object_D - 2 * ground_D
    )
    return noise_1HWD


def unit_of(features_BHWD: Tensor) -> tuple[Tensor, Tensor]:
    compared = compare(features_BHWD.flatten(1, 2), "cosine")
    return compared.voter_BND, compared.usable_BN


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(2, 7),
    st.integers(2, 8),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0.0, 0.2, 0.4]),
)
def test_with_all_steps_it_is_the_second_generalised_eigenvector(
    seed: int, height: int, width: int, channels: int, planted: float, threshold: float
) -> None:
    unit_BND, usable_BN = unit_of(features_of(seed, height, width, channels, planted))
    slow = slow_cut(unit_BND[0].double().numpy(), threshold)
    found = normalized_cut(
        unit_BND, usable_BN, threshold=threshold, memory_mib=64, num_steps=height * width
    )
    assert found.degree_BN[0].tolist() == slow.degree_N.tolist()
    assume(slow.is_clear)
    side_N = found.side_BN[0].double().numpy()
    length = np.linalg.norm(side_N) * np.linalg.norm(slow.side_N)
    assert side_N @ slow.side_N > (1 - 1e-4) * length


def test_eight_steps_divide_planted_images_as_the_solver_does() -> None:
    agree = 0
    for seed in range(40):
        features = features_of(seed, 8, 9, 16, 1.5)
        unit_BND, usable_BN = unit_of(features)
        slow = slow_cut(unit_BND[0].double().numpy(), 0.2)
        found = normalized_cut(unit_BND, usable_BN, threshold=0.2, memory_mib=64)
        same = (found.side_BN[0].numpy() > 0) == (slow.side_N > 0)
        agree += bool(same.mean() > 0.97)
    assert agree >= 38


def test_the_planted_object_is_what_is_boxed() -> None:
    found = localize(features_of(0, 8, 9, 32, 3.0), rule="ncut")
    assert found.boxes_B4.tolist() == [[0, 0, 3, 4]]
    assert found.mask_BHW.sum() == 12


def batch_of_all_kinds() -> Tensor:
    batch = torch.cat([features_of(seed, 7, 8, 12, 1.0) for seed in range(5)])
    batch[1, 2] = 0
    batch[2, 3, 3] = math.nan
    batch[3] = 0
    batch[4] = 1
    return batch


def test_alone_is_as_in_a_batch() -> None:
    batch = batch_of_all_kinds()
    together = localize(batch, rule="ncut")
    for row, one in enumerate(batch):
        alone = localize(one[None], rule="ncut")
        assert torch.equal(alone.boxes_B4[0], together.boxes_B4[row])
        assert torch.equal(alone.mask_BHW[0], together.mask_BHW[row])
        assert torch.equal(alone.degree_BN[0], together.degree_BN[row])
        torch.testing.assert_close(alone.score_B[0], together.score_B[row], rtol=1e-4, atol=1e-5)


def test_tiles_give_what_the_whole_matrix_gives() -> None:
    # 900 patches are 3.1 MiB of similarities: in a budget of one they are made band by band.
    batch = torch.cat([features_of(seed, 30, 30, 12, 1.0) for seed in range(2)])
    whole = localize(batch, rule="ncut", affinity_memory_mib=512)
    tiled = localize(batch, rule="ncut", affinity_memory_mib=1)
    assert torch.equal(whole.degree_BN, tiled.degree_BN)
    assert torch.equal(whole.boxes_B4, tiled.boxes_B4)


@pytest.mark.parametrize(
    ("features", "why"),
    [
        (torch.ones(1, 1, 1, 4), "one patch has no two sides"),
        (torch.ones(1, 4, 5, 4), "all alike"),
        (torch.zeros(1, 4, 5, 4), "all zero"),
        (torch.full((1, 4, 5, 4), math.nan), "not finite"),
        (torch.full((1, 4, 5, 4), math.inf), "not finite"),
    ],
)
def test_an_image_without_two_sides_has_no_box(features: Tensor, why: str) -> None:
    found = localize(features, rule="ncut")
    assert not found.found_B[0], why
    assert found.boxes_B4.tolist() == [[0, 0, 0, 0]]
    assert found.seed_B.tolist() == [0]
    assert [found.score_B.item(), found.mask_BHW.sum().item()] == [0, 0]


def test_pieces_without_a_link_are_the_two_sides_and_the_smaller_is_the_object() -> None:
    features = torch.zeros(1, 4, 6, 2)
    features[..., 0] = 1
    features[:, 1:3, 1:3] = torch.tensor([0.0, 1.0])
    found = localize(features, rule="ncut")
    assert found.boxes_B4.tolist() == [[1, 1, 3, 3]]


def test_unusable_patches_take_no_part() -> None:
    features = torch.zeros(1, 4, 6, 2)
    features[..., 0] = 1
    features[:, 1:3, 1:3] = torch.tensor([0.0, 1.0])
    features[:, 3] = 0
    features[:, 0, 5] = math.nan
    found = localize(features, rule="ncut")
    assert found.boxes_B4.tolist() == [[1, 1, 3, 3]]
    assert not found.mask_BHW[0, 3].any()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_comes_in_nothing_raises_and_boxes_are_in_the_grid(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    values = st.sampled_from([-1.0, 0.0, 1.0, 2.0, 1e-30, 1e30, math.nan, math.inf])
    count = height * width * 2
    drawn = data.draw(st.lists(values, min_size=count, max_size=count))
    features = torch.tensor(drawn).reshape(1, height, width, 2)
    found = localize(features, rule="ncut")
    x0, y0, x1, y1 = found.boxes_B4[0].tolist()
    if found.found_B[0]:
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
    assert torch.isfinite(found.score_B).all()


def test_half_precision_features_are_cut_in_single() -> None:
    features = features_of(3, 6, 7, 16, 2.0)
    found = localize(features.half(), rule="ncut")
    expected = localize(features.half().float(), rule="ncut")
    assert torch.equal(found.boxes_B4, expected.boxes_B4)
