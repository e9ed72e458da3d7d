import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.models.features import (
    NORMALIZATIONS,
    FeatureExtractor,
    normalize_and_pad,
    padded_size,
)

MEAN, STD = NORMALIZATIONS["imagenet"]


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [((1, 1), 16, (16, 16)), ((16, 17), 16, (16, 32)), ((375, 500), 8, (376, 504))],
)
def test_padded_size_rounds_up(
    size: tuple[int, int], multiple: int, expected: tuple[int, int]
) -> None:
    assert padded_size(*size, multiple) == expected


def test_pixels_are_normalised_exactly_as_written() -> None:
    image = photo(5, 7)
    batch = normalize_and_pad([image], multiple=8, mean=MEAN, std=STD)
    expected = (torch.from_numpy(image).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert batch.shape == (1, 3, 8, 8)
    assert torch.equal(batch[0, :, :5, :7].permute(1, 2, 0), expected)


def test_padding_is_zero_after_normalisation_and_only_right_and_below() -> None:
    batch = normalize_and_pad([np.zeros((5, 7, 3), np.uint8)], multiple=8, mean=MEAN, std=STD)
    assert (batch[0, :, :5, :7] < 0).all()
    assert (batch[0, :, 5:] == 0).all()
    assert (batch[0, :, :, 7:] == 0).all()


def test_images_of_one_grid_are_the_same_alone_and_together() -> None:
    images = [photo(20, 30, 1), photo(17, 32, 2), photo(32, 17, 3)]
    together = normalize_and_pad(images, multiple=16, mean=MEAN, std=STD)
    for slot, image in zip(together, images, strict=True):
        alone = normalize_and_pad([image], multiple=16, mean=MEAN, std=STD)
        assert torch.equal(slot, alone[0])


@pytest.mark.filterwarnings("error")
def test_read_only_and_flipped_arrays_are_taken() -> None:
    image = photo(16, 16)
    read_only = image.copy()
    read_only.flags.writeable = False
    flipped = image[:, ::-1].copy()[:, ::-1]
    expected = normalize_and_pad([image], multiple=16, mean=MEAN, std=STD)
    for variant in (read_only, flipped):
        found = normalize_and_pad([variant], multiple=16, mean=MEAN, std=STD)
        assert torch.equal(found, expected)


def test_images_of_different_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"share one padded size, got \[\(16, 16\), \(16, 32\)\]"):
        normalize_and_pad([photo(9, 16), photo(9, 17)], multiple=16, mean=MEAN, std=STD)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="share one padded size"):
        normalize_and_pad([], multiple=16, mean=MEAN, std=STD)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), "u1")],
)
def test_anything_but_rgb_bytes_is_refused(image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        normalize_and_pad([image], multiple=4, mean=MEAN, std=STD)


def test_grid_is_rows_first_and_refuses_unpadded_images() -> None:
    extractor = FeatureExtractor()
    extractor.patch_size = 16
    assert extractor.patch_grid(torch.zeros(1, 3, 32, 48)) == (2, 3)
    with pytest.raises(ValueError, match="multiples of 16, got 32 x 50"):
        extractor.patch_grid(torch.zeros(1, 3, 32, 50))
