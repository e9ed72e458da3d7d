"""Several grids at once, and what turning the loss on leaves alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import DRLocConfig
from pipeline.losses.drloc import DRLocHead, constant_predictor_floor, drloc_terms
from pipeline.losses.multi_stage import DRLocObjective, pool_grid
from pipeline.losses.pairs import all_pairs, pair_generator, sample_pairs

SHAPES = [(4, 8, 6), (6, 4, 3)]


def grids(batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, *shape, generator=generator) for shape in SHAPES]


def heads_of(objective: DRLocObjective) -> list[DRLocHead]:
    return [head for head in objective.heads if isinstance(head, DRLocHead)]


def test_the_objective_is_the_sum_over_its_grids_and_the_last_grids_error() -> None:
    config = DRLocConfig(hidden_dim=16, num_pairs=9, mode="cbr", signed=True)
    objective = DRLocObjective(SHAPES, config, pooling=("mean_2x2", "none"))
    terms = objective(grids(), objective.draw(3, pair_generator(0, 0, 0, "cpu")))
    generator = pair_generator(0, 0, 0, "cpu")
    expected = []
    for grid, head, kind in zip(grids(), heads_of(objective), ("mean_2x2", "none"), strict=True):
        pooled = pool_grid(grid, kind)  # type: ignore[arg-type]
        pairs = sample_pairs(3, 9, *pooled.shape[2:], generator=generator)
        expected.append(drloc_terms(pooled, head, pairs))
    assert [head.grid for head in heads_of(objective)] == [(4, 3), (4, 3)]
    torch.testing.assert_close(terms.loss, expected[0].loss + expected[1].loss)
    assert torch.equal(terms.error_cells, expected[1].error_cells)


@pytest.mark.parametrize("reduction", ["mean", "paper"])
def test_every_option_reaches_the_loss(reduction: Any) -> None:
    config = DRLocConfig(
        hidden_dim=16, num_hidden=3, signed=True, normalize="side", reduction=reduction, num_pairs=5
    )
    objective = DRLocObjective([SHAPES[1]], config)
    head = heads_of(objective)[0]
    assert (head.first.out_features, len(head.hidden), head.signed) == (16, 2, True)
    grid = grids()[1]
    pairs = sample_pairs(3, 5, 4, 3, generator=pair_generator(0, 0, 0, "cpu"))
    expected = drloc_terms(grid, head, pairs, normalize="side", reduction=reduction)
    found = objective([grid], objective.draw(3, pair_generator(0, 0, 0, "cpu")))
    torch.testing.assert_close(found.loss, expected.loss)


def test_building_the_heads_leaves_the_global_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    DRLocObjective(SHAPES, DRLocConfig(), seed=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_heads_follow_their_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = DRLocObjective(SHAPES, DRLocConfig(), seed=3).state_dict()
    torch.manual_seed(2)
    again = DRLocObjective(SHAPES, DRLocConfig(), seed=3).state_dict()
    other = DRLocObjective(SHAPES, DRLocConfig(), seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_training_step_leaves_the_global_random_numbers_alone() -> None:
    objective = DRLocObjective(SHAPES, DRLocConfig())
    before = torch.random.get_rng_state()
    objective(grids(), objective.draw(3, pair_generator(0, 0, 0, "cpu"))).loss.backward()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("mode", ["l1", "ce", "cbr"])
def test_all_pairs_and_the_expectation_are_the_loss_over_every_pair(mode: Any) -> None:
    config = DRLocConfig(hidden_dim=8, mode=mode)
    objective = DRLocObjective([SHAPES[1]], config)
    grid = grids()[1].requires_grad_()
    exact = drloc_terms(grid, heads_of(objective)[0], all_pairs(3, 4, 3))
    trained = objective([grid], [all_pairs(3, 4, 3)])
    assert torch.equal(trained.loss, exact.loss)
    assert trained.loss.requires_grad
    looked_at = objective.expectation([grid])
    assert not looked_at.loss.requires_grad
    torch.testing.assert_close(looked_at, exact)


def test_the_floor_is_that_of_the_last_pooled_grid() -> None:
    objective = DRLocObjective(
        [(4, 28, 28), (8, 14, 14)], DRLocConfig(signed=True), pooling="overlap_3x3"
    )
    assert objective.floor_cells == constant_predictor_floor(7, 7, signed=True)


def test_swins_four_stages_have_the_released_number_of_parameters() -> None:
    shapes = [(192, 28, 28), (384, 14, 14), (768, 7, 7), (768, 7, 7)]
    parameters = sum(p.numel() for p in DRLocObjective(shapes, DRLocConfig()).parameters())
    # Facts: the multi-scale variant costs 3,219,464 parameters.
    assert parameters == 3_219_464


@pytest.mark.parametrize(
    ("shapes", "options", "pooling", "message"),
    [
        ([], {}, "none", "at least one grid and a pooling for each, got 0 grids"),
        (SHAPES, {}, ("none",), "got 2 grids and 1 poolings"),
        (SHAPES, {"mode": "ce", "normalize": "side"}, "none", "normalize must be none"),
        (SHAPES, {"num_pairs": 0}, "none", "num_pairs\n.* greater than or equal to 1"),
        ([(4, 2, 2)], {}, "mean_2x2", "at least 2 x 2 cells, got 1 x 1: choose a larger"),
        ([(4, 7, 7)], {}, "mean_2x2", "needs even sides, got 7 x 7"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(
    shapes: Any, options: Any, pooling: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DRLocObjective(shapes, DRLocConfig(**options), pooling=pooling)


def test_parts_of_a_batch_that_share_a_draw_have_the_mean_loss_of_the_whole() -> None:
    # What makes two workers equal one, and accumulation equal a large batch.
    objective = DRLocObjective(SHAPES, DRLocConfig(hidden_dim=16)).double()
    whole = [grid.double() for grid in grids(4)]
    pairs = objective.draw(4, pair_generator(0, 0, 0, "cpu"))
    halves = [
        objective([grid[half] for grid in whole], [each[half] for each in pairs])
        for half in (slice(0, 2), slice(2, 4))
    ]
    loss, error = objective(whole, pairs)
    torch.testing.assert_close(loss, (halves[0].loss + halves[1].loss) / 2)
    torch.testing.assert_close(error, (halves[0].error_cells + halves[1].error_cells) / 2)


def test_a_missing_grid_or_draw_is_noticed() -> None:
    objective = DRLocObjective(SHAPES, DRLocConfig())
    pairs = objective.draw(3, pair_generator(0, 0, 0, "cpu"))
    with pytest.raises(ValueError, match="got 1 grids and 2 sets of pairs for 2 heads"):
        objective(grids()[:1], pairs)
    with pytest.raises(ValueError, match="got 2 grids and 1 sets of pairs for 2 heads"):
        objective(grids(), pairs[:1])


@pytest.mark.parametrize("shape", [(6, 3, 3), (6, 4, 4), (6, 3, 4)])
def test_a_grid_of_another_size_is_refused_because_the_pairs_would_name_other_cells(
    shape: tuple[int, int, int],
) -> None:
    objective = DRLocObjective([SHAPES[1]], DRLocConfig())
    pairs = objective.draw(2, pair_generator(0, 0, 0, "cpu"))
    message = f"built for a 4 x 3 grid, got {shape[1]} x {shape[2]}"
    with pytest.raises(ValueError, match=message):
        objective([torch.zeros(2, *shape)], pairs)
