"""Compute a step that diverged again, on any machine, and tell where it stops being finite.

    python -m pipeline.replay RUN/step_fault/rank_0000.pt --precision fp32

Each part runs twice, forward and backward: as in training, and in evaluation mode, without dropout
and stochastic depth (a detector draws the same regions in both). In training mode these two are
those of the step, if it is replayed on the kind of device it was trained on; else others, which is
said. Other precisions, kernels and
numbers of threads move the last digits. Not replayed: batch statistics over several workers (here
each has its own), the loss scaling of fp16, torch.compile (its kernels draw other random numbers),
and what only other workers saw: they kept a file of their own if their losses were not finite. The
running statistics of batch norm, which evaluation mode uses, are those after the step: its passes
had moved them.

The data set is not needed. To tell more about a pass: a field of ``Pass``, filled in
``replay_part``. To keep more of a step: runs/step_fault.py. Another kind of job: kinds.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import WeightsError
from pipeline.replay.kept_step import KeptPart, KeptStep
from pipeline.runs.step_fault import mapped
from pipeline.storage import one_line
from pipeline.training.loop import AUTOCAST, seed_epoch

# One screen: so many parts and names are told, the others counted.
_MOST_PARTS, _MOST_NAMES = 2, 3


def rebuild(step: KeptStep) -> nn.Module:
    """The objective, on the CPU, with the weights from before the step.

    Raises:
        ConfigError: this version cannot build the job's network.
        WeightsError: it builds another one.
    """
    objective = step.kind.build(step.job, step.parts[0].inputs, step.objective)
    try:
        objective.load_state_dict(step.objective)
    except RuntimeError as fault:
        raise WeightsError(
            f"the weights that were kept do not fit the network that this version builds "
            f"({one_line(fault, 160)}); replay with the version that trained it"
        ) from fault
    return objective


@dataclass(frozen=True)
class Pass:
    """What came out of one part in one mode."""

    losses: dict[str, float]
    first_bad: str | None
    """The first module whose output is not finite."""

    around: list[str]
    """What is known of the outputs until then, in words."""

    bad_gradients: list[str]
    """Names of the weights whose gradient is not finite; those nearest to the loss first."""

    num_gradients: int

    @property
    def is_finite(self) -> bool:
        fine = all(math.isfinite(value) for value in self.losses.values())
        return fine and self.first_bad is None and not self.bad_gradients


def replay_part(
    step: KeptStep, number: int, objective: nn.Module, precision: str, *, training: bool
) -> Pass:
    """Forward and backward of a part, on the device of ``objective``; no weight moves."""
    device = next(objective.parameters()).device
    part = step.parts[number]
    inputs = step.kind.inputs(*mapped(part.inputs, lambda kept: kept.to(device)))
    # A pass moves the running statistics of batch norm, and may spoil them.
    objective.load_state_dict(step.objective)
    _set_random_state(step, part, device)
    objective.train(training)
    objective.zero_grad(set_to_none=True)
    watch = _Watch(objective)
    dtype = AUTOCAST[precision]
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            found = step.kind.losses(objective, inputs, step.job, step.epoch)
    finally:
        watch.end()
    loss = torch.stack([*found.terms.values()]).sum() * (part.num_images / part.num_global)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: one.grad for name, one in objective.named_parameters() if one.requires_grad}
    bad = [name for name, gradient in gradients.items() if not math.isfinite(_largest(gradient))]
    told = {**found.terms, **found.values}
    losses = {name: float(value.detach()) for name, value in told.items()}
    return Pass(losses, watch.first_bad, watch.around(), bad[::-1], len(gradients))


def _set_random_state(step: KeptStep, part: KeptPart, device: torch.device) -> None:
    if part.random is None:
        seed_epoch(step.job.seed, step.epoch, step.rank)
        return
    torch.set_rng_state(part.random.cpu)
    if device.type == "cuda" and part.random.gpu is not None:
        torch.cuda.set_rng_state(part.random.gpu, device)


class _Watch:
    """Looks at what every module puts out, until ``end``."""

    def __init__(self, objective: nn.Module) -> None:
        self.first_bad: str | None = None
        self._its_input = 0.0
        self._before = "the images"
        self._largest, self._largest_from = 0.0, "nowhere"
        self._handles = [
            module.register_forward_hook(self._look(f"{name} ({type(module).__name__})"))
            for name, module in objective.named_modules()
            if name
        ]

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    def around(self) -> list[str]:
        told = [f"largest finite |output| {self._largest:.3g} from {self._largest_from}"]
        if self.first_bad is None:
            return told
        # Inputs that are not finite came from code between modules: a softmax, a sum.
        reach = f"largest |input| {self._its_input:.3g}"
        return [f"{reach}; before it came {self._before}", *told]

    def _look(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.first_bad is not None:
                return
            reach = _largest(output)
            if not math.isfinite(reach):
                self.first_bad, self._its_input = name, _largest(inputs)
            elif reach > self._largest:
                self._largest, self._largest_from = reach, name
            if self.first_bad is None:
                self._before = name

        return hook


def _tensors(value: Any) -> Iterator[Tensor]:
    """The float tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _largest(value: Any) -> float:
    """The largest magnitude in nested tensors; NaN or infinity where there is one."""
    each = [float(one.detach().abs().amax()) for one in _tensors(value)]
    return next((one for one in each if not math.isfinite(one)), max(each, default=0.0))


def replay(step: KeptStep, device: torch.device, precision: str) -> tuple[list[str], bool]:
    """A screen of lines about the step, and whether all of it is finite this time.

    Raises:
        ConfigError, WeightsError: as ``rebuild``.
    """
    objective = rebuild(step).to(device)
    same = all(_has_random_state(part, device) for part in step.parts)
    same = same or step.kind.draws_by_keys
    lines = [*_told_of_step(step), f"again on {device.type} in {precision}"]
    lines[-1] += ", with the random numbers of then" if same else ", with other random numbers"
    num_told = num_bad = 0
    for number in range(len(step.parts)):
        passes = {
            "training": replay_part(step, number, objective, precision, training=True),
            "evaluation": replay_part(step, number, objective, precision, training=False),
        }
        is_bad = not all(one.is_finite for one in passes.values())
        num_bad += is_bad
        # A step of one part is told in any case.
        if num_told < _MOST_PARTS and (is_bad or len(step.parts) == 1):
            num_told += 1
            lines += _told_of_part(step, number, passes)
    rest = len(step.parts) - num_told
    if rest:
        lines.append(f"{rest} more parts, {num_bad - num_told} of them not finite")
    verdict = "finite" if num_bad == 0 else "NOT FINITE"
    return [*lines, f"{verdict} on {device.type} in {precision}"], num_bad == 0


def _has_random_state(part: KeptPart, device: torch.device) -> bool:
    if part.random is None:
        return False
    return (part.random.gpu is not None) == (device.type == "cuda")


def _told_of_step(step: KeptStep) -> list[str]:
    reach = {name: _largest(value) for name, value in step.objective.items()}
    bad = [name for name, value in reach.items() if not math.isfinite(value)]
    largest = max((name for name in reach if name not in bad), key=reach.__getitem__, default="")
    extreme = f"; largest |weight| {reach[largest]:.3g} in {largest}" if largest else ""
    return [
        f"step {step.step} (epoch {step.epoch + 1}) of worker {step.rank} of {step.num_workers}: "
        + step.kind.described(step.job, step.epoch),
        f"trained on {step.device} in {step.job.precision} with torch {step.torch}",
        f"weights before it: {_counted(bad, len(reach))}{extreme}",
    ]


def _told_of_part(step: KeptStep, number: int, passes: Mapping[str, Pass]) -> list[str]:
    part = step.parts[number]
    # Of each field, but of those without floats (pairs of positions).
    reach = " ".join(
        f"{name}={_largest(value):.3g}"
        for name, value in part.inputs._asdict().items()
        if any(True for _ in _tensors(value))
    )
    lines = [
        f"part {number + 1} of {len(step.parts)}: {part.num_images} images, largest |input| of "
        f"{reach}",
        f"  then: {_numbers(part.losses)}",
    ]
    found: list[tuple[str | None, list[str]]] = []
    for mode, one in passes.items():
        lines.append(f"  in {mode} mode: {_numbers(one.losses)}")
        found.append((one.first_bad, one.bad_gradients))
        if found[0] == found[-1] and len(found) > 1:
            lines.append("    outputs and gradients: likewise")
            continue
        lines.append(f"    first output not finite: {one.first_bad or 'none'}")
        lines += [f"      {line}" for line in one.around]
        lines.append(f"    gradients: {_counted(one.bad_gradients, one.num_gradients)}")
    return lines


def _numbers(values: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in values.items())


def _counted(bad: Sequence[str], total: int) -> str:
    if not bad:
        return f"all {total} finite"
    more = f" and {len(bad) - _MOST_NAMES} more" if len(bad) > _MOST_NAMES else ""
    return f"{len(bad)} of {total} not finite: {', '.join(bad[:_MOST_NAMES])}{more}"
