"""The head's layers by hand, and what it promises of its weights."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.pretraining.network import DINOHead

SMALL: dict[str, Any] = {"hidden_dim": 7, "bottleneck_dim": 5}


def build(in_dim: int = 4, out_dim: int = 6, seed: int = 0, **options: Any) -> DINOHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DINOHead(in_dim, out_dim, **(SMALL | options))


def direction_and_length(head: DINOHead) -> tuple[nn.Parameter, nn.Parameter]:
    named = dict(head.last_layer.named_parameters())
    return named["parametrizations.weight.original1"], named["parametrizations.weight.original0"]


def gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


def slow_head(head: DINOHead, features: list[float]) -> list[float]:
    """One image, one neuron at a time."""
    linears = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    x = features
    for place, linear in enumerate(linears):
        rows: Any = zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)
        x = [sum(w * v for w, v in zip(row, x, strict=True)) + bias for row, bias in rows]
        if place < len(linears) - 1:
            x = [gelu(value) for value in x]
    norm = math.sqrt(sum(value**2 for value in x))
    direction, length = direction_and_length(head)
    outputs = []
    for row, (gain,) in zip(direction.tolist(), length.tolist(), strict=True):
        size = math.sqrt(sum(w**2 for w in row))
        outputs.append(gain * sum(w / size * v / norm for w, v in zip(row, x, strict=True)))
    return outputs


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_outputs_equal_the_slow_head(num_layers: int, norm_last_layer: bool) -> None:
    head = build(num_layers=num_layers, norm_last_layer=norm_last_layer).double()
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                # As after training: biases and lengths are not what they began as.
                parameter.add_(0.3 * torch.rand_like(parameter))
    features = torch.randn(3, 4, dtype=torch.float64)
    expected = [slow_head(head, row) for row in features.tolist()]
    torch.testing.assert_close(
        head(features), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    assert sum(isinstance(layer, nn.Linear) for layer in head.mlp) == num_layers


def test_the_published_head_has_the_published_layers() -> None:
    with torch.device("meta"):
        head = DINOHead(384, 65_536)
    shapes = [tuple(layer.weight.shape) for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert shapes == [(2048, 384), (2048, 2048), (256, 2048)]
    direction, length = direction_and_length(head)
    assert direction.shape == (65_536, 256)
    assert length.shape == (65_536, 1)
    assert head.last_layer.bias is None


def test_prototypes_begin_at_length_1_and_stay_there_when_trained() -> None:
    head = build()
    assert not direction_and_length(head)[1].requires_grad
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=1.0)
    before = head.last_layer.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        head(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    after = head.last_layer.weight.detach()
    assert not torch.allclose(before, after)
    for weight in (before, after):
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(6))
    assert head(100 * torch.randn(50, 4)).abs().max() <= 1 + 1e-6


def test_lengths_are_trained_if_asked() -> None:
    head = build(norm_last_layer=False)
    length = direction_and_length(head)[1]
    assert torch.equal(length, torch.ones(6, 1))
    head(torch.randn(8, 4)).sum().backward()
    assert length.grad is not None
    assert length.grad.all()


def test_weights_are_drawn_as_promised() -> None:
    head = build(200, 300, hidden_dim=300, bottleneck_dim=100)
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert not layer.bias.any()
    # Uniform within 1 / sqrt(fan in), whose deviation is the bound over sqrt(3).
    direction = direction_and_length(head)[0]
    assert direction.abs().max() <= 0.1
    assert direction.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)


def test_every_trainable_parameter_gets_a_gradient() -> None:
    head = build()
    head(torch.randn(3, 4)).square().sum().backward()
    trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
    assert len(trainable) == 7
    assert all(p.grad is not None and p.grad.any() for p in trainable)


def test_an_image_gets_the_same_output_alone_and_in_a_batch_and_in_any_shape() -> None:
    head, features = build().double(), torch.randn(2, 3, 4, dtype=torch.float64)
    together = head(features)
    assert together.shape == (2, 3, 6)
    for view in range(2):
        for image in range(3):
            alone = head(features[view, image][None])[0]
            torch.testing.assert_close(together[view, image], alone, rtol=1e-12, atol=1e-14)


def test_a_copy_is_a_head_of_its_own() -> None:
    student, features = build(), torch.randn(2, 4)
    teacher = copy.deepcopy(student)
    before = teacher(features)
    assert torch.equal(before, student(features))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.5 * torch.rand_like(parameter))
    assert torch.equal(teacher(features), before)
    assert not torch.equal(student(features), before)
    teacher.load_state_dict(student.state_dict())
    assert torch.equal(teacher(features), student(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_0_give_outputs_of_0_under_autocast(dtype: torch.dtype) -> None:
    head = build()
    with torch.autocast("cpu", dtype=dtype):
        output: Tensor = head(torch.zeros(2, 4))
        plain = head(torch.ones(2, 4))
    assert output.dtype == dtype
    assert not output.any()
    torch.testing.assert_close(plain.float(), head(torch.ones(2, 4)), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    "name", ["in_dim", "out_dim", "num_layers", "hidden_dim", "bottleneck_dim"]
)
def test_sizes_below_1_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        build(**{name: 0})
