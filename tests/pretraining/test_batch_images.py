"""Matrices that crop, resize, mirror and blur: torchvision, one image at a time, is the oracle."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as one

from pipeline.pretraining.batch_images import (
    blur_matrix,
    mirrored,
    mix_rows_and_columns,
    resampling_matrix,
)

HEIGHT, WIDTH = 40, 56

# x0, y0, width, height: whole, tiny, narrow, flat, at each border, one pixel.
BOXES = [
    (0, 0, 56, 40),
    (13, 7, 5, 4),
    (20, 0, 3, 40),
    (0, 31, 56, 2),
    (26, 3, 30, 37),
    (0, 0, 17, 23),
    (55, 39, 1, 1),
]


def noise(num_images: int, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((num_images, 3, height, width), generator=generator)


@pytest.mark.parametrize("size", [1, 8, 33, 64])
def test_crops_are_resized_as_by_torchvision(size: int) -> None:
    images = noise(len(BOXES))
    x0, y0, width, height = torch.tensor(BOXES).unbind(1)
    rows = resampling_matrix(y0, height, HEIGHT, size)
    columns = resampling_matrix(x0, width, WIDTH, size)
    made = mix_rows_and_columns(images, rows, columns)
    for image, (left, top, wide, high), ours in zip(images, BOXES, made, strict=True):
        expected = one.resized_crop(
            image, top, left, high, wide, [size, size], InterpolationMode.BICUBIC, antialias=True
        )
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_large_image_made_small_is_as_exact() -> None:
    image = noise(1, 700, 1100)
    start, height, width = torch.tensor([3]), torch.tensor([690]), torch.tensor([1050])
    rows = resampling_matrix(start, height, 700, 96)
    columns = resampling_matrix(start, width, 1100, 96)
    expected = one.resized_crop(
        image[0], 3, 3, 690, 1050, [96, 96], InterpolationMode.BICUBIC, antialias=True
    )
    made = mix_rows_and_columns(image, rows, columns)[0]
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_a_crop_at_its_own_size_is_the_pixels_themselves() -> None:
    image = noise(1)
    rows = resampling_matrix(torch.tensor([4]), torch.tensor([32]), HEIGHT, 32)
    columns = resampling_matrix(torch.tensor([11]), torch.tensor([32]), WIDTH, 32)
    made = mix_rows_and_columns(image, rows, columns)
    torch.testing.assert_close(made, image[:, :, 4:36, 11:43], rtol=0, atol=1e-6)


def test_only_the_chosen_are_mirrored() -> None:
    images = noise(2)
    start, width = torch.tensor([5, 5]), torch.tensor([30, 30])
    rows = torch.eye(HEIGHT).expand(2, -1, -1)
    columns = resampling_matrix(start, width, WIDTH, 16)
    plain = mix_rows_and_columns(images, rows, columns)
    made = mix_rows_and_columns(images, rows, mirrored(columns, torch.tensor([True, False])))
    torch.testing.assert_close(made[0], one.horizontal_flip(plain[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(made[1], plain[1], rtol=0, atol=0)


@pytest.mark.parametrize("side", [9, 24, 56])
def test_images_are_blurred_as_by_torchvision(side: int) -> None:
    sigmas = torch.tensor([0.1, 0.3, 0.7, 1.1, 2.0])
    images = noise(len(sigmas), side, side)
    matrix = blur_matrix(sigmas, side, radius=8)
    made = mix_rows_and_columns(images, matrix, matrix)
    for image, sigma, ours in zip(images, sigmas.tolist(), made, strict=True):
        expected = one.gaussian_blur(image, [17, 17], [sigma, sigma])
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_on_a_side_shorter_than_the_reach_the_blur_is_cut_to_one_mirroring() -> None:
    matrix = blur_matrix(torch.tensor([2.0]), 5, radius=8)
    image = noise(1, 5, 5)
    expected = one.gaussian_blur(image[0], [9, 9], [2.0, 2.0])
    made = mix_rows_and_columns(image, matrix, matrix)[0]
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def test_one_pixel_stays_what_it_is() -> None:
    assert blur_matrix(torch.tensor([0.1, 2.0]), 1, radius=8).tolist() == [[[1.0]], [[1.0]]]
