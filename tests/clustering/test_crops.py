"""Crops and their vectors: equal to a loop over crops, whatever they share a batch with."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.transforms import Compose, Normalize, Resize
from torchvision.transforms.functional import InterpolationMode

from pipeline.clustering import table_boxes as module
from pipeline.clustering.table_boxes import CropOptions, crop_size, crop_vectors, cut, seen
from pipeline.models.dino_vit import ClassTokens
from pipeline.models.features import NORMALIZATIONS


@pytest.fixture(scope="module")
def network() -> ClassTokens:
    """A ViT none of whose weights is at 0 or 1, where a mistake could hide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=0
        )
        for weight in vit.parameters():
            nn.init.normal_(weight, mean=float(weight.mean() > 0.5), std=0.2)
    return ClassTokens(vit).eval().requires_grad_(False)


def pictures(count: int) -> list[NDArray[np.uint8]]:
    """Crops of few shapes, so that some share a grid and some do not."""
    generator = np.random.default_rng(0)
    shapes = [(20, 30), (30, 20), (21, 33), (9, 9), (40, 40), (5, 60)]
    return [
        generator.integers(0, 256, (*shapes[generator.integers(len(shapes))], 3), dtype=np.uint8)
        for _ in range(count)
    ]


def slow_vector(crop: NDArray[np.uint8], network: ClassTokens, side: int) -> NDArray[np.float32]:
    """As LOST: the normalised image, torchvision's Resize, a batch of one, the norm by hand."""
    mean, std = NORMALIZATIONS["imagenet"]
    steps = Compose([Normalize(mean, std), Resize(side, InterpolationMode.BICUBIC)])
    image = steps(torch.from_numpy(crop.copy()).permute(2, 0, 1) / 255)
    token = network(image[None])[0].numpy()
    unit: NDArray[np.float32] = token / np.sqrt((token**2).sum())
    return unit


def vectors_of(crops: list[Any], network: ClassTokens, **options: Any) -> NDArray[np.float32]:
    found = np.full((len(crops), network.num_features), np.nan, np.float32)
    for numbers, vectors in crop_vectors(
        crops, network, CropOptions(side=18), device="cpu", **options
    ):
        assert np.isnan(found[numbers]).all(), "a crop came twice"
        found[numbers] = vectors
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("waiting", [2, 256])
def test_vectors_equal_a_slow_loop_over_crops(
    network: ClassTokens, batch_size: int, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_WAITING", waiting)
    monkeypatch.setattr(module, "LONGEST", 100)
    crops = pictures(23)
    wanted = np.stack([slow_vector(crop, network, 18) for crop in crops])
    found = vectors_of(crops, network, batch_size=batch_size)
    np.testing.assert_allclose(found, wanted, atol=3e-5)
    # They differ by far more than that.
    assert np.abs(wanted - wanted.mean(0)).max() > 0.05


def test_few_crops_wait_at_any_time(network: ClassTokens) -> None:
    handed_out, done = [], 0

    def endless() -> Any:
        for crop in pictures(700):
            handed_out.append(crop.shape)
            assert len(handed_out) - done <= 256
            yield crop

    for numbers, _ in crop_vectors(
        endless(), network, CropOptions(side=8), device="cpu", batch_size=200
    ):
        done += len(numbers)
    assert done == len(handed_out) == 700


def test_no_crops_give_no_vectors(network: ClassTokens) -> None:
    assert list(crop_vectors([], network, CropOptions(), device="cpu", batch_size=4)) == []


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (33, 33), (7, 20), (500, 375)])
def test_sizes_are_those_of_torchvisions_resize(size: tuple[int, int]) -> None:
    wanted = tuple(Resize(256, antialias=True)(torch.zeros(3, *size)).shape[1:])
    assert crop_size(*size, side=256, patch_size=16) == wanted


def test_strips_are_made_shorter_than_the_side_before_they_are_many_patches() -> None:
    assert crop_size(10, 40, side=256, patch_size=16) == (256, 1024)
    assert crop_size(10, 80, side=256, patch_size=16) == (128, 1024)
    assert crop_size(80, 10, side=256, patch_size=16) == (1024, 128)
    # At least a patch is left, at the cost of the proportions.
    assert crop_size(1, 5000, side=256, patch_size=16) == (16, 1024)


def test_a_crop_has_whole_patches_and_is_smoothed_unless_asked_otherwise() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (100, 170, 3), dtype=np.uint8)
    smooth, plain = (seen(crop, CropOptions(30, "half", one), 8) for one in (True, False))
    assert smooth.shape == plain.shape == (3, 24, 48)
    assert plain.std() > 1.5 * smooth.std()
    white = seen(np.full((9, 9, 3), 255, np.uint8), CropOptions(16, "half"), 8)
    assert (white == 1).all()


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((2, 1, 5, 4), (1, 4), (2, 5)),
        ((1.6, 0.6, 5.4, 3.5), (1, 4), (2, 5)),
        ((-3, -2, 50, 60), (0, 8), (0, 10)),
        # Less than a pixel, and outside: the nearest one.
        ((4.2, 2.2, 4.4, 2.4), (2, 3), (4, 5)),
        ((40, 30, 50, 60), (7, 8), (9, 10)),
        ((-9, -9, -5, -5), (0, 1), (0, 1)),
    ],
)
def test_a_box_is_cut_at_its_rounded_corners_inside_the_image(
    box: tuple[float, ...], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    image = np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3)
    wanted = image[slice(*rows), slice(*columns)]
    assert wanted.size
    np.testing.assert_array_equal(cut(image, box), wanted)
