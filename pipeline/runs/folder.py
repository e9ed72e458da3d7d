"""Where a training run lives, and what lies there.

    OUTPUT/cifar10-swin_tiny...-drloc0.5-seed0-1a2b3c4d/
        config.yaml        the run's settings, as --config takes them
        checkpoints/       the last two epochs and the best one (training/checkpoints.py)
        history.jsonl      one line of numbers per epoch
        model/             model.safetensors and config.json of the selected epoch
        figures/           curves and the confusion matrix
        summary.json       the results; written last: a run that has it is finished
        fault.json         why it cannot go on, where a worker found that out

The folder's name ends in a hash of all that decides the weights. So the same command finds its run
again and goes on with it, and two different runs never meet.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline import errors
from pipeline.config import TrainingJob
from pipeline.data.pseudo_labels import config_hash
from pipeline.errors import PatchseedError, StorageError
from pipeline.lease import Lease
from pipeline.storage import Location
from pipeline.training.checkpoints import CheckpointStore

HISTORY = "history.jsonl"
"""Of a run's files, the one with a line for each epoch."""

_OURS = "config.yaml"
_LEASE = "_lease.json"
_FAULT = "fault.json"


def run_name(job: TrainingJob) -> str:
    """What the run is for people, and a hash of all settings that count."""
    return f"{job.slug}-{config_hash(job.what_decides_the_weights())[:8]}"


@dataclass(frozen=True)
class RunFolder:
    """One run's folder, on a disk or in a bucket; cheap and picklable."""

    place: Location

    @classmethod
    def of(cls, job: TrainingJob) -> "RunFolder":
        """The folder that belongs to the job's settings.

        Raises:
            ConfigError, StorageError: the output is no place of ours to write.
        """
        return cls(Location.parse(job.output).child(run_name(job)))

    @property
    def checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self.place.child("checkpoints"))

    @contextmanager
    def held(self, job: TrainingJob) -> Iterator[None]:
        """This job's alone, and begun; a run that was refused before it trained leaves nothing.

        Raises:
            StorageError: another process is at work there, and as ``begin``.
        """
        with Lease(self.place):
            self.begin(job)
            try:
                yield
            except PatchseedError:
                if set(self.place.names()) <= {_OURS, _LEASE, _FAULT}:
                    self.place.delete()
                raise

    def begin(self, job: TrainingJob) -> None:
        """Make the folder the job's: empty it if told so, write the settings, forget old faults.

        Raises:
            StorageError: something that is no run lies there, or it cannot be written.
        """
        config = self.place.child(_OURS)
        others = [name for name in self.place.names() if name not in (_OURS, _LEASE)]
        if others and config.kind() == "missing":
            raise StorageError(
                f"{self.place} holds {others[0]} but no {_OURS}: it is no run of this job; "
                "move it away or choose another --output"
            )
        if job.overwrite:
            # The summary first: what is left after a kill must not look finished.
            for name in ("summary.json", *others):
                self.place.child(name).delete()
        self.place.child(_FAULT).delete()
        once = {"overwrite", "detect_anomaly"}
        text = yaml.safe_dump(job.model_dump(mode="json", exclude=once), sort_keys=False)
        config.write_bytes(text.encode())

    def summary(self) -> dict[str, Any] | None:
        """The results; None while the run is not finished."""
        return self.read_json("summary.json")

    def history(self) -> list[dict[str, float]]:
        """The numbers of each finished epoch, as runs/record.py writes them."""
        file = self.place.child(HISTORY)
        if file.kind() == "missing":
            return []
        return [json.loads(line) for line in file.read_bytes().splitlines()]

    def write_fault(self, fault: PatchseedError) -> None:
        """Leave word of a fault that another try would only meet again."""
        self.write_json(_FAULT, {"kind": type(fault).__name__, "message": str(fault)})

    def fault(self) -> PatchseedError | None:
        """The fault that a worker left word of."""
        left = self.read_json(_FAULT)
        if left is None:
            return None
        kind = getattr(errors, left["kind"], PatchseedError)
        found: PatchseedError = kind(left["message"])
        return found

    def copy_model(self, target: Location) -> list[Location]:
        """Copy the finished run's model into the folder ``target``; the copies.

        Raises:
            StorageError: the run has no model, or ``target`` cannot be written.
        """
        # Its description last: where that is, the model is whole.
        files = sorted(self.place.child("model").files(), key=lambda one: one.name == "config.json")
        if not files:
            raise StorageError(f"{self.place} holds no model yet: the run is not finished")
        copies = [target.child(file.name) for file in files]
        for file, copy in zip(files, copies, strict=True):
            copy.write_bytes(file.read_bytes())
        return copies

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What a file of the run holds; None where it is missing.

        Raises:
            StorageError: it cannot be read, or is no JSON.
        """
        file = self.place.child(name)
        try:
            if file.kind() == "missing":
                return None
            content = json.loads(file.read_bytes())
        except (OSError, ValueError) as fault:
            raise StorageError(
                f"{file} cannot be read ({fault}); --overwrite starts the run anew"
            ) from fault
        return content if isinstance(content, dict) else None

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a file of the run, whole or not at all."""
        self.place.child(name).write_bytes(json.dumps(values, indent=1).encode())
