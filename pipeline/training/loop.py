"""The training loop: it knows no task, no tracker and no Ray, and gives the same numbers wherever
it runs.

    train(task, optimizer, settings, workers, start_epoch=0, on_epoch_end=save_and_tell)

A *task* (classification/task.py is one) says what a batch is and what is minimised; this file
says in which order: the learning rate, forward and backward of each part, one clipping of the whole
gradient, one step, the average of the weights. To watch a run: ``on_epoch_end`` and ``on_step``.
To train something else: write a task.

A step is the exact mean over the global batch, however it is divided: worker r's part p of n images
counts n / N_global. So accumulation, uneven slices and the number of workers change no number but
in the last digits, and a gradient is clipped once, not once a part.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.errors import TrainingDiverged
from pipeline.training.anomalies import AnomalyWatch
from pipeline.training.optim import set_learning_rate, set_weight_decay
from pipeline.training.workers import Workers

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# A loss scale below this, and gradients still not finite: it is the loss itself that is not.
_SMALLEST_SCALE = 2.0**-10


@dataclass(frozen=True)
class StepKey:
    """Which step this is; with the run's seed it decides all that is random in it."""

    epoch: int
    step: int
    """From 0 over the whole run."""


@dataclass(frozen=True)
class Losses:
    """What one part of a batch costs: the terms add up to the loss, the values are looked at."""

    terms: Mapping[str, Tensor]
    """Scalars with gradient, means over the part's images."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars without gradient, means over the part's images."""


@dataclass(frozen=True)
class Part:
    """What is computed in one go: a share of this worker's share of the global batch."""

    inputs: Any
    num_images: int
    num_global: int
    images: Sequence[str] = ()
    """What the images it is computed from are called, for people."""


class Task(Protocol):
    """What is trained on what."""

    @property
    def objective(self) -> nn.Module:
        """Holds every trainable weight; ``losses`` must call it (or its DDP wrapper) once."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of each epoch, the same on every worker."""

    def begin_epoch(self, epoch: int) -> Iterable[Any]:
        """The batches of an epoch, on this worker."""

    def parts(self, batch: Any, key: StepKey) -> Sequence[Part]:
        """The batch on the device, cut as it is to be computed."""

    def losses(self, network: nn.Module, part: Part) -> Losses:
        """The losses of a part; ``network`` is ``objective`` or a wrapper of it."""

    def constants(self, epoch: int) -> Mapping[str, float]:
        """What belongs to an epoch's numbers without being measured (lambda)."""


@dataclass(frozen=True)
class LoopSettings:
    """How the loop steps; see config.OptimConfig for what users may set."""

    num_epochs: int
    learning_rate: Callable[[int], float]
    """Of the optimiser step, from 0 over the whole run."""

    seed: int
    weight_decay: Callable[[int], float] | None = None
    """Of the optimiser step, where it changes; None leaves the groups as they were built."""

    clip: float = 0.0
    precision: str = "fp32"
    gradient_norm_steps: int = 0
    """Steps between measurements of each term's own gradient; 0 never."""

    detect_anomaly: bool = False
    """Look at every operation's gradient, slowly, so that a step that is not finite can tell where
    it began and in which images; it changes no number."""


@dataclass
class LoopState:
    """All that changes while training; with it a stopped run goes on as if it had not stopped.

    Random numbers are no part of it: each epoch draws anew from (seed, epoch, rank).
    """

    objective: nn.Module
    optimizer: Optimizer
    average: nn.Module | None
    """The averaged weights that are evaluated instead, where there are such."""

    scaler: torch.amp.GradScaler
    next_epoch: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
            "next_epoch": self.next_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what ``state_dict`` gave; the optimiser keeps its own decay and rates."""
        self.objective.load_state_dict(state["objective"])
        built = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        # The state brings its settings along; those that count are this run's.
        for group, own in zip(self.optimizer.param_groups, built, strict=True):
            group.update(own)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.scaler.load_state_dict(state["scaler"])
        self.next_epoch = int(state["next_epoch"])


@dataclass(frozen=True)
class Hooks:
    """What the outside does meanwhile; the loop waits for each."""

    on_epoch_end: Callable[[int, dict[str, float]], None]
    """After each epoch, with the means over all its images and workers."""

    on_step: Callable[[StepKey, int], None] = lambda key, num_images: None
    """After each step, with the images of the global batch: for progress."""

    before_update: Callable[[StepKey], None] = lambda key: None
    """When a step's gradient is whole and not yet clipped; what must not learn loses it here."""

    after_update: Callable[[StepKey], None] = lambda key: None
    """When the weights have moved: what follows them (a teacher) does so here."""


def train(
    task: Task, state: LoopState, settings: LoopSettings, workers: Workers, hooks: Hooks
) -> None:
    """Train ``task.objective`` from ``state.next_epoch`` to the last epoch.

    Raises:
        TrainingDiverged: a loss or a gradient is not finite; the weights are those before it.
    """
    network = _shared(task.objective, workers)
    while state.next_epoch < settings.num_epochs:
        epoch = state.next_epoch
        metrics = _epoch(task, network, state, settings, workers, hooks)
        state.next_epoch = epoch + 1
        hooks.on_epoch_end(epoch, {**metrics, **task.constants(epoch)})


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Set torch's global generators (dropout, stochastic depth) to this epoch's own beginning."""
    # A prime apart, so that neighbouring seeds, epochs and ranks do not meet.
    torch.manual_seed(((seed * 1_000_003 + epoch) * 1_000_033 + rank) % (1 << 63))


def _shared(objective: nn.Module, workers: Workers) -> nn.Module:
    """The objective, with gradients averaged over the workers."""
    if workers.size == 1:
        return objective
    on_gpu = workers.device.type == "cuda"
    return nn.parallel.DistributedDataParallel(
        objective, device_ids=[workers.device] if on_gpu else None, gradient_as_bucket_view=True
    )


def _epoch(
    task: Task,
    network: nn.Module,
    state: LoopState,
    settings: LoopSettings,
    workers: Workers,
    hooks: Hooks,
) -> dict[str, float]:
    """One pass over the data; the means of all that was measured."""
    epoch = state.next_epoch
    seed_epoch(settings.seed, epoch, workers.rank)
    network.train()
    means = _Means(workers)
    started = time.perf_counter()
    for index, batch in enumerate(task.begin_epoch(epoch)):
        key = StepKey(epoch, epoch * task.steps_per_epoch + index)
        _follow_schedules(state.optimizer, settings, key.step)
        parts = task.parts(batch, key)
        split = settings.gradient_norm_steps and key.step % settings.gradient_norm_steps == 0
        told: list[Losses] = []
        watch = AnomalyWatch() if settings.detect_anomaly else None
        for number, part in enumerate(parts):
            last = number + 1 == len(parts)
            with (
                _unsynced(network, unless=last),
                _autocast(settings.precision, workers.device),
                _remembering_calls(settings.detect_anomaly),
            ):
                losses = task.losses(network, part)
            told.append(losses)
            share = part.num_images / part.num_global
            if split and number == 0:
                means.add_norms(_norms_of_terms(losses, part, state.objective, workers))
            # DDP divides the sum of the gradients by the workers: undone here, as shares add to 1.
            loss = torch.stack([*losses.terms.values()]).sum() * (share * workers.size)
            if watch is None:
                loss = _spoilt_unless_finite(loss)
            else:
                watch.add(loss, dict(_told(losses)), part.images)
            with _unsynced(network, unless=last):
                scaled = state.scaler.scale(loss)
                scaled.backward()  # type: ignore[no-untyped-call]
            means.add(losses, part.num_images)
        if watch is not None:
            _spoil_where_watched(state.objective, watch, workers)
        hooks.before_update(key)
        norm = _step(state, settings.clip)
        if not _is_fine(norm, state.scaler):
            raise TrainingDiverged(_diverged(key, settings.precision, told, watch, workers))
        if math.isfinite(norm):
            hooks.after_update(key)
            means.add_norms({"total": norm})
        hooks.on_step(key, parts[0].num_global)
    seconds = time.perf_counter() - started
    return means.result(seconds) | {"lr": settings.learning_rate(key.step)}


def _follow_schedules(optimizer: Optimizer, settings: LoopSettings, step: int) -> None:
    set_learning_rate(optimizer, settings.learning_rate(step))
    if settings.weight_decay is not None:
        set_weight_decay(optimizer, settings.weight_decay(step))


def _step(state: LoopState, clip: float) -> float:
    """Move the weights, unless the gradient is not finite; its norm before clipping."""
    state.scaler.unscale_(state.optimizer)
    weights = [weight for weight in state.objective.parameters() if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(
        [weight.grad for weight in weights if weight.grad is not None]
    )
    # The one wait for the device in a step: a gradient that is not finite must not reach a weight.
    value = float(norm)
    if math.isfinite(value):
        if clip > 0:
            torch.nn.utils.clip_grads_with_norm_(weights, clip, norm)
        state.scaler.step(state.optimizer)
        if state.average is not None:
            state.average.update_parameters(state.objective)  # type: ignore[operator]
    # Under fp16 it remembers what unscale_ saw, and halves its scale after a step left out.
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return value


def _spoilt_unless_finite(loss: Tensor) -> Tensor:
    """The loss, with gradients of NaN where it is not finite.

    An infinite loss may have a finite gradient. So spoilt, all workers find out from the gradient
    that they share, with no further exchange and no wait.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def _spoil_where_watched(objective: nn.Module, watch: AnomalyWatch, workers: Workers) -> None:
    """The same where the gradient of an infinite loss was to be looked at: spoilt afterwards."""
    (any_spoilt,) = workers.largest([int(not watch.all_losses_finite)])
    if any_spoilt:
        for weight in objective.parameters():
            if weight.grad is not None:
                weight.grad.fill_(math.nan)


def _is_fine(norm: float, scaler: torch.amp.GradScaler) -> bool:
    # Under fp16 a scaled gradient may overflow: its step is left out, and the scale halved.
    return math.isfinite(norm) or (scaler.is_enabled() and scaler.get_scale() > _SMALLEST_SCALE)


def _diverged(
    key: StepKey,
    precision: str,
    told: Sequence[Losses],
    watch: AnomalyWatch | None,
    workers: Workers,
) -> str:
    """What is told of a step that ends the training; under a watch the same on every worker."""
    if watch is None:
        # Whatever is random follows from seed, epoch and step, so it will be the same one.
        more = "the same command with --detect-anomaly meets this step again and names its images"
        parts = [_floats(losses) for losses in told]
        worst = [losses for losses in parts if not all(map(math.isfinite, losses.values()))]
        shown: Mapping[str, float] = (worst or parts)[0]
    else:
        found = watch.first_met(workers)
        of_each = (f"worker {rank}: {one.describe()}" for rank, one in found.items())
        more = "; ".join(of_each) if workers.size > 1 else found[0].describe()
        shown = next(iter(found.values())).losses
    numbers = " ".join(f"{name}={value:g}" for name, value in shown.items())
    wider = "" if precision == "fp32" else " or use --precision fp32"
    return (
        f"loss or gradient is not finite at epoch {key.epoch + 1}, step {key.step} ({numbers}); "
        f"lower --optim.lr{wider}; {more}"
    )


def _remembering_calls(detect_anomaly: bool) -> AbstractContextManager[Any]:
    """Autograd's anomaly mode; what it would check, a ``AnomalyWatch`` does."""
    if not detect_anomaly:
        return nullcontext()
    return torch.autograd.set_detect_anomaly(True, check_nan=False)


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    kind = AUTOCAST[precision]
    return nullcontext() if kind is None else torch.autocast(device.type, dtype=kind)


def _unsynced(network: nn.Module, *, unless: bool) -> AbstractContextManager[Any]:
    """Hold gradients back from the other workers, for all parts of a batch but the last."""
    if isinstance(network, nn.parallel.DistributedDataParallel) and not unless:
        return network.no_sync()
    return nullcontext()


def _norms_of_terms(
    losses: Losses, part: Part, objective: nn.Module, workers: Workers
) -> dict[str, float]:
    """The norm of each term's own gradient, over the first parts of all workers."""
    weights = [weight for weight in objective.parameters() if weight.requires_grad]
    norms = {}
    for name, term in losses.terms.items():
        found = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        flat = torch.cat(
            [
                torch.zeros_like(weight).flatten() if one is None else one.float().flatten()
                for weight, one in zip(weights, found, strict=True)
            ]
        )
        count = torch.full((1,), part.num_images, dtype=flat.dtype, device=flat.device)
        # Workers' parts may differ by an image: each weighs by its size.
        total = workers.total(torch.cat([flat * part.num_images, count]))
        norms[name] = float((total[:-1] / total[-1]).norm())
    return norms


def _floats(losses: Losses) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in _told(losses)}


def _told(losses: Losses) -> Iterator[tuple[str, Tensor]]:
    yield from losses.terms.items()
    yield from losses.values.items()


class _Means:
    """Sums over an epoch, kept on the device: reading them once saves a wait in every step."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.sums: dict[str, Tensor] = {}
        self.num_images = 0
        self.norms: dict[str, list[float]] = {}

    def add(self, losses: Losses, num_images: int) -> None:
        for name, value in _told(losses):
            term = value.detach().double() * num_images
            self.sums[name] = self.sums[name] + term if name in self.sums else term
        self.num_images += num_images

    def add_norms(self, norms: Mapping[str, float]) -> None:
        for name, norm in norms.items():
            self.norms.setdefault(name, []).append(norm)

    def result(self, seconds: float) -> dict[str, float]:
        """The means over all workers' images; of norms, over the steps they were measured in."""
        local = {name: float(value) for name, value in self.sums.items()}
        sums = self.workers.totals({**local, "images": float(self.num_images)})
        num_images = sums.pop("images")
        means = {f"train/{name}": value / num_images for name, value in sums.items()}
        norms = {f"grad_norm/{name}": sum(of) / len(of) for name, of in self.norms.items()}
        return {**means, **norms, "train/images_per_second": num_images / seconds}
