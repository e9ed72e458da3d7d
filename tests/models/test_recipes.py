"""A backbone's name brings its feature, block and normalisation; what the user says stands."""

import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config.labelling import BackboneConfig
from pipeline.models.backbones import build_backbone, with_recipe
from pipeline.models.checkpoints import Weights
from pipeline.models.dino_vit import HIGH_NORM, without_artefacts
from pipeline.models.features import FeatureExtractor

DINOV2, DINOV2_REG = "vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m"
DINOV3, DINOV3_BIAS = "vit_small_patch16_dinov3.lvd1689m", "vit_small_patch16_dinov3_qkvb.lvd1689m"


@pytest.mark.parametrize(
    ("name", "suits"),
    [
        ("vit_small_patch16_224.dino", ("key", -1, "imagenet")),
        ("vit_small_patch8_224.dino_300ep", ("key", -1, "imagenet")),
        ("vit_nano_patch8.dino", ("value", 3, "imagenet")),
        ("vit_nano_patch8", ("value", 2, "imagenet")),
        ("vit_tiny_patch16_224", ("value", 5, "half")),
        ("vit_large_patch16_224", ("value", 11, "half")),
        ("deit_small_patch16_224.fb_in1k", ("value", 5, "imagenet")),
        (DINOV2, ("key", -1, "imagenet")),
        (DINOV2_REG, ("key", -1, "imagenet")),
        (DINOV3, ("key", -1, "imagenet")),
        ("resnet50.dino", ("key", -1, "imagenet")),
        ("vgg16.tv_in1k", ("key", -1, "imagenet")),
    ],
)
def test_a_name_brings_what_suits_its_network(name: str, suits: tuple[str, int, str]) -> None:
    found = with_recipe(BackboneConfig(name=name))
    assert (found.feature, found.block, found.normalize) == suits
    assert with_recipe(found) is found


def test_what_the_user_says_stands() -> None:
    said = BackboneConfig(name="vit_tiny_patch16_224", block=7, normalize="imagenet")
    found = with_recipe(said)
    assert (found.feature, found.block, found.normalize) == ("value", 7, "imagenet")


@functools.cache
def generated(name: str, seed: int = 0) -> tuple[Any, Weights]:
    """A network of the name's shape with drawn weights, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    network: Any = timm.create_model(name.partition(".")[0], num_classes=0).eval()
    drawn = {
        key: torch.randn(value.shape, generator=generator) * 0.05 + value * (value.ndim == 1)
        for key, value in network.state_dict().items()
    }
    network.load_state_dict(drawn)
    return network, Weights(drawn, "generated", "generated")


def built(name: str, weights: Weights, **chosen: Any) -> FeatureExtractor:
    return build_backbone(name, weights, **chosen)


def by_hook(network: Any, images_B3HW: Tensor, block: int, third: int) -> Tensor:
    """What timm's own forward pass brings to the projection, projected, prefix tokens dropped."""
    kept: list[Tensor] = []
    norm1, attention = network.blocks[block].norm1, network.blocks[block].attn
    hook = norm1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.inference_mode():
        network.forward_features(images_B3HW)
    hook.remove()
    weight_DD = attention.qkv.weight.chunk(3)[third]
    bias_D = getattr(attention, ("q_bias", "k_bias", "v_bias")[third], None)
    return functional.linear(kept[0][:, network.num_prefix_tokens :], weight_DD, bias_D)


@pytest.mark.parametrize("name", [DINOV3, DINOV3_BIAS])
@pytest.mark.parametrize(
    ("feature", "third", "block"), [("query", 0, -1), ("key", 1, -1), ("value", 2, 1)]
)
def test_dinov3_features_are_those_of_timms_own_pass(
    name: str, feature: str, third: int, block: int
) -> None:
    network, weights = generated(name)
    # Not square, and not the grid it was made for.
    images_B3HW = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(1))
    extractor = built(name, weights, feature=feature, block=block)
    extractor.mend_artefacts = False  # type: ignore[assignment]
    with torch.inference_mode():
        found = extractor(images_B3HW)
    assert (found.stride, tuple(found.tokens_BHWD.shape)) == (16, (2, 3, 5, 384))
    expected = by_hook(network, images_B3HW, block, third)
    torch.testing.assert_close(found.tokens_BHWD.flatten(1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [DINOV2, DINOV2_REG])
def test_dinov2_takes_patches_of_14_and_leaves_class_and_registers_out(name: str) -> None:
    _, weights = generated(name)
    found = built(name, weights)(torch.randn(1, 3, 56, 98))
    assert (found.stride, tuple(found.tokens_BHWD.shape)) == (14, (1, 4, 7, 384))


@pytest.mark.parametrize("name", [DINOV2_REG, DINOV3])
def test_alone_is_as_in_a_batch(name: str) -> None:
    _, weights = generated(name)
    extractor = built(name, weights)
    images_B3HW = torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        together = extractor(images_B3HW).tokens_BHWD
        alone = torch.cat([extractor(one[None]).tokens_BHWD for one in images_B3HW])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def slowly_mended(patches_HWD: Tensor) -> Tensor:
    """The rule of ``without_artefacts`` in words, one patch at a time."""
    norm_HW = patches_HWD.norm(dim=-1)
    normal_HW = norm_HW <= HIGH_NORM * norm_HW.flatten().median()
    mended_HWD = patches_HWD.clone()
    for row, column in (~normal_HW).nonzero().tolist():
        around = [
            patches_HWD[y, x]
            for y in range(max(0, row - 1), min(len(patches_HWD), row + 2))
            for x in range(max(0, column - 1), min(patches_HWD.shape[1], column + 2))
            if normal_HW[y, x]
        ]
        chosen = torch.stack(around) if around else patches_HWD[normal_HW]
        mended_HWD[row, column] = chosen.mean(dim=0)
    return mended_HWD


def test_patches_of_abnormal_norm_are_the_mean_of_their_normal_neighbours() -> None:
    generator = torch.Generator().manual_seed(3)
    patches_BHWD = torch.randn(3, 6, 7, 16, generator=generator)
    patches_BHWD[0, 2, 3] *= 10  # alone
    patches_BHWD[0, 0, 0] *= 12  # in a corner
    patches_BHWD[1, 1:4, 1:4] *= 20  # its middle has no normal neighbour
    found = without_artefacts(patches_BHWD)
    torch.testing.assert_close(found, torch.stack([slowly_mended(one) for one in patches_BHWD]))
    # An image without any is left as it is.
    assert torch.equal(found[2], patches_BHWD[2])
    assert not torch.equal(found[1, 2, 2], patches_BHWD[1, 2, 2])


def test_only_dinov2_and_dinov3_are_mended() -> None:
    names = (DINOV2, DINOV3, "vit_small_patch16_224.dino", "vit_tiny_patch16_224")
    mended = [getattr(build_backbone(name, None), "mend_artefacts", None) for name in names]
    assert mended == [True, True, False, False]


def test_a_planted_artefact_does_not_reach_the_feature() -> None:
    _, weights = generated(DINOV2_REG)
    whole: Any = built(DINOV2_REG, weights)
    untouched: Any = built(DINOV2_REG, weights)
    untouched.mend_artefacts = False
    image_13HW = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(4))

    def plant(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output[:, whole.num_prefix + 10] *= 30
        return output

    clean = whole(image_13HW).tokens_BHWD.flatten(1, 2)
    for extractor in (whole, untouched):
        extractor.blocks.register_forward_hook(plant)
    mended = whole(image_13HW).tokens_BHWD.flatten(1, 2)
    left = untouched(image_13HW).tokens_BHWD.flatten(1, 2)
    others = torch.arange(mended.shape[1]) != 10
    torch.testing.assert_close(mended[:, others], clean[:, others])
    assert not torch.allclose(mended[:, 10], left[:, 10])


def test_a_described_file_of_ours_is_dinos(tmp_path: Path) -> None:
    from pipeline.models.exported_backbone import write_backbone
    from pipeline.storage import Location

    vit: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    write_backbone(
        vit.state_dict(), Location.parse(str(tmp_path)), name="vit_tiny_patch16_224", made_by={}
    )
    found = with_recipe(BackboneConfig(checkpoint=str(tmp_path / "teacher.safetensors")))
    assert (found.name, found.feature, found.block) == ("vit_tiny_patch16_224", "key", -1)
