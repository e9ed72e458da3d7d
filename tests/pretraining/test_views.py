"""Views of whole batches: each is what torchvision makes of its image, whoever makes which part."""

import dataclasses
import pickle
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as one

from pipeline.config.pretraining import CropsConfig
from pipeline.pretraining.views import Views, draw_views, make_views

SIZE = (52, 44)
SMALL = CropsConfig(num_local=3, global_size=32, local_size=20)


def with_others(crops: CropsConfig, **fixed: Any) -> CropsConfig:
    """The same with other values of what is DINO's own."""
    kind = type("Others", (type(crops),), {"__module__": __name__, **fixed})
    others: CropsConfig = kind(**crops.model_dump())
    return others


BUSY = with_others(SMALL, blur_prob=(0.5, 0.5, 0.5), solarize_prob=(0.5, 0.5, 0.5))

ADJUST = (one.adjust_brightness, one.adjust_contrast, one.adjust_saturation, one.adjust_hue)


def photos(num_images: int, size: tuple[int, int] = SIZE) -> Tensor:
    """Noise in which neighbours are alike, of uint8."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand((num_images, 3, 9, 9), generator=generator)
    fine = torch.rand((num_images, 3, *size), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return ((0.8 * smooth + 0.2 * fine).clamp(0, 1) * 255).round().to(torch.uint8)


def drawn(
    num_images: int,
    options: CropsConfig = SMALL,
    size: tuple[int, int] = SIZE,
    seed: int = 0,
) -> Views:
    return draw_views(num_images, size, options, torch.Generator().manual_seed(seed))


def all_views(images: Tensor, views: Views, options: CropsConfig) -> list[Tensor]:
    global_views, local_views = make_views(images, views, options)
    return global_views + local_views


def slow_view(image: Tensor, views: Views, row: int, number: int, options: CropsConfig) -> Tensor:
    """One view of one image, step by step with torchvision."""
    size = options.global_size if number < 2 else options.local_size
    left, top, width, height = views.box_BV4[row, number].tolist()
    made: Tensor = one.resized_crop(
        image.float() / 255,
        top,
        left,
        height,
        width,
        [size, size],
        InterpolationMode.BICUBIC,
        antialias=True,
    ).clamp(0, 1)
    if views.flip_BV[row, number]:
        made = one.horizontal_flip(made)
    if views.jitter_BV[row, number]:
        for adjustment in views.order_BV4[row, number].tolist():
            made = ADJUST[adjustment](made, views.factor_BV4[row, number, adjustment].item())
    if views.gray_BV[row, number]:
        made = one.rgb_to_grayscale(made, 3)
    if views.blur_BV[row, number]:
        sigma = views.sigma_BV[row, number].item()
        made = one.gaussian_blur(made, [17, 17], [sigma, sigma])
    return made


def test_every_view_of_every_image_is_what_torchvision_makes() -> None:
    # Solarising is left to the next test: it tears values around 0.5 apart.
    options = with_others(BUSY, solarize_prob=(0, 0, 0))
    images, views = photos(24), drawn(24, options)
    global_views, local_views = make_views(images, views, options)
    assert (len(global_views), len(local_views)) == (2, 3)
    for number, made in enumerate(global_views + local_views):
        for row, image in enumerate(images):
            expected = one.normalize(
                slow_view(image, views, row, number, options), list(options.mean), list(options.std)
            )
            torch.testing.assert_close(made[row], expected, rtol=0, atol=1e-3)


def test_solarised_views_are_torchvisions() -> None:
    options = with_others(BUSY, mean=(0, 0, 0), std=(1, 1, 1))
    images, views = photos(24), drawn(24, options)
    chosen = views.solarize_BV
    assert chosen.any()
    assert not chosen.all()
    global_views, local_views = make_views(images, views, options)
    for number, made in enumerate(global_views + local_views):
        for row, image in enumerate(images):
            before = slow_view(image, views, row, number, options)
            expected = one.solarize(before, 0.5) if chosen[row, number] else before
            clear = (before - 0.5).abs() > 1e-4
            torch.testing.assert_close(made[row][clear], expected[clear], rtol=0, atol=1e-4)
            assert clear.float().mean() > 0.99


def test_workers_and_parts_see_what_one_worker_would_see() -> None:
    images, views = photos(12), drawn(12, BUSY)
    whole = all_views(images, views, BUSY)
    parts = [
        all_views(images[first : first + count], views.rows(first, count), BUSY)
        for first, count in ((0, 5), (5, 1), (6, 6))
    ]
    for number, made in enumerate(whole):
        together = torch.cat([part[number] for part in parts])
        torch.testing.assert_close(together, made, rtol=0, atol=1e-5)


def test_rows_of_rows_are_rows_and_the_rest_is_refused() -> None:
    views = drawn(10)
    again = views.rows(2, 6).rows(1, 3)
    assert len(again) == 3
    assert torch.equal(again.box_BV4, views.box_BV4[3:6])
    assert torch.equal(again.order_BV4, views.order_BV4[3:6])
    for first, count in ((-1, 2), (8, 3), (0, -1)):
        with pytest.raises(ValueError, match="rows must lie in"):
            views.rows(first, count)


def test_the_same_seed_draws_the_same_and_another_seed_another() -> None:
    first, again, other = drawn(8, BUSY), drawn(8, BUSY), drawn(8, BUSY, seed=1)
    for field in dataclasses.fields(Views):
        if field.name != "size":
            assert torch.equal(getattr(first, field.name), getattr(again, field.name))
            assert not torch.equal(getattr(first, field.name), getattr(other, field.name))


def numpy_state() -> list[int]:
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    key: list[int] = state["state"]["key"].tolist()
    return [*key, state["state"]["pos"]]


def test_global_generators_go_on_as_if_nothing_had_been_drawn() -> None:
    states = torch.get_rng_state(), random.getstate(), numpy_state()
    make_views(photos(3), drawn(3), SMALL)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy_state() == states[2]


def test_coins_fall_as_often_as_asked_for_in_each_view() -> None:
    options = CropsConfig(num_local=2)
    views = drawn(6000, options)
    wanted = {
        "flip_BV": [0.5] * 4,
        "jitter_BV": [0.8] * 4,
        "gray_BV": [0.2] * 4,
        "blur_BV": [1.0, 0.1, 0.5, 0.5],
        "solarize_BV": [0.0, 0.2, 0.0, 0.0],
    }
    for name, chances in wanted.items():
        found = getattr(views, name).double().mean(dim=0)
        # 4 standard deviations of the mean of 6000 fair coins are 0.026.
        torch.testing.assert_close(found, torch.tensor(chances).double(), rtol=0, atol=0.026)


def test_factors_sigmas_and_orders_fill_their_ranges() -> None:
    views = drawn(3000, with_others(CropsConfig(num_local=1), brightness=1.5))
    # A brightness below 0 is none: the lower end is cut, as in torchvision.
    ranges = [(0.0, 2.5), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    for number, (low, high) in enumerate(ranges):
        factors = views.factor_BV4[:, :, number]
        margin = 0.01 * (high - low)
        assert low <= factors.min() < low + margin
        assert high - margin < factors.max() <= high
        assert abs(factors.mean() - (low + high) / 2) < 2 * margin
    assert 0.1 <= views.sigma_BV.min() < 0.12
    assert 1.98 < views.sigma_BV.max() <= 2.0
    orders = views.order_BV4.flatten(0, 1)
    assert (orders.sort(dim=1).values == torch.arange(4)).all()
    counts = torch.tensor(list(Counter(map(tuple, orders.tolist())).values()))
    # 9000 orders over 24 possible ones: 375 each, standard deviation 19.
    assert len(counts) == 24
    assert 290 < counts.min() <= counts.max() < 460


def test_with_nothing_drawn_a_view_is_the_image() -> None:
    crops = CropsConfig(
        num_local=0, global_size=32, global_scale=(1, 1), jitter_prob=0, gray_prob=0
    )
    plain = with_others(
        crops,
        ratio=(1, 1),
        hflip=0,
        blur_prob=(0, 0, 0),
        solarize_prob=(0, 0, 0),
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    images = photos(3, (32, 32))
    global_views, local_views = make_views(images, drawn(3, plain, (32, 32)), plain)
    assert local_views == []
    for made in global_views:
        assert made.dtype == torch.float32
        torch.testing.assert_close(made * 255, images.float(), rtol=0, atol=1e-3)


def test_uint8_and_float_images_give_the_same_and_stay_as_they_were() -> None:
    images, views = photos(4), drawn(4, BUSY)
    floats = images.float()
    made = all_views(floats, views, BUSY)
    for ours, expected in zip(made, all_views(images, views, BUSY), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(floats, images.float())


def test_autocast_leaves_the_views_alone() -> None:
    images, views = photos(4), drawn(4, BUSY)
    expected, _ = make_views(images, views, BUSY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made, _ = make_views(images, views, BUSY)
    assert torch.equal(made[0], expected[0])


def test_draws_can_be_sent_to_another_process() -> None:
    views = drawn(2)
    assert torch.equal(pickle.loads(pickle.dumps(views)).sigma_BV, views.sigma_BV)


def test_views_drawn_for_other_images_are_refused() -> None:
    for images, options in (
        (photos(3), SMALL),
        (photos(2, (44, 52)), SMALL),
        (photos(2), SMALL.model_copy(update={"num_local": 2})),
    ):
        with pytest.raises(ValueError, match="images must be"):
            make_views(images, drawn(2), options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_local", -1),
        ("global_size", 0),
        ("local_scale", (0.4, 0.05)),
        ("global_scale", (0.4, 1.1)),
        ("global_scale", (0.0, 1.0)),
        ("jitter_prob", 1.5),
        ("gray_prob", float("nan")),
    ],
)
def test_options_outside_their_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"\n{name}"):
        CropsConfig.model_validate({name: value})
