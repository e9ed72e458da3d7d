"""ViTFeatures against the golden outputs of LOST's code and against a full timm forward."""

import copy
import math
from typing import Any, Literal

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ConfigError
from pipeline.models.checkpoints import fit_state_dict
from pipeline.models.dino_vit import ViTFeatures, interpolate_positions
from pipeline.models.features import padded_size
from tests.conftest import ReadGolden

Feature = Literal["key", "query", "value"]
FEATURES: tuple[Feature, ...] = ("query", "key", "value")
GOLDEN_CASES = [(0, image) for image in range(5)] + [(1, image) for image in range(4)]
SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 0}

# The ways in which timm's ViTs put tokens before the patches.
PREFIXES: dict[str, dict[str, Any]] = {
    "class": {},
    "no_class": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "registers_with_positions": {"reg_tokens": 2},
    "registers_only": {"reg_tokens": 4, "class_token": False, "global_pool": "avg"},
    "clip": {"pre_norm": True},
    "layer_scale": {"init_values": 0.1, "no_embed_class": True},
    "query_key_norm": {"qk_norm": True},
    "no_bias": {"qkv_bias": False},
}


@pytest.fixture(scope="module")
def golden(read_golden: ReadGolden) -> dict[str, Any]:
    return read_golden("vit.npz")


def golden_vit(golden: dict[str, Any], config: int) -> nn.Module:
    patch, dim, depth, heads = (int(value) for value in golden[f"cfg{config}"])
    vit: nn.Module = VisionTransformer(
        patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0
    )
    prefix = f"w{config}/"
    state = {
        name.removeprefix(prefix): torch.from_numpy(array)
        for name, array in golden.items()
        if name.startswith(prefix)
    }
    fit_state_dict(vit, state, "golden")
    return vit.eval().requires_grad_(False)


def padded(image_3HW: Tensor, multiple: int) -> Tensor:
    height, width = image_3HW.shape[1:]
    rows, columns = padded_size(height, width, multiple)
    return functional.pad(image_3HW, (0, columns - width, 0, rows - height))[None]


def small_vit(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    vit: nn.Module = VisionTransformer(img_size=40, **{**SMALL, **options})
    return randomised(vit)


def randomised(vit: nn.Module) -> nn.Module:
    """Weights far from timm's initialisation: zero biases and tiny tokens would hide mistakes."""
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
    return vit.eval().requires_grad_(False)


def full_forward(vit: Any, resized: Any, images: Tensor, block: int) -> Tensor:
    """LOST's way: run everything, hook ``attn.qkv``; ``resized`` is a twin for the images' size."""
    state = vit.state_dict()
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    grid = (
        images.shape[2] // vit.patch_embed.patch_size[0],
        images.shape[3] // vit.patch_embed.patch_size[1],
    )
    state["pos_embed"] = interpolate_positions(state["pos_embed"], grid, num_prefix=prefix)
    resized.load_state_dict(state)
    caught: list[Tensor] = []
    resized.blocks[block].attn.qkv.register_forward_hook(
        lambda _module, _inputs, output: caught.append(output)
    )
    with torch.inference_mode():
        resized.eval()(images)
    patches = caught[0][:, vit.num_prefix_tokens :]
    return patches.reshape(len(images), *grid, -1)


def third(qkv_BHWD: Tensor, feature: Feature) -> Tensor:
    return qkv_BHWD.chunk(3, dim=-1)[FEATURES.index(feature)]


@pytest.mark.parametrize(("config", "image"), GOLDEN_CASES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_equal_those_of_losts_code(
    golden: dict[str, Any], config: int, image: int, feature: Feature
) -> None:
    extractor = ViTFeatures(golden_vit(golden, config), feature=feature)
    name = f"c{config}_s{image}"
    pixels = padded(torch.from_numpy(golden[f"{name}/image"]), extractor.patch_size)
    features = extractor(pixels)
    expected = torch.from_numpy(golden[f"{name}/{feature[0]}"])
    assert features.tokens_BHWD.shape[1:3] == tuple(golden[f"{name}/grid"])
    assert features.stride == extractor.patch_size
    assert (features.tokens_BHWD[0].flatten(0, 1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("config", "image"), GOLDEN_CASES)
def test_positions_equal_those_of_dinos_code(
    golden: dict[str, Any], config: int, image: int
) -> None:
    trained = torch.from_numpy(golden[f"w{config}/pos_embed"])
    rows, columns = (int(side) for side in golden[f"c{config}_s{image}/grid"])
    expected = torch.from_numpy(golden[f"c{config}_s{image}/pos"])
    found = interpolate_positions(trained, (rows, columns))
    assert (found[0] - expected).abs().max() < 1e-6


def slow_cubic(values: list[float], length: int, factor: float) -> list[float]:
    """Cubic convolution (a = -0.75) along a line, tap by tap, borders repeated."""

    def kernel(distance: float) -> float:
        a, x = -0.75, abs(distance)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    out = []
    for index in range(length):
        centre = (index + 0.5) / factor - 0.5
        first = math.floor(centre) - 1
        taps = range(first, first + 4)
        last = len(values) - 1
        out.append(sum(values[min(max(t, 0), last)] * kernel(centre - t) for t in taps))
    return out


@pytest.mark.parametrize("grid", [(3, 8), (7, 5), (11, 2), (1, 1)])
def test_positions_equal_a_slow_bicubic_with_dinos_factor(grid: tuple[int, int]) -> None:
    side, (rows, columns) = 5, grid
    trained = torch.randn(1, 1 + side * side, 2, generator=torch.Generator().manual_seed(0))
    found = interpolate_positions(trained, grid)
    for channel in range(2):
        square = trained[0, 1:, channel].reshape(side, side).tolist()
        wide = [slow_cubic(row, columns, (columns + 0.1) / side) for row in square]
        tall = [slow_cubic(list(c), rows, (rows + 0.1) / side) for c in zip(*wide, strict=True)]
        expected = torch.tensor(tall).T.flatten()
        assert torch.allclose(found[0, 1:, channel], expected, atol=1e-5)


def test_positions_of_the_trained_grid_and_of_prefix_tokens_are_untouched() -> None:
    trained = torch.randn(1, 2 + 25, 6)
    assert torch.equal(interpolate_positions(trained, (5, 5), num_prefix=2), trained)
    # As many patches, but another shape: interpolated, as in DINO.
    assert not torch.equal(interpolate_positions(trained, (1, 25), num_prefix=2), trained)
    resized = interpolate_positions(trained, (4, 7), num_prefix=2)
    assert torch.equal(resized[:, :2], trained[:, :2])


def test_positions_that_form_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="square, got 24"):
        interpolate_positions(torch.zeros(1, 25, 4), (3, 3))


@pytest.mark.parametrize("options", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("block", [0, 2, -1])
def test_every_kind_of_vit_gives_what_a_full_forward_gives(
    options: dict[str, Any], block: int
) -> None:
    vit = small_vit(**options)
    images = torch.randn(2, 3, 24, 56)
    resized = VisionTransformer(img_size=(24, 56), **{**SMALL, **options})
    expected = full_forward(vit, resized, images, block)
    for feature in FEATURES:
        found = ViTFeatures(vit, feature=feature, block=block)(images).tokens_BHWD
        assert found.shape == (2, 3, 7, 24)
        assert torch.allclose(found, third(expected, feature), atol=1e-4, rtol=1e-4)


def test_distilled_vits_drop_both_prefix_tokens() -> None:
    torch.manual_seed(0)
    vit = randomised(VisionTransformerDistilled(img_size=40, **SMALL))
    images = torch.randn(1, 3, 24, 56)
    resized = VisionTransformerDistilled(img_size=(24, 56), **SMALL)
    expected = full_forward(vit, resized, images, -1)
    found = ViTFeatures(vit)(images).tokens_BHWD
    assert torch.allclose(found, third(expected, "key"), atol=1e-4, rtol=1e-4)


def test_an_image_has_the_same_features_alone_and_in_a_batch() -> None:
    extractor = ViTFeatures(small_vit())
    images = torch.randn(5, 3, 32, 48)
    together = extractor(images).tokens_BHWD
    for index in range(5):
        alone = extractor(images[index : index + 1]).tokens_BHWD
        assert torch.allclose(together[index], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 3])
def test_nothing_behind_the_feature_is_run_or_kept(block: int) -> None:
    vit: Any = small_vit()
    ran: list[str] = []
    for name, module in vit.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    extractor = ViTFeatures(vit, block=block)
    extractor(torch.randn(1, 3, 16, 16))
    of_the_block = [name for name in ran if name.startswith(f"blocks.{block}.")]
    assert of_the_block == [f"blocks.{block}.norm1"]
    assert not [name for name in ran if name.startswith(f"blocks.{block + 1}")]
    assert len(extractor.blocks) == block
    kept = sum(parameter.numel() for parameter in extractor.parameters())
    width = 24
    needed = (
        sum(p.numel() for p in vit.patch_embed.parameters())
        + sum(p.numel() for p in vit.blocks[:block].parameters())
        + 2 * width
        + width * (width + 1)
    )
    assert kept == needed


def test_the_last_block_costs_a_third_of_its_qkv_and_no_more() -> None:
    vit: Any = small_vit(num_classes=0)
    images = torch.randn(1, 3, 40, 40)
    with FlopCounterMode(display=False) as whole:
        vit(images)
    with FlopCounterMode(display=False) as ours:
        ViTFeatures(vit)(images)
    patches, width = 25, 24
    tokens = patches + 1
    matrices = 2 * tokens * width * width * (3 + 1 + 4 + 4)
    attention = 2 * 2 * tokens * tokens * width
    feature = 2 * patches * width * width
    assert whole.get_total_flops() - ours.get_total_flops() == matrices + attention - feature


def test_cached_positions_are_bounded_and_follow_the_module() -> None:
    extractor = ViTFeatures(small_vit())
    for rows in range(1, 13):
        extractor(torch.randn(1, 3, 8 * rows, 8))
    assert len(extractor._cache) == 8
    assert extractor.positions((12, 1)) is extractor.positions((12, 1))
    doubled = copy.deepcopy(extractor).double()
    found = doubled(torch.randn(1, 3, 96, 8, dtype=torch.float64))
    assert found.tokens_BHWD.dtype == torch.float32
    assert doubled.positions((12, 1)).dtype == torch.float64


def test_bf16_autocast_gives_float32_tokens_close_to_full_precision() -> None:
    extractor = ViTFeatures(small_vit())
    images = torch.randn(2, 3, 32, 48)
    exact = extractor(images).tokens_BHWD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = extractor(images).tokens_BHWD
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("block", [4, -5, 100])
def test_a_block_that_does_not_exist_is_refused_with_the_legal_range(block: int) -> None:
    with pytest.raises(ConfigError, match=rf"backbone.block must be in \[-4, 3\].*got {block}"):
        ViTFeatures(small_vit(), block=block)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "no learned absolute positions"),
        ("beit_base_patch16_224", "no learned absolute positions"),
        ("samvit_base_patch16", "no learned absolute positions"),
        ("eva02_base_patch14_224", "rotary or relative positions"),
        ("vit_base_r50_s16_224", "no single patch convolution"),
        ("vit_small_patch16_18x2_224", "without norm1 and a fused"),
        ("convnext_tiny", "no single patch convolution"),
    ],
)
def test_networks_of_another_kind_are_refused_with_the_reason(name: str, reason: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    with pytest.raises(ConfigError, match=rf"{type(network).__name__} has .*{reason}"):
        ViTFeatures(network)
