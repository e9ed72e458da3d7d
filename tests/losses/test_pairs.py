"""Which pairs are drawn, and what is asked about them."""

from collections import Counter
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.losses.pairs import all_pairs, pair_generator, relative_offsets, sample_pairs
from tests.losses.slow_drloc import slow_target


def test_every_ordered_pair_of_cells_is_equally_likely_also_a_cell_with_itself() -> None:
    # 300,000 independent draws over 6 * 6 outcomes on a 2 x 3 grid.
    pairs = sample_pairs(100, 3000, 2, 3, generator=pair_generator(0, 0, 0, "cpu"))
    cell = pairs[..., 0] * 3 + pairs[..., 1]
    counts = torch.bincount((cell[..., 0] * 6 + cell[..., 1]).flatten(), minlength=36)
    assert len(counts) == 36
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_neighbouring_steps_ranks_and_seeds_draw_unrelated_pairs() -> None:
    # The first pair of 3 * 4,000 generators must be as uniform as pairs of one generator, jointly
    # with the first pair of the generator before it.
    for key in ("seed", "rank", "step"):
        cells = []
        for number in range(4000):
            keys = {"seed": 3, "rank": 5, "step": 7} | {key: number}
            pairs = sample_pairs(1, 1, 3, 3, generator=pair_generator(**keys, device="cpu"))
            cells.append(int(pairs[0, 0, 0, 0] * 3 + pairs[0, 0, 0, 1]))
        joint = Counter(pairwise(cells))
        counts = [joint[first, second] for first, second in product(range(9), range(9))]
        assert stats.chisquare(counts).pvalue > 0.001, key


def test_the_same_key_draws_the_same_pairs_and_any_other_key_draws_others() -> None:
    def drawn(seed: int, rank: int, step: int) -> tuple[int, ...]:
        generator = pair_generator(seed, rank, step, "cpu")
        return tuple(sample_pairs(2, 64, 7, 7, generator=generator).flatten().tolist())

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    small = product(range(3), range(3), range(3))
    keys = [*small, (12, 3, 4), (1, 23, 4), (-1, 0, 0), (2**70, 0, 0)]
    assert len({drawn(*key) for key in keys}) == len(keys)


def test_drawing_pairs_leaves_the_global_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    sample_pairs(4, 64, 7, 7, generator=pair_generator(0, 0, 0, "cpu"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_rows_stay_within_the_height_and_columns_within_the_width() -> None:
    pairs = sample_pairs(8, 500, 3, 11, generator=pair_generator(0, 0, 0, "cpu"))
    assert pairs.dtype == torch.int64
    assert pairs.shape == (8, 500, 2, 2)
    assert set(pairs[..., 0].flatten().tolist()) == set(range(3))
    assert set(pairs[..., 1].flatten().tolist()) == set(range(11))


@pytest.mark.gpu
def test_pairs_are_drawn_on_the_generators_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert sample_pairs(1, 2, 7, 7, generator=pair_generator(0, 0, 0, "cuda")).is_cuda


def test_all_pairs_holds_every_ordered_pair_once_for_every_image() -> None:
    pairs = all_pairs(2, 3, 2)
    cells = list(product(range(3), range(2)))
    for image in pairs.tolist():
        found = [(tuple(first), tuple(second)) for first, second in image]
        assert sorted(found) == sorted(product(cells, cells))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    signed=st.booleans(),
    normalize=st.sampled_from(["none", "side", "side_minus_one"]),
)
def test_offsets_equal_the_slow_loop_on_every_pair(
    height: int, width: int, signed: bool, normalize: Any
) -> None:
    pairs = all_pairs(1, height, width)
    targets = relative_offsets(pairs, height, width, signed=signed, normalize=normalize)
    slow = [
        [
            slow_target(first[axis], second[axis], side, signed=signed, normalize=normalize)
            for axis, side in enumerate((height, width))
        ]
        for first, second in pairs[0].tolist()
    ]
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets[0], torch.tensor(slow), rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", [(1, 7), (7, 1), (1, 1)])
def test_a_grid_of_one_cell_along_a_side_is_refused_with_a_remedy(grid: tuple[int, int]) -> None:
    generator = pair_generator(0, 0, 0, "cpu")
    message = f"at least 2 x 2 cells, got {grid[0]} x {grid[1]}: choose a larger image_size, a sma"
    with pytest.raises(ValueError, match=message):
        sample_pairs(1, 4, *grid, generator=generator)
    with pytest.raises(ValueError, match=message):
        all_pairs(1, *grid)
    with pytest.raises(ValueError, match=message):
        relative_offsets(torch.zeros(1, 1, 2, 2, dtype=torch.int64), *grid)


def test_no_pairs_and_unknown_units_are_refused() -> None:
    with pytest.raises(ValueError, match="num_pairs must be at least 1, got 0"):
        sample_pairs(1, 0, 7, 7, generator=pair_generator(0, 0, 0, "cpu"))
    unknown: Any = "cells"
    with pytest.raises(
        ValueError, match="normalize must be none, side or side_minus_one, got 'cells'"
    ):
        relative_offsets(all_pairs(1, 2, 2), 2, 2, normalize=unknown)
