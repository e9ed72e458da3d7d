"""Changes of colour of a batch: torchvision, one image at a time, is the oracle."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as one

from pipeline.pretraining.batch_images import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    solarize,
    to_gray,
)

# Grey, black, white, pure and mixed colours, and two channels that share the highest value.
COLOURS = [
    (0.5, 0.5, 0.5),
    (0.0, 0.0, 0.0),
    (1.0, 1.0, 1.0),
    (1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0),
    (1.0, 1.0, 0.0),
    (0.0, 1.0, 1.0),
    (1.0, 0.0, 1.0),
    (0.3, 0.3, 0.2),
    (0.2, 0.3, 0.3),
    (0.3, 0.2, 0.3),
    (0.7, 0.1, 0.70001),
    (0.5, 0.499999, 0.5),
]


def images(num_images: int) -> Tensor:
    """Noise whose first pixels are the colours above."""
    made = torch.rand((num_images, 3, 7, 9), generator=torch.Generator().manual_seed(0))
    made.flatten(2)[:, :, : len(COLOURS)] = torch.tensor(COLOURS).T
    return made


@pytest.mark.parametrize(
    ("batched", "single"),
    [
        (adjust_brightness, one.adjust_brightness),
        (adjust_contrast, one.adjust_contrast),
        (adjust_saturation, one.adjust_saturation),
    ],
)
def test_adjustments_are_torchvisions(
    batched: Callable[[Tensor, Tensor], Tensor], single: Callable[[Tensor, float], Tensor]
) -> None:
    factors = torch.tensor([0.0, 0.3, 0.6, 1.0, 1.2, 1.4, 3.0])
    before = images(len(factors))
    made = batched(before, factors)
    for image, factor, ours in zip(before, factors.tolist(), made, strict=True):
        torch.testing.assert_close(ours, single(image, factor), rtol=0, atol=1e-6)


def test_hues_turn_as_torchvisions() -> None:
    turns = torch.tensor([-0.5, -0.3, -0.1, -1e-6, 0.0, 0.04, 0.1, 1 / 3, 0.5])
    before = images(len(turns))
    made = adjust_hue(before, turns)
    for image, turn, ours in zip(before, turns.tolist(), made, strict=True):
        torch.testing.assert_close(ours, one.adjust_hue(image, turn), rtol=0, atol=1e-5)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    turn=st.floats(-0.5, 0.5, width=32),
)
def test_of_any_colour_the_hue_turns_as_torchvisions(
    colour: tuple[int, int, int], turn: float
) -> None:
    pixel = (torch.tensor(colour) / 255)[None, :, None, None]
    made = adjust_hue(pixel, torch.tensor([turn]))
    torch.testing.assert_close(made, one.adjust_hue(pixel, turn), rtol=0, atol=1e-5)


def test_gray_is_torchvisions() -> None:
    before = images(2)
    expected = one.rgb_to_grayscale(before, 3)
    torch.testing.assert_close(to_gray(before), expected, rtol=0, atol=1e-6)


def test_solarising_inverts_from_one_half_on() -> None:
    before = images(2)
    assert torch.equal(solarize(before), one.solarize(before, 0.5))


def test_what_is_given_stays_as_it_was() -> None:
    before = images(3)
    copy = before.clone()
    for change in (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue):
        change(before, torch.tensor([0.2, 0.4, 0.5]))
    to_gray(before)
    solarize(before)
    assert torch.equal(before, copy)
