"""A step that diverged, kept with all that it was computed from (the room replay/ repeats it).

What is kept: what each part was computed from (the images after augmentation, the mixed labels and
the pairs; the crops; or the boxes), all weights and buffers, the job's settings, and, where
``remember_random_states`` was called, torch's random states before each forward pass. Tensors and
plain values alone: loading such a file runs nothing.

To keep more: a key in ``_content`` or ``_plain``, a field of ``KeptStep`` or ``KeptPart``
(replay/kept_step.py), and another ``VERSION`` if old files cannot do without it. Another kind of
job: replay/kinds.py.
"""

import math
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import TrainingJob
from pipeline.errors import StorageError
from pipeline.runs.random_states import RandomState, remembered
from pipeline.runs.folder import RunFolder
from pipeline.storage import one_line
from pipeline.training.loop import Part, StepFault
from pipeline.training.workers import Workers

VERSION = 2
"""Of the file's keys."""


def keep_fault(
    fault: StepFault,
    kind: str,
    job: TrainingJob,
    folder: RunFolder,
    objective: nn.Module,
    workers: Workers,
) -> str:
    """Write what replays the step to ``step_fault/rank_0000.pt``; a sentence that tells how.

    Rank 0 writes, and each rank whose own losses are not finite. Never raises: a full disk must not
    hide that the training diverged.

    Args:
        fault: the step.
        kind: of the run; the one of replay/kinds.py by that name reads the step.
        job: the run's settings.
        folder: the run's.
        objective: with the weights from before the step.
        workers: this one and the others.
    """
    kept = folder.place.child("step_fault")
    own = all(math.isfinite(value) for losses in fault.losses for value in losses.values())
    if own and not workers.is_first:
        return f"Worker 0 keeps the step in {kept}"
    place = kept.child(f"rank_{workers.rank:04d}.pt")
    try:
        with place.publishing() as stream:
            torch.save(_content(fault, kind, job, objective, workers), stream)
    except Exception as complaint:  # whatever it is, the divergence is what must be told
        return f"The step could not be kept: {one_line(_cause(complaint))}"
    shown = shlex.quote(str(place))
    return f"The step is kept: python -m pipeline.replay {shown}"


def _content(
    fault: StepFault, kind: str, job: TrainingJob, objective: nn.Module, workers: Workers
) -> dict[str, Any]:
    """Tensors and plain values alone, so that they load without running anything."""
    states = remembered(objective)[-len(fault.parts) :]
    return {
        "version": VERSION,
        "kind": kind,
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
    """``value`` with its tensors changed, in dicts, lists and tuples too; named tuples lose their
    names. All else stays as it is.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(one, change) for name, one in value.items()}
    if isinstance(value, list):
        return [mapped(one, change) for one in value]
    if isinstance(value, tuple):
        return tuple(mapped(one, change) for one in value)
    return value


def _cause(fault: BaseException) -> BaseException:
    """Torch's writer of archives hides a full disk behind a complaint of its own."""
    causes = [fault]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)
    # The last in the chain came first.
    return next((one for one in causes if isinstance(one, StorageError)), causes[-1])
