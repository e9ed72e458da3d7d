"""Names and options to classifiers, and what cannot be built told in one line."""

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.backbones import build_model
from pipeline.models.grid_classifier import GridClassifier

SWIN = "swin_tiny_patch4_window7_224"
NARROW = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 6]}
VIT = "vit_tiny_patch16_224"


def on_meta(name: str, num_classes: int, **choices: Any) -> GridClassifier:
    with torch.device("meta"):
        return build_model(name, num_classes=num_classes, **choices)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        (SWIN, (28_288_354, 27_596_254, 27_527_044)),
        ("resnet50", (25_557_032, 23_712_932, 23_528_522)),
        ("vit_base_patch16_224", (86_567_656,)),
        ("cvt_13", (19_997_480,)),
        ("cvt_13_paper", (19_936_296,)),
        ("t2t_vit_14", (21_545_550,)),
    ],
)
def test_parameters_are_as_many_as_published(name: str, counts: tuple[int, ...]) -> None:
    for num_classes, expected in zip((1000, 100, 10), counts, strict=False):
        model = on_meta(name, num_classes)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (SWIN, (768, 7, 7)),
        ("swin_tiny_patch4_window7_224.ms_in1k", (768, 7, 7)),
        ("resnet50", (2048, 7, 7)),
        ("vit_base_patch16_224", (768, 14, 14)),
        ("cvt_13", (384, 14, 14)),
        ("cvt_13_paper", (384, 14, 14)),
        ("t2t_vit_14", (384, 14, 14)),
    ],
)
def test_grids_at_224_are_the_papers(name: str, shape: tuple[int, ...]) -> None:
    assert on_meta(name, 10).grid_shapes((224, 224)) == (shape,)


@pytest.mark.parametrize(
    ("name", "choices", "grid"),
    [
        (SWIN, {"image_size": 32, "patch_size": 1}, (4, 4)),
        (SWIN, {"image_size": 64, "patch_size": 2}, (4, 4)),
        (SWIN, {"image_size": (64, 96), "patch_size": 2}, (4, 6)),
        (VIT, {"image_size": 32, "patch_size": 4}, (8, 8)),
        (VIT, {"image_size": (32, 48), "patch_size": 4}, (8, 12)),
        ("deit_tiny_distilled_patch16_224", {"image_size": 32, "patch_size": 4}, (8, 8)),
        ("convnext_atto", {"image_size": 32, "patch_size": 1}, (4, 4)),
        ("cvt_13", {"image_size": 32, "patch_size": 2}, (4, 4)),
        ("cvt_13_paper", {"image_size": (32, 64), "patch_size": 1}, (8, 16)),
        ("t2t_vit_14", {"image_size": 32, "patch_size": 1}, (8, 8)),
        ("t2t_vit_14", {"image_size": (64, 48), "patch_size": 2}, (8, 6)),
        ("resnet18", {"image_size": 32, "patch_size": 1}, (4, 4)),
        ("resnet18", {"image_size": 64, "patch_size": 2}, (4, 4)),
        ("resnet18", {"image_size": 64, "patch_size": 4}, (2, 2)),
        ("resnet50d", {"image_size": 32, "patch_size": 1}, (4, 4)),
    ],
)
def test_finer_stems_give_grids_to_small_images(
    name: str, choices: dict[str, Any], grid: tuple[int, int]
) -> None:
    size = choices["image_size"]
    model = on_meta(name, 10, **choices)
    ((_, *found),) = model.grid_shapes((size, size) if isinstance(size, int) else size)
    assert tuple(found) == grid


def test_a_narrow_swin_at_32_px_has_a_grid_of_4_and_learns() -> None:
    options = {"embed_dim": 48, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4}
    model = build_model(SWIN, num_classes=10, image_size=32, patch_size=2, options=options)
    prediction = model(torch.randn(2, 3, 32, 32))
    assert prediction.grids[0].shape == (2, 192, 4, 4)
    prediction.logits_BK.sum().backward()
    assert windows(model) == [4, 4, 4, 4, 4, 4]


def windows(model: GridClassifier) -> list[int]:
    blocks = [module for module in model.modules() if hasattr(module, "shift_size")]
    found: list[Any] = blocks
    return [block.window_size[0] for block in found]


@pytest.mark.parametrize(
    ("image_size", "patch_size", "expected"),
    [(224, None, 7), (32, 1, 8), (64, 2, 8), (96, 4, 6), (256, 4, 8), ((64, 96), 2, 7)],
)
def test_the_window_of_a_swin_is_fitted_so_that_it_divides_the_stages(
    image_size: int, patch_size: int | None, expected: int
) -> None:
    model = on_meta(SWIN, 10, image_size=image_size, patch_size=patch_size)
    assert windows(model)[0] == expected


def test_a_resnets_fine_stem_is_one_3x3_convolution_without_pooling() -> None:
    network: Any = build_model("resnet18", num_classes=5, image_size=32, patch_size=1).network
    assert network.conv1.kernel_size == (3, 3)
    assert network.conv1.stride == (1, 1)
    assert isinstance(network.maxpool, nn.Identity)
    # As timm initialises its own: fan-out.
    assert network.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_drop_path_reaches_the_last_block() -> None:
    swin: Any = on_meta(SWIN, 10, drop_path=0.3).network
    assert swin.layers[-1].blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    none: Any = on_meta(SWIN, 10, drop_path=0.0).network
    assert isinstance(none.layers[-1].blocks[-1].drop_path1, nn.Identity)
    t2t: Any = on_meta("t2t_vit_14", 10, drop_path=0.3).network
    assert t2t.blocks[-1].drop_path.p == pytest.approx(0.3)
    assert on_meta("vgg11", 10, drop_path=0.0, image_size=64)


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("swin_tny_patch4_window7_224", {}, "did you mean swin_tiny_patch4_window7_224"),
        ("cvt13", {}, "cvt_13"),
        ("vit_tiny_patch16_224.nobody", {}, "did you mean vit_tiny_patch16_224"),
        (SWIN, {"image_size": 32}, "1 x 1 .* model.patch_size"),
        ("resnet18", {"image_size": 32}, "1 x 1"),
        ("cvt_13", {"image_size": 16}, "1 x 1"),
        ("t2t_vit_14", {"image_size": 2}, "too small|1 x 1"),
        (VIT, {"image_size": 40}, "multiple of its model.patch_size"),
        (SWIN, {"image_size": 32, "patch_size": 3}, "multiple"),
        ("regnety_002", {"patch_size": 2}, "no effect on regnety_002"),
        ("resnet18", {"patch_size": 3}, "1, 2 or 4"),
        ("cvt_13", {"patch_size": 8}, r"\[1, 4\]"),
        (SWIN, {"patch_size": 0}, "at least 1"),
        (SWIN, {"image_size": 0}, "at least 1"),
        (SWIN, {"drop_path": 1.0}, r"\[0, 1\)"),
        ("vgg11", {"drop_path": 0.1}, "no effect on vgg11"),
        (SWIN, {"options": {"depht": [2]}}, "depths.*got depht"),
        (SWIN, {"options": {"img_size": 64}}, "model.image_size"),
        (SWIN, {"options": {"depths": "many"}}, "cannot be built"),
        ("resnet18", {"options": {"num_classes": 3}}, "the data's classes"),
        ("cvt_13", {"options": {"depht": [2]}}, "depths, dims.*got depht"),
        ("cvt_13", {"options": {"depths": 2}}, "lists"),
        ("t2t_vit_14", {"options": {"dim": 50}}, "multiple"),
    ],
)
def test_impossible_wishes_are_one_line_with_the_remedy(
    name: str, choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        on_meta(name, 10, **choices)
    assert "\n" not in str(caught.value)


def test_one_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 classes"):
        build_model("cvt_13", num_classes=1)


def test_building_is_repeatable_under_a_seed() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model(SWIN, num_classes=4, image_size=64, options=NARROW).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
