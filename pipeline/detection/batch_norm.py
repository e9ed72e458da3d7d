"""Batch norm over all workers' images, and its population statistics for evaluation.

Shape letters:  B images or regions   C channels   H, W rows and columns
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.training.workers import current_workers

DetectorBatch: TypeAlias = tuple[Any, ...]
"""Images and their targets, as ``Detector.forward`` takes them."""

_Norm: TypeAlias = nn.BatchNorm2d | nn.SyncBatchNorm
_ALL_BUT_CHANNELS = (0, 2, 3)


class PooledBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose mean and variance are those of the global batch, on a CPU too.

    Workers count by what they hold, so any division of the batch gives the numbers of one worker.
    Alone, and in evaluation, it is plain batch norm. In training all workers must call it equally
    often. No SyncBatchNorm, because DDP refuses those on a CPU; ``fused`` makes it one on a GPU.
    """

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """``(B, C, H, W)``: normalised."""
        pools = self.training and dist.is_available() and dist.is_initialized()
        if not pools or dist.get_world_size() == 1:
            plain_BCHW: Tensor = super().forward(images_BCHW)
            return plain_BCHW
        mean_C, variance_C, count = _pooled_moments(images_BCHW.float())
        self._follow(mean_C.detach(), variance_C.detach(), count)
        scale_C = self.weight * (variance_C + self.eps).rsqrt()
        centred_BCHW = images_BCHW.float() - _spread(mean_C)
        out_BCHW = torch.addcmul(_spread(self.bias), centred_BCHW, _spread(scale_C))
        return out_BCHW.to(images_BCHW.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, variance_C: Tensor, count: Tensor) -> None:
        """Move the running statistics; their variance is the unbiased one, as in torch."""
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked or 1)
        self.running_mean.lerp_(mean_C, momentum)
        self.running_var.lerp_(variance_C * (count / (count - 1).clamp(min=1)), momentum)


def fused(detector: nn.Module) -> nn.Module:
    """The detector with torch's SyncBatchNorm, faster and for GPUs alone, where it pools.

    Changed in place; weights, statistics and their names stay.
    """
    for module in list(detector.modules()):
        for name, child in module.named_children():
            if isinstance(child, PooledBatchNorm2d):
                converted = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # type: ignore[no-untyped-call]
                setattr(module, name, converted)
    return detector


def precise_bn(detector: nn.Module, batches: Iterable[DetectorBatch], num_batches: int) -> int:
    """Set running means and variances to those of the training data: PreciseBN.

    Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3. With small batches a moving
    average follows the last few of them. This takes the mean of the batches' means, and the mean of
    their variances plus the variance of their means. Each batch counts alike, and those of all
    workers together; all must call this, with equally many batches. Frozen norms stay as they are.

    Args:
        detector: called in training mode without gradient; nothing else of it changes.
        batches: what it is called with in training, on its device.
        num_batches: of each worker at most.

    Returns:
        The number of batches used, over all workers.

    Raises:
        ValueError: there is not one batch. The detector is unchanged then.
    """
    norms = {
        module: _Moments()
        for module in detector.modules()
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.track_running_stats
    }
    num_used = 0
    with _measuring(detector, norms), torch.no_grad():
        for inputs in islice(batches, num_batches):
            detector(*inputs)
            num_used += 1
    workers = current_workers(next(detector.parameters()).device)
    total = int(workers.totals({"batches": num_used})["batches"])
    if not total:
        raise ValueError("precise_bn needs at least one batch, got none")
    for norm, moments in norms.items():
        mean_C, variance_C = moments.pooled(workers.total)
        cast(Tensor, norm.running_mean).copy_(mean_C)
        cast(Tensor, norm.running_var).copy_(variance_C)
    return total


class _Moments:
    """Sums over batches of the mean and the mean square of each channel, in double."""

    def __init__(self) -> None:
        self.sums = torch.zeros(())

    def add(self, images_BCHW: Tensor) -> None:
        """One more batch."""
        values_BCHW = images_BCHW.detach().float()
        mean_C = values_BCHW.mean(_ALL_BUT_CHANNELS).double()
        variance_C = values_BCHW.var(_ALL_BUT_CHANNELS, correction=0).double()
        batch = torch.stack([mean_C, variance_C + mean_C.square(), torch.ones_like(mean_C)])
        self.sums = self.sums.to(batch) + batch

    def pooled(self, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance of all batches; ``total`` adds up over the workers."""
        mean_sum_C, square_sum_C, count_C = total(self.sums)
        mean_C = mean_sum_C / count_C
        return mean_C, (square_sum_C / count_C - mean_C.square()).clamp(min=0)


@contextmanager
def _measuring(detector: nn.Module, norms: Mapping[_Norm, _Moments]) -> Iterator[None]:
    """The detector in training mode, its norms' inputs measured and their statistics held still."""
    modes = {module: module.training for module in detector.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    hooks = [norm.register_forward_pre_hook(_adder(moments)) for norm, moments in norms.items()]
    detector.train()
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training


def _adder(moments: _Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        moments.add(inputs[0])

    return add


def _spread(values_C: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1)


def _pooled_moments(images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (biased) variance of each channel over all workers, and the number of values."""
    here = images_BCHW.numel() // images_BCHW.shape[1]
    mean_C = images_BCHW.sum(_ALL_BUT_CHANNELS) / max(here, 1)
    deviations_C = (images_BCHW - _spread(mean_C)).square().sum(_ALL_BUT_CHANNELS)
    # In double, as these are differences of large numbers where a mean is far from 0.
    mean_C, deviations_C = mean_C.double(), deviations_C.double()
    counts_C = torch.full_like(mean_C, here)
    local = torch.stack([counts_C * mean_C, deviations_C + here * mean_C.square(), counts_C])
    sum_C, squares_C, counts_C = cast(Tensor, _SumOverWorkers.apply(local))
    mean_C = sum_C / counts_C
    variance_C = (squares_C / counts_C - mean_C.square()).clamp(min=0)
    return mean_C.float(), variance_C.float(), counts_C[0].detach()


class _SumOverWorkers(torch.autograd.Function):
    """A sum that all workers get; each one's gradient is then the sum of all workers' too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
