"""A step that diverged, as it lies in the file that runs/step_fault.py wrote.

To keep more: see there.
"""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.config import TrainingJob
from pipeline.errors import StorageError, WeightsError
from pipeline.replay.kinds import KINDS, Kind
from pipeline.runs.random_states import RandomState
from pipeline.runs.step_fault import VERSION
from pipeline.storage import Location, one_line


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
        if kept["version"] != VERSION:
            raise ValueError(f"version {kept['version']}, this code reads {VERSION}")
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
