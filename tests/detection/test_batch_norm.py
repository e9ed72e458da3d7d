"""Several workers normalise as one would, and evaluation as the whole training data would."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.detection.batch_norm import PooledBatchNorm2d, fused, precise_bn
from pipeline.detection.detector import build_detector, default_options
from pipeline.training.workers import Workers
from tests.detection.toy import pictures
from tests.training.two_workers import TwoWorkers


@dataclass
class Step:
    """What one forward and backward pass leaves."""

    outputs: Tensor
    input_gradient: Tensor
    weight_gradients: list[Tensor]
    statistics: list[Tensor]


def values() -> tuple[Tensor, Tensor]:
    """Six images with channels far from 0, and what the loss multiplies the outputs by."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 10.0, 0.1])[None, :, None, None]
    centre = torch.tensor([0.0, 500.0, -3.0])[None, :, None, None]
    images = torch.randn(6, 3, 5, 4, generator=generator) * spread + centre
    return images, torch.randn(6, 3, 5, 4, generator=generator)


def step(norm: nn.Module, images: Tensor, factors: Tensor) -> Step:
    torch.nn.init.constant_(norm.weight, 1.5)  # type: ignore[arg-type]
    torch.nn.init.constant_(norm.bias, -0.5)  # type: ignore[arg-type]
    images = images.clone().requires_grad_()
    outputs = norm(images)
    (outputs * factors + outputs.square() * 0.1).sum().backward()
    gradients = [weight.grad for weight in norm.parameters() if weight.grad is not None]
    assert images.grad is not None
    return Step(outputs.detach(), images.grad, gradients, [one.clone() for one in norm.buffers()])


# Uneven on purpose; the last with nothing at all on one of the workers.
DIVISIONS = [3, 1, 6]


def step_of_worker(workers: Workers, first: int) -> Step:
    images, factors = values()
    mine = slice(0, first) if workers.is_first else slice(first, None)
    return step(PooledBatchNorm2d(3), images[mine], factors[mine])


@pytest.mark.parametrize("first", DIVISIONS)
def test_two_workers_normalise_and_learn_as_one(pair: TwoWorkers, first: int) -> None:
    whole = step(nn.BatchNorm2d(3), *values())
    parts: list[Step] = pair.run(step_of_worker, first)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-4}
    torch.testing.assert_close(torch.cat([one.outputs for one in parts]), whole.outputs, **close)
    torch.testing.assert_close(
        torch.cat([one.input_gradient for one in parts]), whole.input_gradient, **close
    )
    for mine, theirs, expected in zip(
        parts[0].weight_gradients, parts[1].weight_gradients, whole.weight_gradients, strict=True
    ):
        # Summed, as the training loop does with all gradients.
        torch.testing.assert_close(mine + theirs, expected, **close)
    for part in parts:
        torch.testing.assert_close(part.statistics, whole.statistics, rtol=1e-5, atol=1e-6)


def bfloat16_of_worker(workers: Workers) -> tuple[Tensor, torch.dtype]:
    images, _ = values()
    norm = PooledBatchNorm2d(3)
    out = norm(images.chunk(2)[workers.rank].bfloat16())
    return norm.running_mean, out.dtype  # type: ignore[return-value]


def test_statistics_of_bfloat16_are_taken_in_float32(pair: TwoWorkers) -> None:
    images, _ = values()
    expected = nn.BatchNorm2d(3)
    expected(images.bfloat16().float())
    for running_mean, dtype in pair.run(bfloat16_of_worker):
        assert dtype == torch.bfloat16
        torch.testing.assert_close(running_mean, expected.running_mean)


def test_alone_and_in_evaluation_it_is_plain_batch_norm() -> None:
    images, factors = values()
    pooled, plain = (
        step(PooledBatchNorm2d(3), images, factors),
        step(nn.BatchNorm2d(3), images, factors),
    )
    assert torch.equal(pooled.outputs, plain.outputs)
    assert torch.equal(pooled.input_gradient, plain.input_gradient)
    norm = PooledBatchNorm2d(3)
    norm.eval()
    torch.testing.assert_close(norm(images), images, rtol=1e-4, atol=1e-4)


class OneNorm(nn.Module):
    """Looks like a detector to ``precise_bn``."""

    def __init__(self, kind: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = kind(3)
        self.norm.momentum = 0.25  # type: ignore[assignment]

    def forward(self, images: list[Tensor], targets: object) -> None:
        assert self.training
        assert not torch.is_grad_enabled()
        self.norm(torch.stack(images))


def batches() -> list[Any]:
    images, _ = values()
    # Means of batches that differ: what an average of variances alone would not see.
    images = images + torch.arange(6)[:, None, None, None]
    return [(list(pair), []) for pair in torch.split(images, 2)]


def test_precise_statistics_are_those_of_all_batches_together() -> None:
    detector = OneNorm().eval()
    assert precise_bn(detector, batches(), 200) == 3
    together = torch.cat([torch.stack(images) for images, _ in batches()]).double()
    mean, variance = together.mean((0, 2, 3)), together.var((0, 2, 3), correction=0)
    torch.testing.assert_close(detector.norm.running_mean, mean.float())
    torch.testing.assert_close(detector.norm.running_var, variance.float(), rtol=1e-5, atol=1e-5)
    assert not detector.training
    assert not detector.norm.training
    assert detector.norm.momentum == 0.25


def test_no_more_batches_are_used_than_asked_for() -> None:
    one, two = OneNorm(), OneNorm()
    assert precise_bn(one, iter(batches()), 1) == 1
    precise_bn(two, batches()[:1], 9)
    assert torch.equal(one.norm.running_mean, two.norm.running_mean)  # type: ignore[arg-type]


def test_without_batches_nothing_is_changed() -> None:
    detector = OneNorm().eval()
    with pytest.raises(ValueError, match="at least one batch"):
        precise_bn(detector, [], 5)
    assert detector.norm.running_mean.tolist() == [0, 0, 0]  # type: ignore[operator]
    assert not detector.training


def precise_of_worker(workers: Workers, kind: type[nn.Module]) -> list[Tensor]:
    detector = OneNorm(kind)
    assert precise_bn(detector, batches()[workers.rank : workers.rank + 1], 5) == 2
    return [detector.norm.running_mean, detector.norm.running_var]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, PooledBatchNorm2d])
def test_precise_statistics_are_those_of_all_workers(
    pair: TwoWorkers, kind: type[nn.Module]
) -> None:
    alone = OneNorm()
    precise_bn(alone, batches()[:2], 5)
    for found in pair.run(precise_of_worker, kind):
        expected = [alone.norm.running_mean, alone.norm.running_var]
        torch.testing.assert_close(found, expected)


def test_a_detectors_frozen_norms_and_weights_stay_and_the_others_settle() -> None:
    torch.manual_seed(0)
    detector = build_detector(default_options("nano", freeze_at=2))
    before = {name: one.clone() for name, one in detector.state_dict().items()}
    data = pictures(4, 3, side=64)
    taken = [([image], [target]) for image, target in data]
    precise_bn(detector, taken, 4)
    changed = {
        name for name, one in detector.state_dict().items() if not torch.equal(one, before[name])
    }
    norms = {
        f"{name}.{kind}"
        for name, part in detector.named_modules()
        if isinstance(part, nn.BatchNorm2d)
        for kind in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert changed == norms
    assert not any(name.startswith(("backbone.bn1", "backbone.layer1")) for name in changed)


def gradient_of(network: nn.Module, conv: nn.Conv2d, part: slice) -> Tensor:
    _, noise_B3HW = values()
    factors = noise_B3HW.roll(1, dims=0)
    (network(noise_B3HW[part]) * factors[part]).sum().backward()
    assert conv.weight.grad is not None
    return conv.weight.grad


def gradient_under_ddp(workers: Workers) -> Tensor:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 1)
    shared = nn.parallel.DistributedDataParallel(nn.Sequential(conv, PooledBatchNorm2d(3)))
    return gradient_of(shared, conv, slice(0, 4) if workers.is_first else slice(4, 6))


def test_workers_on_cpus_share_a_network_that_pools(pair: TwoWorkers) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 1)
    expected = gradient_of(nn.Sequential(conv, nn.BatchNorm2d(3)), conv, slice(None))
    for gradient in pair.run(gradient_under_ddp):
        # DDP takes the mean over the workers.
        torch.testing.assert_close(2 * gradient, expected, rtol=1e-4, atol=1e-4)


def test_torchs_own_pooling_takes_over_weights_statistics_and_their_names() -> None:
    torch.manual_seed(0)
    detector = build_detector(default_options("nano", norm="pooled"))
    names = {name for name, one in detector.named_modules() if type(one) is PooledBatchNorm2d}
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    weights = [id(weight) for weight in detector.parameters()]
    fused(detector)
    made = {name for name, one in detector.named_modules() if type(one) is nn.SyncBatchNorm}
    assert made == names != set()
    assert [id(weight) for weight in detector.parameters()] == weights
    torch.testing.assert_close(dict(detector.state_dict()), before, rtol=0, atol=0)
