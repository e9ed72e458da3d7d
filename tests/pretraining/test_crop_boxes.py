"""Random resized crops: inside the image, of the shares and ratios asked for, as torchvision's."""

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from pipeline.pretraining.views import draw_boxes


def boxes(
    num_images: int,
    size: tuple[int, int],
    *scales: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    seed: int = 0,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return draw_boxes(num_images, torch.tensor(scales), size=size, ratio=ratio, generator=generator)


def torchvisions(
    num_images: int, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    crop = RandomResizedCrop(8, scale, ratio)
    image = torch.zeros(3, *size)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = [crop.make_params([image]) for _ in range(num_images)]
    return torch.tensor([[d["left"], d["top"], d["width"], d["height"]] for d in drawn])


@pytest.mark.parametrize("size", [(64, 64), (48, 100), (7, 3), (1, 1)])
def test_boxes_lie_inside_the_image(size: tuple[int, int]) -> None:
    x0, y0, width, height = boxes(500, size, (0.4, 1.0), (0.05, 0.4)).unbind(-1)
    assert x0.shape == (500, 2)
    assert min(x0.min(), y0.min()) >= 0
    assert min(width.min(), height.min()) >= 1
    assert (x0 + width).max() <= size[1]
    assert (y0 + height).max() <= size[0]


def test_shares_and_ratios_lie_where_they_were_asked_for() -> None:
    # The image is large: rounding to pixels moves a share by less than 1 %.
    _, _, width, height = boxes(2000, (1000, 1000), (0.4, 1.0), (0.05, 0.4)).unbind(-1)
    share = (width * height / 1e6).T
    for found, low, high in ((share[0], 0.4, 1.0), (share[1], 0.05, 0.4)):
        assert low * 0.99 < found.min() < low * 1.1
        assert high * 0.9 < found.max() < high * 1.01
    ratio = width / height
    assert 0.74 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.345


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((96, 96), (0.05, 0.4), (3 / 4, 4 / 3)),
        ((60, 110), (0.4, 1.0), (3 / 4, 4 / 3)),
        ((80, 80), (0.9, 1.0), (1 / 3, 2.0)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    ours = boxes(1500, size, scale, ratio=ratio)[:, 0]
    theirs = torchvisions(1500, size, scale, ratio)
    numbers = [*ours.T, ours[:, 2] * ours[:, 3], ours[:, 2] / ours[:, 3]]
    expected = [*theirs.T, theirs[:, 2] * theirs[:, 3], theirs[:, 2] / theirs[:, 3]]
    for found, wanted in zip(numbers, expected, strict=True):
        assert ks_2samp(found.numpy(), wanted.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("size", [(10, 90), (90, 10), (31, 200)])
def test_where_no_box_fits_it_is_torchvisions_central_one(size: tuple[int, int]) -> None:
    ratio = (3 / 4, 4 / 3)
    expected = torchvisions(1, size, (0.99, 1.0), ratio)
    assert boxes(4, size, (0.99, 1.0), ratio=ratio)[:, 0].tolist() == expected.tolist() * 4


def test_a_box_as_large_as_the_image_is_the_image() -> None:
    made = boxes(20, (33, 33), (1.0, 1.0), ratio=(1.0, 1.0))
    assert (made == torch.tensor([0, 0, 33, 33])).all()
