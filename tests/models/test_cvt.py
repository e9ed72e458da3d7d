"""CvT: the published sizes, and its own arithmetic against slow loops."""

import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.cvt import (
    ChannelNorm,
    ConvProjection,
    Cvt,
    CvtLayout,
    OfficialAttention,
    PaperAttention,
    QuickGelu,
    cvt_13,
    cvt_13_paper,
)

SMALL = CvtLayout(dims=(16, 24, 32), depths=(1, 1, 2), heads=(1, 2, 4))


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("build", "num_classes", "expected"),
    [
        (cvt_13, 1000, 19_997_480),
        (cvt_13, 100, 19_650_980),
        (cvt_13, 10, 19_616_330),
        (cvt_13_paper, 1000, 19_936_296),
        (cvt_13_paper, 100, 19_589_796),
        (cvt_13_paper, 10, 19_555_146),
    ],
)
def test_parameters_are_as_many_as_published(
    build: object, num_classes: int, expected: int
) -> None:
    assert callable(build)
    with torch.device("meta"):
        assert num_parameters(build(num_classes)) == expected


def test_stages_and_blocks_are_as_large_as_published() -> None:
    with torch.device("meta"):
        official, paper = cvt_13(1000), cvt_13_paper(1000)
    stages = [num_parameters(official.get_submodule(f"stage{index}")) for index in range(3)]
    assert stages == [61_696, 1_013_568, 18_536_448]
    blocks = [num_parameters(paper.get_submodule(f"stage{index}.blocks.0")) for index in range(3)]
    assert blocks == [51_200, 448_512, 1_781_760]
    embeds = [
        num_parameters(paper.get_submodule(f"stage{index}.patch_embed")) for index in range(3)
    ]
    assert embeds == [9_600, 111_168, 664_704]


def seeded(module: nn.Module) -> nn.Module:
    """The module with all its parameters and statistics away from 0 and 1, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) * 0.6 + 0.1
    return module.eval()


def slow_projection(projection: ConvProjection, tokens_ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """Channel by channel, cell by cell; the tokens before the grid's are copied."""
    rows, columns = grid
    prefix = tokens_ND.shape[0] - rows * columns
    kernel, norm, stride = projection.conv.weight, projection.bn, projection.conv.stride[0]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    found = [tokens_ND[index] for index in range(prefix)]
    for row in range(0, rows, stride):
        for column in range(0, columns, stride):
            cell = torch.zeros(tokens_ND.shape[1])
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    y, x = row + down, column + right
                    if 0 <= y < rows and 0 <= x < columns:
                        pixel = tokens_ND[prefix + y * columns + x]
                        cell += kernel[:, 0, down + 1, right + 1] * pixel
            scaled = (cell - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            found.append(scaled * norm.weight + norm.bias)
    return torch.stack(found)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("prefix", [0, 1])
def test_projections_convolve_the_patches_and_leave_the_class_token(
    grid: tuple[int, int], stride: int, prefix: int
) -> None:
    projection = ConvProjection(3, stride)
    seeded(projection)
    tokens = torch.randn(2, prefix + grid[0] * grid[1], 3)
    with torch.no_grad():
        found = projection(tokens, grid)
        for image, one in zip(tokens, found, strict=True):
            torch.testing.assert_close(one, slow_projection(projection, image, grid))


def slow_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    """Head by head, token by token."""
    width = query.shape[1] // heads
    mixed = torch.zeros_like(query)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for index in range(len(query)):
            weights = [
                math.exp(float(query[index, part] @ other) * scale) for other in key[:, part]
            ]
            for weight, vector in zip(weights, value[:, part], strict=True):
                mixed[index, part] += weight / sum(weights) * vector
    return mixed


def test_official_attention_scales_by_the_whole_width() -> None:
    attention, grid = OfficialAttention(8, heads=2), (3, 2)
    seeded(attention)
    tokens = torch.randn(1, 1 + 6, 8)
    with torch.no_grad():
        query, key, value = (
            linear(slow_projection(projection, tokens[0], grid))
            for linear, projection in (
                (attention.proj_q, attention.conv_proj_q),
                (attention.proj_k, attention.conv_proj_k),
                (attention.proj_v, attention.conv_proj_v),
            )
        )
        expected = attention.proj(slow_attention(query, key, value, heads=2, scale=8**-0.5))
        torch.testing.assert_close(attention(tokens, grid)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_papers_attention_shares_a_convolution_and_scales_by_a_heads_width() -> None:
    attention, grid = PaperAttention(8, heads=2), (2, 4)
    seeded(attention)
    tokens = torch.randn(1, 8, 8)
    with torch.no_grad():
        query = attention.proj_q(slow_projection(attention.conv_proj_q, tokens[0], grid))
        shared = slow_projection(attention.conv_proj_kv, tokens[0], grid)
        key, value = (shared @ half.T for half in attention.proj_kv.weight.chunk(2))
        expected = attention.proj(slow_attention(query, key, value, heads=2, scale=4**-0.5))
        torch.testing.assert_close(attention(tokens, grid)[0], expected, atol=1e-5, rtol=1e-5)


def test_channel_norm_adds_eps_to_the_deviation() -> None:
    norm = ChannelNorm(4, eps=0.5)
    seeded(norm)
    token = torch.tensor([1.0, 2.0, 4.0, 9.0])
    deviation = math.sqrt(sum((value - 4) ** 2 for value in token.tolist()) / 4)
    expected = (token - 4) / (deviation + 0.5) * norm.weight + norm.bias
    torch.testing.assert_close(norm(token[None])[0], expected)


def test_channel_norm_of_a_constant_token_has_finite_gradients() -> None:
    token = torch.full((1, 4), 3.0, requires_grad=True)
    ChannelNorm(4)(token).sum().backward()
    assert token.grad is not None
    assert token.grad.isfinite().all()


def test_quick_gelu_is_a_sigmoid_gate() -> None:
    assert QuickGelu()(torch.tensor(2.0)).item() == pytest.approx(2 / (1 + math.exp(-3.404)))


@pytest.mark.parametrize("build", [cvt_13, cvt_13_paper])
def test_maps_halve_and_non_square_images_work(build: object) -> None:
    assert callable(build)
    network: Cvt = build(5, SMALL)
    features, *maps = network.eval().forward_stages(torch.randn(2, 3, 64, 96), (0, 1, 2))
    assert [tuple(one.shape) for one in maps] == [(2, 16, 16, 24), (2, 24, 8, 12), (2, 32, 4, 6)]
    assert features.shape == (2, 32)
    assert network(torch.randn(2, 3, 64, 96)).shape == (2, 5)


def test_officially_the_class_token_is_classified_and_in_the_paper_the_average() -> None:
    official, paper = cvt_13(5, SMALL).eval(), cvt_13_paper(5, SMALL).eval()
    images = torch.randn(2, 3, 32, 32)
    caught: list[tuple[Tensor, Tensor]] = []
    official.get_submodule("stage2").register_forward_hook(lambda *args: caught.append(args[2]))
    logits = official(images)
    torch.testing.assert_close(logits, official.head(official.norm(caught[0][1][:, 0])))
    _, last = paper.forward_stages(images, (2,))
    torch.testing.assert_close(paper(images), paper.head(last.mean(dim=(2, 3))))


def test_drop_path_rises_in_the_last_stage_alone() -> None:
    network = cvt_13(5, SMALL, drop_path=0.3)
    rates = [module.p for name, module in network.named_modules() if name.endswith("drop_path")]
    assert rates == pytest.approx([0, 0, 0, 0.3])


def test_layouts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="equally long"):
        CvtLayout(dims=(8, 16))
    with pytest.raises(ConfigError, match="multiples"):
        CvtLayout(dims=(64, 190, 384))
