"""A step that diverged, kept with all that it was computed from (replay.py computes it again).

What is kept: what each part was computed from (the images after augmentation, the mixed labels and
the pairs; or the crops), all weights and buffers, the job's settings, and, where
``remember_random_states`` was called, torch's random states before each forward pass. Tensors and
plain values alone: loading such a file runs nothing.

To keep more: a key in ``_content`` or ``_plain``, a field of ``KeptStep`` or ``KeptPart``, and
another ``_VERSION`` if old files cannot do without it. Another kind of job: replayed_kinds.py.
"""

import io
import math
import pickle
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.config import TrainingJob
from pipeline.errors import StorageError, WeightsError
from pipeline.pretraining.random_states import RandomState, remembered
from pipeline.pretraining.replayed_kinds import KINDS, Kind, kind_of
from pipeline.pretraining.run_folder import RunFolder
from pipeline.storage import Location, one_line
from pipeline.training.loop import Part, StepFault
from pipeline.training.workers import Workers

_VERSION = 2


def keep_fault(
    fault: StepFault,
    job: TrainingJob,
    folder: RunFolder,
    objective: nn.Module,
    workers: Workers,
) -> str:
    """Write what replays the step to ``step_fault/rank_0000.pt``; a sentence that tells how.

    Rank 0 writes, and each rank whose own losses are not finite. Never raises: a full disk must not
    hide that the training diverged.
    """
    kept = folder.place.child("step_fault")
    own = all(math.isfinite(value) for losses in fault.losses for value in losses.values())
    if own and not workers.is_first:
        return f"Worker 0 keeps the step in {kept}"
    place = kept.child(f"rank_{workers.rank:04d}.pt")
    try:
        with place.publishing() as stream:
            torch.save(_content(fault, job, objective, workers), stream)
    except Exception as complaint:  # whatever it is, the divergence is what must be told
        return f"The step could not be kept: {one_line(_cause(complaint))}"
    shown = shlex.quote(str(place))
    return f"The step is kept: python -m pipeline.pretraining.replay {shown}"


def _content(
    fault: StepFault, job: TrainingJob, objective: nn.Module, workers: Workers
) -> dict[str, Any]:
    """Tensors and plain values alone, so that they load without running anything."""
    states = remembered(objective)[-len(fault.parts) :]
    return {
        "version": _VERSION,
        "kind": kind_of(job),
        "config": job.model_dump_json(),
        "epoch": fault.key.epoch,
        "step": fault.key.step,
        "rank": workers.rank,
        "num_workers": workers.size,
        "device": workers.device.type,
        "torch": str(torch.__version__),
        "objective": {name: value.detach() for name, value in objective.state_dict().items()},
        "parts": [
            _plain(part, losses, states[number] if len(states) == len(fault.parts) else None)
            for number, (part, losses) in enumerate(zip(fault.parts, fault.losses, strict=True))
        ],
    }


def _plain(part: Part, losses: Mapping[str, float], state: RandomState | None) -> dict[str, Any]:
    return {
        "inputs": mapped(part.inputs, Tensor.detach),
        "num_images": part.num_images,
        "num_global": part.num_global,
        "losses": dict(losses),
        "random": None if state is None else tuple(state),
    }


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with its tensors changed; of lists and tuples, also named ones, plain tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return tuple(mapped(one, change) for one in value)
    return value


def _cause(fault: BaseException) -> BaseException:
    """Torch's writer of archives hides a full disk behind a complaint of its own."""
    causes = [fault]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)
    # The last in the chain came first.
    return next((one for one in causes if isinstance(one, StorageError)), causes[-1])


@dataclass(frozen=True, eq=False)
class KeptPart:
    """A part of the step: what it was computed from, and what came out then."""

    inputs: Any
    """As the kind's task made them."""

    num_images: int
    num_global: int
    losses: dict[str, float]
    random: RandomState | None


@dataclass(frozen=True, eq=False)
class KeptStep:
    """What lies in a file that ``keep_fault`` wrote, tensors on the CPU."""

    kind: Kind
    job: TrainingJob
    epoch: int
    step: int
    rank: int
    num_workers: int
    device: str
    torch: str
    objective: dict[str, Tensor]
    parts: list[KeptPart]


def load_step(place: Location) -> KeptStep:
    """The step that was kept.

    Raises:
        StorageError: the file cannot be read.
        WeightsError: it is none of ours, or one of another version; nothing in it was run.
    """
    try:
        content = io.BytesIO(place.read_bytes())
    except OSError as fault:
        raise StorageError(f"cannot read {place}: {one_line(fault)}; check the path") from fault
    try:
        kept = torch.load(content, map_location="cpu", weights_only=True)
        if kept["version"] != _VERSION:
            raise ValueError(f"version {kept['version']}, this code reads {_VERSION}")
        return _as_step(kept)
    except (ValidationError, ValueError, TypeError, KeyError) as fault:
        reason = one_line(fault, 160)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as fault:
        reason = one_line(fault, 160)
    raise WeightsError(
        f"{place} is no step of this version that was kept ({reason}); nothing in it was run. Give "
        "a file of a run's step_fault folder, and the version of Patchseed that wrote it"
    )


def _as_step(kept: Mapping[str, Any]) -> KeptStep:
    if kept["kind"] not in KINDS:
        raise ValueError(f"kind {kept['kind']}, this code replays {' and '.join(KINDS)}")
    kind = KINDS[kept["kind"]]
    parts = [
        KeptPart(
            kind.inputs(*part["inputs"]),
            part["num_images"],
            part["num_global"],
            part["losses"],
            None if part["random"] is None else RandomState(*part["random"]),
        )
        for part in kept["parts"]
    ]
    same = ("epoch", "step", "rank", "num_workers", "device", "torch", "objective")
    job = kind.job.model_validate_json(kept["config"])
    return KeptStep(kind=kind, job=job, parts=parts, **{name: kept[name] for name in same})
