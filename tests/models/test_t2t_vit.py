"""T2T-ViT: the published sizes, and its own arithmetic against slow loops."""

import math

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from pipeline.errors import ConfigError
from pipeline.models.t2t_vit import (
    PUBLISHED_SCALE,
    Attention,
    T2tLayout,
    TokenPerformer,
    linear_attention,
    sinusoid_table,
    soft_split,
    t2t_vit_14,
)

SMALL = T2tLayout(token_dim=8, dim=16, depth=2, heads=2)


def num_parameters(network: nn.Module, *, trainable: bool | None = None) -> int:
    return sum(
        parameter.numel()
        for parameter in network.parameters()
        if trainable is None or parameter.requires_grad == trainable
    )


@pytest.mark.parametrize(
    ("num_classes", "expected", "trained"),
    [
        (1000, 21_545_550, 21_465_806),
        (100, 21_199_050, 21_119_306),
        (10, 21_164_400, 21_084_656),
    ],
)
def test_parameters_are_as_many_as_published(num_classes: int, expected: int, trained: int) -> None:
    with torch.device("meta"):
        network = t2t_vit_14(num_classes)
    assert num_parameters(network) == expected
    assert num_parameters(network, trainable=True) == trained
    assert num_parameters(network, trainable=False) == 79_744


def test_performers_and_blocks_are_as_large_as_published() -> None:
    with torch.device("meta"):
        network = t2t_vit_14(1000)
    performers = [network.tokens_to_token.attention1, network.tokens_to_token.attention2]
    assert [num_parameters(performer) for performer in performers] == [43_366, 126_592]
    assert num_parameters(network.blocks[0]) == 1_478_016
    assert num_parameters(network.tokens_to_token.project) == 221_568


def slow_linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, directions: torch.Tensor
) -> torch.Tensor:
    """Query by query, with the matrix of kernel values that linear attention never makes."""
    num_features = len(directions)

    def feature(token: torch.Tensor, direction: torch.Tensor) -> float:
        product = sum(a * b for a, b in zip(token.tolist(), direction.tolist(), strict=True))
        half_norm = sum(a * a for a in token.tolist()) / 2
        return math.exp(product - half_norm) / math.sqrt(num_features)

    found = torch.zeros(len(query), value.shape[1], dtype=torch.float64)
    for index, one in enumerate(query):
        kernel = [
            sum(feature(one, direction) * feature(other, direction) for direction in directions)
            for other in key
        ]
        for weight, vector in zip(kernel, value, strict=True):
            found[index] += weight * vector
        found[index] /= sum(kernel) + 1e-8
    return found.float()


def test_linear_attention_equals_the_slow_loop() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    value, directions = torch.randn(2, 5, 4), torch.randn(3, 4)
    found = linear_attention(query, key, value, directions)
    for image in range(2):
        expected = slow_linear_attention(query[image], key[image], value[image], directions)
        torch.testing.assert_close(found[image], expected, atol=1e-5, rtol=1e-5)


def test_random_features_estimate_the_softmax_kernel() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 6, 4) * 0.7 for _ in range(3))
    found = linear_attention(query, key, value, torch.randn(200_000, 4))
    expected = torch.softmax(query @ key.transpose(1, 2), dim=-1) @ value
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_linear_attention_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 7, 8) * 2 for _ in range(3))
    directions = torch.randn(4, 8)
    expected = linear_attention(query, key, value, directions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_attention(query, key, value, directions)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_directions_are_orthogonal_frozen_and_as_long_as_published() -> None:
    performer = TokenPerformer(147, 64, dropout=0.1)
    expected = torch.eye(32) * 32
    torch.testing.assert_close(performer.w @ performer.w.T, expected, atol=1e-3, rtol=1e-3)
    assert not performer.w.requires_grad


def test_a_performer_splits_keys_queries_and_values_in_that_order() -> None:
    torch.manual_seed(0)
    performer = TokenPerformer(6, 4, dropout=0.1).eval()
    tokens = torch.randn(2, 5, 6)
    normed = torch.nn.functional.layer_norm(tokens, (6,))
    key, query, value = (
        normed @ performer.kqv.weight[part].T + performer.kqv.bias[part]
        for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    )
    narrow = value + performer.proj(linear_attention(query, key, value, performer.w))
    expected = narrow + performer.mlp(performer.norm2(narrow))
    torch.testing.assert_close(performer(tokens), expected)


def test_soft_split_gives_each_neighbourhood_of_padded_pixels() -> None:
    image = torch.randn(1, 2, 6, 9)
    tokens, grid = soft_split(image, kernel=3, stride=2, padding=1)
    assert grid == (3, 5)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    for row in range(3):
        for column in range(5):
            expected = padded[0, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            assert torch.equal(tokens[0, row * 5 + column], expected.flatten())


def test_positions_are_sinusoids_of_the_tokens_number() -> None:
    table = sinusoid_table(7, 6)[0]
    for position in range(7):
        for channel in range(6):
            angle = position / 10000 ** (2 * (channel // 2) / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[position, channel].item() == pytest.approx(expected, abs=1e-6)


def test_positions_are_made_for_the_grid_and_never_trained() -> None:
    network = t2t_vit_14(5, SMALL, image_size=(64, 96))
    assert network.grid == (4, 6)
    assert network.pos_embed.shape == (1, 25, 16)
    assert not network.pos_embed.requires_grad
    _, last = network.forward_stages(torch.randn(2, 3, 64, 96), (1,))
    assert last.shape == (2, 16, 4, 6)


def test_images_of_another_size_are_refused() -> None:
    network = t2t_vit_14(5, SMALL, image_size=(64, 64))
    with pytest.raises(ValueError, match="4 x 6"):
        network(torch.randn(1, 3, 64, 96))


def test_attention_applies_the_scale_it_is_given() -> None:
    torch.manual_seed(0)
    attention = Attention(8, heads=2)
    tokens = torch.randn(1, 5, 8) * 3
    query, key, value = attention.qkv(tokens)[0].chunk(3, dim=-1)
    for scale in (0.5, 8**-0.5):
        heads = [
            torch.softmax(query[:, part] @ key[:, part].T * scale, dim=-1) @ value[:, part]
            for part in (slice(0, 4), slice(4, 8))
        ]
        expected = attention.proj(torch.cat(heads, dim=-1))
        found = attention(tokens, torch.tensor(scale))[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_from_scratch_the_scale_is_a_heads_and_it_travels_with_the_weights() -> None:
    with torch.device("meta"):
        assert "attention_scale" in t2t_vit_14(10).state_dict()
    first, second = (t2t_vit_14(5, SMALL, image_size=(32, 32)).eval() for _ in range(2))
    assert first.attention_scale.item() == pytest.approx(8**-0.5)
    first.attention_scale.fill_(2.0)
    second.load_state_dict(first.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(images), second(images))
    assert pytest.approx(0.0510310) == PUBLISHED_SCALE


def test_drop_path_rises_over_all_blocks() -> None:
    network = t2t_vit_14(5, SMALL, image_size=(32, 32), drop_path=0.2)
    rates = [module.p for module in network.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0, 0.2])


def test_layouts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 entries"):
        T2tLayout(strides=(4, 2))
    with pytest.raises(ConfigError, match="multiple"):
        T2tLayout(dim=50, heads=6)
