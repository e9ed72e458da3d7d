"""Sizes are Detectron2's, and what is drawn is drawn evenly."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from pipeline.config.detection import BoxDataConfig
from pipeline.detection.box_loader import BoxTransform, resized_size


def slow_size(width: int, height: int, short: int, longest: int) -> tuple[int, int]:
    """Detectron2's rule, side by side."""
    scale = short / min(width, height)
    new_height, new_width = (
        (float(short), scale * width) if height < width else (scale * height, float(short))
    )
    if max(new_height, new_width) > longest:
        scale = longest / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_width + 0.5), int(new_height + 0.5)


SIDE = st.integers(32, 2000)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIDE, SIDE, st.sampled_from([480, 512, 800]))
def test_sizes_are_detectron2s(width: int, height: int, short: int) -> None:
    size = resized_size(width, height, short_side=short, max_side=1333)
    assert size == slow_size(width, height, short, 1333)
    assert max(size) <= 1333
    assert min(size) <= short


def test_sizes_known_by_heart() -> None:
    assert resized_size(500, 375, short_side=800, max_side=1333) == (1067, 800)
    assert resized_size(640, 480, short_side=480, max_side=1333) == (640, 480)
    assert resized_size(500, 200, short_side=800, max_side=1333) == (1333, 533)
    assert resized_size(5000, 1, short_side=800, max_side=1333) == (1333, 1)


def test_short_sides_and_flips_are_drawn_evenly() -> None:
    image, boxes_N4 = Image.new("RGB", (20, 20)), np.array([[0, 0, 5, 20]], np.float32)
    transform = BoxTransform(BoxDataConfig(short_sides=(16, 20, 24, 28)))
    drawn = [transform(image, boxes_N4, random.Random(seed)) for seed in range(800)]
    sides = np.unique([image_3HW.shape[1] for image_3HW, _ in drawn], return_counts=True)
    assert sides[0].tolist() == [16, 20, 24, 28]
    assert np.abs(sides[1] - 200).max() < 50
    flipped = np.mean([boxes[0, 0] > 0 for _, boxes in drawn])
    assert abs(flipped - 0.5) < 0.06


def test_the_usual_short_sides_are_the_eleven_from_480_to_800() -> None:
    assert BoxDataConfig().short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"short_sides": ()}, "short_sides"),
        ({"short_sides": (0,)}, "short_sides"),
        ({"max_side": 0}, "max_side"),
        ({"flip": 1.5}, "flip"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=f"\n{told}"):
        BoxDataConfig.model_validate(options)
