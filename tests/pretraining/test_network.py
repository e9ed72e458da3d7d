"""What DINO trains gives timm's own class token, at the trained size and at any other."""

from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.config.pretraining import DINOConfig
from pipeline.errors import ConfigError
from pipeline.models.dino_vit import interpolate_positions
from pipeline.pretraining.network import DINONetwork

SMALL: dict[str, Any] = {
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 0,
}
HEAD = DINOConfig(out_dim=7, hidden_dim=10, bottleneck_dim=5)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"pre_norm": True},
    "layer_scale": {"init_values": 0.1},
    "query_key_norm": {"qk_norm": True},
    "no_bias": {"qkv_bias": False},
}


def small_vit(seed: int = 0, img_size: int | tuple[int, int] = 16, **options: Any) -> nn.Module:
    """A ViT none of whose weights is at 0 or 1, where a mistake could hide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit: nn.Module = VisionTransformer(img_size=img_size, **{**SMALL, **options})
        for weight in vit.parameters():
            nn.init.normal_(weight, mean=float(weight.mean() > 0.5), std=0.2)
    return vit.eval()


def network_of(vit: nn.Module) -> DINONetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return DINONetwork(vit, HEAD).eval()


def images_of(height: int, width: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, height, width, generator=generator)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_features_are_timms_class_token_at_the_trained_size(options: dict[str, Any]) -> None:
    vit = small_vit(**options)
    images = images_of(16, 16)
    with torch.no_grad():
        wanted, found = vit(images), network_of(vit).features(images)
    assert wanted.std(dim=0).min() > 1e-3
    assert (found - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("size", [(8, 8), (4, 4), (32, 32), (12, 24), (8, 32)])
def test_features_at_another_size_are_those_of_a_vit_built_for_it(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    vit: Any = small_vit(**options)
    # timm's own forward, in a network whose positions were interpolated before.
    other: Any = small_vit(seed=9, img_size=size, **options)
    grid = (size[0] // 4, size[1] // 4)
    positions = interpolate_positions(vit.pos_embed.detach(), grid)
    other.load_state_dict({**vit.state_dict(), "pos_embed": positions})
    images = images_of(*size)
    with torch.no_grad():
        wanted, found = other(images), network_of(vit).features(images)
    assert (found - wanted).abs().max() < 1e-6


def test_logits_are_the_heads_of_the_features() -> None:
    network = network_of(small_vit())
    images = images_of(16, 16)
    logits = network(images)
    assert logits.shape == (3, 7)
    assert network.num_prototypes == 7
    assert torch.equal(logits, network.head(network.features(images)))


def test_an_image_has_the_same_logits_alone_and_in_a_batch() -> None:
    network = network_of(small_vit())
    images = images_of(12, 24, count=4)
    with torch.no_grad():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 16, 24])
def test_every_weight_learns_from_images_of_any_size(size: int) -> None:
    network = network_of(small_vit())
    network(images_of(size, size)).square().sum().backward()
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            assert weight.grad.abs().max() > 0, name
    frozen = [name for name, weight in network.named_parameters() if not weight.requires_grad]
    assert frozen == ["head.last_layer.parametrizations.weight.original0"]


def test_the_backbone_is_taken_over_under_timms_names() -> None:
    vit = small_vit()
    network = network_of(vit)
    assert network.backbone is vit
    of_backbone = {name for name in network.state_dict() if not name.startswith("head.")}
    assert of_backbone == {f"backbone.{name}" for name in vit.state_dict()}


def distilled() -> nn.Module:
    vit: nn.Module = VisionTransformerDistilled(img_size=16, **SMALL)
    return vit


@pytest.mark.parametrize(
    "build",
    [
        lambda: small_vit(class_token=False, global_pool="avg"),
        lambda: small_vit(reg_tokens=2),
        lambda: small_vit(reg_tokens=2, no_embed_class=True),
        lambda: small_vit(no_embed_class=True),
        lambda: small_vit(global_pool="avg"),
        distilled,
        lambda: nn.Linear(2, 2),
    ],
    ids=["no class", "registers", "bare registers", "bare class", "mean", "distilled", "linear"],
)
def test_another_network_is_refused(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"^(model\.name must be|backbone Linear has no)"):
        DINONetwork(build(), HEAD)
