"""Names to networks; random weights where they will do, a real ViT-Ti where it is there."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import ConfigError, WeightsError
from pipeline.models.backbones import build_backbone, load_weights
from pipeline.models.checkpoints import Weights
from pipeline.models.dino_vit import ViTFeatures
from pipeline.models.feature_maps import ConvFeatures
from pipeline.models.features import PatchFeatures
from pipeline.models.published_weights import published_normalization

TINY = "vit_tiny_patch16_224"


def weights_of(network: nn.Module, source: str = "test") -> Weights:
    return Weights(dict(network.state_dict()), sha256="", source=source)


def tokens(name: str, images: Tensor, weights: Weights | None = None, **options: Any) -> Tensor:
    features: PatchFeatures = build_backbone(name, weights, **options)(images)
    return features.tokens_BHWD


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(TINY, num_classes=0)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "patch_size", "width"),
    [
        ("vit_small_patch16_224.dino", 16, 384),
        ("vit_small_patch8_224.dino", 8, 384),
        ("vit_small_patch8_224.dino_300ep", 8, 384),
        (TINY, 16, 192),
        ("vit_small_patch14_reg4_dinov2", 14, 384),
        ("deit_tiny_distilled_patch16_224", 16, 192),
        ("resnet50.dino", 16, 2048),
        ("resnet50.tv_in1k", 16, 2048),
        ("vgg16.tv_in1k", 16, 512),
    ],
)
def test_names_give_frozen_networks_of_the_promised_shape(
    name: str, patch_size: int, width: int
) -> None:
    extractor = build_backbone(name, None)
    features = extractor(torch.randn(1, 3, 3 * patch_size, 5 * patch_size))
    assert features.stride == extractor.patch_size == patch_size
    assert features.tokens_BHWD.shape == (1, 3, 5, width)
    assert features.tokens_BHWD.isfinite().all()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


@pytest.mark.parametrize("name", ["vit_base_patch16_224.dino", "vit_base_patch8_224.dino"])
def test_the_base_vits_are_known(name: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pth")
    with pytest.raises(WeightsError, match="missing"):
        load_weights(name, missing)


def test_real_weights_give_what_a_hook_on_the_full_network_gives(vit_tiny_weights: Path) -> None:
    network: Any = timm.create_model(TINY)
    network.load_state_dict(load_file(vit_tiny_weights))
    caught: list[Tensor] = []
    network.blocks[-1].attn.qkv.register_forward_hook(lambda *args: caught.append(args[2]))
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        network.eval()(images)
    weights = load_weights(TINY, str(vit_tiny_weights))
    for index, feature in enumerate(("query", "key", "value")):
        expected = caught[0][:, 1:].chunk(3, dim=-1)[index].reshape(2, 14, 14, 192)
        found = tokens(TINY, images, weights, feature=feature)
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_weights_carry_the_files_sha256_and_path(tmp_path: Path, tiny: nn.Module) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(tiny.state_dict(), path)
    weights = load_weights(TINY, str(path))
    assert weights.source == str(path)
    assert len(weights.sha256) == 64
    assert "state_dict" not in repr(weights)


def test_the_weights_given_are_the_weights_used(tiny: nn.Module) -> None:
    images = torch.randn(1, 3, 32, 48)
    first, second = (tokens(TINY, images, weights_of(tiny)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, tokens(TINY, images))


def test_middle_blocks_and_features_are_passed_on(tiny: nn.Module) -> None:
    images = torch.randn(1, 3, 32, 32)
    extractor = build_backbone(TINY, weights_of(tiny), feature="value", block=5)
    assert isinstance(extractor, ViTFeatures)
    assert len(extractor.blocks) == 5
    key = tokens(TINY, images, weights_of(tiny), block=5)
    assert not torch.equal(extractor(images).tokens_BHWD, key)


def test_torchvision_names_of_resnet50_fit_and_the_last_stage_is_dilated() -> None:
    network: nn.Module = timm.create_model("resnet50")
    extractor = build_backbone("resnet50.dino", weights_of(network))
    assert isinstance(extractor, ConvFeatures)
    dilated = [
        name
        for name, module in extractor.named_modules()
        if isinstance(module, nn.Conv2d) and module.dilation == (2, 2)
    ]
    assert dilated == [f"network.layer4.{block}.conv2" for block in (1, 2)]


@pytest.mark.parametrize("name", ["resnet50.dino", "resnet50.tv_in1k"])
def test_resnet50_equals_torchvisions_under_losts_layer_norm(name: str) -> None:
    torch.manual_seed(0)
    dilate = [False, False, True]
    network: Any = torchvision.models.resnet50(replace_stride_with_dilation=dilate)
    images = torch.randn(2, 3, 48, 80)
    found = tokens(name, images, weights_of(network))
    body = nn.Sequential(*list(network.children())[:-2]).eval()
    with torch.inference_mode():
        for image, found_HWD in zip(images, found, strict=True):
            map_1DHW = body(image[None])
            reference = map_1DHW.flatten(2).transpose(1, 2)
            expected = nn.LayerNorm(reference.shape[1:])(reference).reshape(3, 5, 2048)
            assert torch.allclose(found_HWD, expected, atol=1e-4)


def test_vgg16_takes_a_file_with_its_classifier() -> None:
    extractor = build_backbone("vgg16.tv_in1k", None)
    state = {key.removeprefix("network."): value for key, value in extractor.state_dict().items()}
    state |= {"classifier.0.weight": torch.ones(2, 2), "pre_logits.fc1.weight": torch.ones(2, 2)}
    images = torch.randn(1, 3, 32, 32)
    found = tokens("vgg16.tv_in1k", images, Weights(state, "", "test"))
    assert torch.equal(found, extractor(images).tokens_BHWD)


def test_official_dinov2_names_are_translated() -> None:
    name = "vit_small_patch14_reg4_dinov2"
    network: nn.Module = timm.create_model(name, num_classes=0)
    ours = dict(network.state_dict())
    official = {**ours, "mask_token": torch.zeros(1, 384)}
    official["register_tokens"] = official.pop("reg_token")
    class_position = torch.randn(1, 1, 384)
    official["cls_token"] = ours["cls_token"] - class_position
    official["pos_embed"] = torch.cat([class_position, ours["pos_embed"]], dim=1)
    images = torch.randn(1, 3, 28, 42)
    found = tokens(name, images, Weights(official, "", "test"))
    assert torch.allclose(found, tokens(name, images, Weights(ours, "", "test")), atol=1e-5)


@pytest.mark.parametrize(
    ("found", "wanted", "told"),
    [
        (
            "vit_small_patch16_224",
            "vit_small_patch8_224.dino",
            "patches are 16 pixels wide, the network's 8",
        ),
        (
            "vit_small_patch14_dinov2",
            "vit_small_patch16_224.dino",
            "patches are 14 pixels wide, the network's 16",
        ),
        (
            "vit_small_patch16_224",
            "vit_small_patch14_dinov2",
            "patches are 16 pixels wide, the network's 14",
        ),
        (
            "vit_small_patch16_224",
            TINY,
            r"of another shape \(cls_token expected \(1, 1, 192\) found \(1, 1, 384\)",
        ),
        (
            "vit_small_patch16_384",
            "vit_small_patch16_224.dino",
            r"pos_embed expected \(1, 197, 384\) found \(1, 577, 384\)",
        ),
        ("resnet50", TINY, r"152 missing|150 missing"),
        (TINY, "resnet50.tv_in1k", r"\d+ missing \(bn1.bias.*\d+ unexpected \(blocks"),
    ],
)
def test_weights_of_another_network_are_refused_in_words(
    found: str, wanted: str, told: str
) -> None:
    weights = weights_of(timm.create_model(found), source="file.pth")
    with pytest.raises(WeightsError, match=told) as caught:
        build_backbone(wanted, weights)
    assert str(caught.value).startswith("file.pth does not fit the network")
    assert "\n" not in str(caught.value)


def test_missing_keys_are_told_by_number_and_name(tiny: nn.Module) -> None:
    state = {key: value for key, value in tiny.state_dict().items() if "blocks.11.attn" not in key}
    with pytest.raises(WeightsError, match=r"4 missing \(blocks\.11\.attn\.proj\.bias, "):
        build_backbone(TINY, Weights(state, "", "file.pth"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_small_patch16_224.dyno", r"did you mean .*vit_small_patch16_224\.dino"),
        ("vit_smal_patch8_224.dino", r"did you mean .*vit_small_patch8_224\.dino"),
        ("resnet50.dion", r"did you mean .*resnet50\.dino"),
        ("vit_small_patch8_224.dino_300", r"vit_small_patch8_224\.dino_300ep"),
        ("", "timm.list_models"),
        ("hf_hub:someone/network", "backbone.name must be"),
        ("%", "timm.list_models"),
    ],
)
@pytest.mark.parametrize("checkpoint", [None, "weights.pth"])
def test_an_unknown_name_is_refused_with_the_nearest(
    name: str, hint: str, checkpoint: str | None
) -> None:
    with pytest.raises(ConfigError, match=hint):
        load_weights(name, checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "beit_base_patch16_224",
        "eva02_base_patch14_224",
        "vit_small_patch16_rope_224.naver_in1k",
        "vit_base_patch16_rpn_224",
        "vit_small_patch16_18x2_224",
        "vit_relpos_small_patch16_224",
        "cait_s24_224",
        "vit_tiny_r_s16_p8_224",
        "resnet18.tv_in1k",
    ],
)
def test_networks_of_another_kind_are_refused_before_any_download(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"must be a plain timm ViT.*{name} is a "):
        load_weights(name, None)
    with pytest.raises(ConfigError, match="must be a plain timm ViT"):
        build_backbone(name, None)


@pytest.mark.parametrize("options", [{"feature": "value"}, {"block": 3}, {"block": 0}])
def test_settings_without_effect_on_a_cnn_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"have no effect on vgg16\.tv_in1k"):
        build_backbone("vgg16.tv_in1k", None, **options)


def test_a_network_without_published_weights_asks_for_a_file() -> None:
    name = "vit_base_patch16_gap_224"
    with pytest.raises(
        WeightsError, match=r"nobody publishes weights for .*a file \(--backbone\.checkpoint"
    ):
        load_weights(name, None)


@pytest.mark.parametrize(
    ("name", "normalization"),
    [
        ("vit_small_patch16_224.dino", "imagenet"),
        ("vit_tiny_patch16_224", "half"),
        ("resnet50.tv_in1k", "imagenet"),
        ("resnet50.dino", None),
    ],
)
def test_the_normalization_of_published_weights_is_known(
    name: str, normalization: str | None
) -> None:
    assert published_normalization(name) == normalization
