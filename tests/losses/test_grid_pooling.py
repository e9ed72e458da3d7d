"""The pooled grids, against a slow loop."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses.multi_stage import pool_grid, pooled_shape


def slow_pool(features: Tensor, kind: str) -> Tensor:
    height, width = features.shape[2:]
    rows, columns = pooled_shape(height, width, kind)  # type: ignore[arg-type]
    out = torch.zeros(*features.shape[:2], rows, columns)
    low, high = {"mean_2x2": (0, 2), "overlap_3x3": (-1, 2)}[kind]
    for row in range(rows):
        for column in range(columns):
            cells = [
                features[:, :, 2 * row + down, 2 * column + right]
                for down in range(low, high)
                for right in range(low, high)
                if 0 <= 2 * row + down < height and 0 <= 2 * column + right < width
            ]
            out[:, :, row, column] = torch.stack(cells).mean(dim=0)
    return out


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["mean_2x2", "overlap_3x3"]))
def test_pooled_grids_equal_the_slow_loop(height: int, width: int, kind: Any) -> None:
    if kind == "mean_2x2":
        height, width = 2 * height, 2 * width
    features = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    pooled = pool_grid(features, kind)
    assert pooled.shape[2:] == pooled_shape(height, width, kind)
    torch.testing.assert_close(pooled, slow_pool(features, kind), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shape"), [("none", (14, 14)), ("mean_2x2", (7, 7)), ("overlap_3x3", (7, 7))]
)
def test_fourteen_cells_a_side_become_seven(kind: Any, shape: tuple[int, int]) -> None:
    assert pooled_shape(14, 14, kind) == shape


def test_no_pooling_gives_the_very_same_tensor() -> None:
    features = torch.zeros(1, 2, 3, 3)
    assert pool_grid(features, "none") is features


def test_two_by_two_means_refuse_to_drop_a_row() -> None:
    with pytest.raises(ValueError, match="needs even sides, got 7 x 14: use overlap_3x3"):
        pool_grid(torch.zeros(1, 1, 7, 14), "mean_2x2")


def test_unknown_kinds_are_refused() -> None:
    unknown: Any = "max"
    with pytest.raises(
        ValueError, match="pooling must be none, mean_2x2 or overlap_3x3, got 'max'"
    ):
        pool_grid(torch.zeros(1, 1, 4, 4), unknown)
