"""The class token of a crop of any size is timm's own, of whole patches only."""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch

from pipeline.errors import ConfigError
from pipeline.models.backbones import build_class_tokens
from pipeline.models.checkpoints import Weights
from pipeline.models.dino_vit import ClassTokens, interpolate_positions
from pipeline.models.exported_backbone import network_of_checkpoint

TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def network() -> ClassTokens:
    torch.manual_seed(0)
    vit = timm.create_model(TINY, num_classes=0)
    return build_class_tokens(TINY, Weights(dict(vit.state_dict()), sha256="", source="test"))


def test_a_name_gives_timms_own_class_token_frozen(network: ClassTokens) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(TINY, num_classes=0).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = vit(images)
    found = network(images)
    assert (network.patch_size, network.num_features, found.shape) == (16, 192, (2, 192))
    assert not found.requires_grad
    assert wanted.std(dim=0).min() > 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(256, 170), (71, 300), (16, 31)])
def test_what_lies_beyond_the_last_whole_patch_is_not_seen(
    network: ClassTokens, size: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    rows, columns = size[0] // 16, size[1] // 16
    whole = images[:, :, : rows * 16, : columns * 16]
    assert torch.equal(network(images), network(whole))
    # timm's own forward in a network whose positions were brought to this grid before.
    other = timm.create_model(TINY, num_classes=0, img_size=(rows * 16, columns * 16)).eval()
    state = network.vit.state_dict()
    positions = interpolate_positions(state["pos_embed"], (rows, columns))
    other.load_state_dict({**state, "pos_embed": positions})
    with torch.no_grad():
        torch.testing.assert_close(network(images), other(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet50.dino", r"backbone\.name must be a ViT with a class token, got resnet50\.dino"),
        ("vit_small_patch14_reg4_dinov2", r"backbone\.name must be a ViT with a class token that"),
        ("vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
    ],
)
def test_a_network_without_such_a_token_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_class_tokens(name, None)


def test_weights_say_which_network_they_are_of_and_nobody_may_contradict(tmp_path: Path) -> None:
    file = tmp_path / "teacher.safetensors"
    assert network_of_checkpoint("a", None, default="a") == "a"
    assert network_of_checkpoint("b", str(file), default="a") == "b"
    file.write_bytes(b"weights")
    weights = {"file": file.name, "sha256": hashlib.sha256(b"weights").hexdigest()}
    described = {"patchseed": {"name": "c", "weights": weights}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert network_of_checkpoint("a", str(file), default="a") == "c"
    assert network_of_checkpoint("c", str(file), default="a") == "c"
    with pytest.raises(ConfigError, match=r"holds weights of c .*got --backbone\.name b"):
        network_of_checkpoint("b", str(file), default="a")
