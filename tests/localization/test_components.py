"""Connected components: the library call and the flood fill agree with each other."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.localization.components import fill_from_seed, seed_component, tight_boxes
from tests.localization.slow_localize import flood


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32), st.floats(0.2, 0.9))
def test_labelling_equals_flood_fill_equals_the_slow_loop(
    height: int, width: int, seed: int, density: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, height, width, generator=generator) < density
    seeds = torch.randint(height * width, (3,), generator=generator)
    labelled = seed_component(mask, seeds)
    assert torch.equal(labelled, fill_from_seed(mask, seeds))
    for image in range(3):
        on = set(mask[image].flatten().nonzero().flatten().tolist())
        expected = flood(on, int(seeds[image]), width)
        assert set(labelled[image].flatten().nonzero().flatten().tolist()) == expected


def test_flood_fill_follows_a_spiral_to_its_end() -> None:
    spiral = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1, 1],
            [0, 0, 0, 0, 0, 0, 1],
            [1, 1, 1, 1, 1, 0, 1],
            [1, 0, 0, 0, 1, 0, 1],
            [1, 0, 1, 1, 1, 0, 1],
            [1, 0, 0, 0, 0, 0, 1],
            [1, 1, 1, 1, 1, 1, 1],
        ],
        dtype=torch.bool,
    )[None]
    assert torch.equal(fill_from_seed(spiral, torch.tensor([0])), spiral)


def test_the_neighbour_image_of_the_batch_is_never_reached() -> None:
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[0] = True
    mask[1, 0, 0] = True
    component = seed_component(mask, torch.tensor([0, 3]))
    assert component[0].all()
    assert not component[1].any()


def test_a_tight_box_is_exclusive_at_its_far_sides_and_zero_when_empty() -> None:
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[0, 1:3, 2:5] = True
    assert tight_boxes(mask).tolist() == [[2, 1, 5, 3], [0, 0, 0, 0]]
