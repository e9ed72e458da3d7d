"""Where anchors are: the cells' corners times the stride, whatever the padding."""

import math

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from pipeline.detection.proposals import FixedStrideAnchors


def slow_anchors(
    sizes: list[float], ratios: list[float], stride: int, grid: tuple[int, int]
) -> list[list[float]]:
    """One anchor at a time."""
    anchors = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            for size in sizes:
                for ratio in ratios:
                    width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
                    x, y = column * stride, row * stride
                    half = (width / 2, height / 2)
                    anchors.append([x - half[0], y - half[1], x + half[0], y + half[1]])
    return anchors


def test_every_level_has_all_sizes_at_all_ratios_and_the_padding_moves_none() -> None:
    ratios = [0.5, 1.0, 3.0]
    generate = FixedStrideAnchors([[32.0, 50.0], [100.0]], ratios, [16, 32])
    # 147 x 211 pixels have 10 x 14 cells: torchvision would take a stride of 14 and 15.
    images = ImageList(torch.zeros(2, 3, 147, 211), [(147, 211), (100, 200)])
    maps = [torch.zeros(2, 8, 10, 14), torch.zeros(2, 8, 5, 7)]
    expected = slow_anchors([32, 50], ratios, 16, (10, 14)) + slow_anchors(
        [100], ratios, 32, (5, 7)
    )
    for found in generate(images, maps):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=3e-5)


def test_anchors_are_exact_where_features_are_not() -> None:
    generate = FixedStrideAnchors([[32.0]], [1.0], [16])
    images = ImageList(torch.zeros(1, 3, 1000, 1000), [(1000, 1000)])
    (found,) = generate(images, [torch.zeros(1, 8, 63, 63, dtype=torch.bfloat16)])
    assert found.dtype == torch.float32
    assert found[-1].tolist() == [976, 976, 1008, 1008]


def test_a_level_without_a_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="each level needs a stride, got 1 for 2 levels"):
        FixedStrideAnchors([[32.0], [64.0]], [1.0], [16])
