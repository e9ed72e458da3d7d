"""What a sweep proposed, and what came of it: the folder that a resume reads.

    OUTPUT/drloc-1a2b3c4d/
        sweep.yaml         the sweep's settings, and a hash of its space
        base.yaml          the tuned job's settings that stay as they are
        proposals.jsonl    a line for each trial, written before it starts
        trials.jsonl       a line for each trial, written when it ends
        runs/              folders of the trials' training runs
        best.yaml, table.md, trials.csv, importance.json, pictures/     at the end

Text that people can read, and nothing that would be run or unpickled by who reads it.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml

from pipeline.config.tuning import TuneJob
from pipeline.data.pseudo_labels import config_hash
from pipeline.errors import ConfigError, PatchseedError, StorageError, one_line
from pipeline.lease import Lease
from pipeline.storage import Location
from pipeline.tuning.space import Space, Values

TrialStatus = Literal["ok", "stopped", "failed"]

DEFAULT_SAMPLES = 16
"""Trials, where nobody said how many."""

_SETTINGS, _BASE = "sweep.yaml", "base.yaml"


@dataclass(frozen=True)
class Proposal:
    """A trial that is to be: its number from 1, its name, its values."""

    number: int
    id: str
    values: Values


@dataclass(frozen=True)
class Trial(Proposal):
    """A trial that has ended.

    Attributes:
        status: ok, stopped (by a scheduler, behind others), or failed.
        metric: what it is judged by; None where it never got there.
        seconds: that it took, since the last start.
        reason: why it failed.
        epochs: that it trained.
        folder: of its training run; None where there is none.
        numbers: others that were measured.
    """

    status: TrialStatus
    metric: float | None
    seconds: float
    reason: str | None = None
    epochs: int | None = None
    folder: str | None = None
    numbers: dict[str, float] = field(default_factory=dict)


def proposal(number: int, values: Values) -> Proposal:
    """The trial of that number; its name says where it comes, and hashes its values."""
    # As it will be read again, which makes lists of tuples.
    plain = json.loads(json.dumps(values))
    return Proposal(number, f"{number:04d}-{config_hash(plain)[:8]}", plain)


class SweepFolder:
    """One sweep's folder; ``held`` before anything is written."""

    def __init__(self, place: Location) -> None:
        self.place = place
        self._proposals: list[Proposal] = []
        self._trials: list[Trial] = []

    @property
    def proposals(self) -> tuple[Proposal, ...]:
        """All that were proposed, in their order."""
        return tuple(self._proposals)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All that have ended, in that order."""
        return tuple(self._trials)

    @property
    def unfinished(self) -> list[Proposal]:
        """Proposed, and not ended."""
        ended = {trial.number for trial in self._trials}
        return [one for one in self._proposals if one.number not in ended]

    @contextmanager
    def held(self) -> Iterator[Lease]:
        """This process's alone; a sweep that was refused before it began leaves nothing.

        Raises:
            StorageError: another process is at work there.
        """
        with Lease(self.place) as lease:
            try:
                yield lease
            except PatchseedError:
                if set(self.place.names()) <= {"_lease.json"}:
                    self.place.delete()
                raise

    def settled(self, job: TuneJob, space: Space) -> tuple[TuneJob, dict[str, Any] | None]:
        """The settings that the sweep really has, and the base it began with; None for a new one.

        Raises:
            StorageError: a sweep of that name exists, and nobody said to resume it; a file is
                damaged.
            ConfigError: there is no sweep to resume, or the settings contradict it.
        """
        exists = self.place.child(_SETTINGS).kind() == "file"
        if job.resume is None:
            if exists:
                raise StorageError(
                    f"{self.place} holds a sweep already: --resume {self.place.name} goes on with "
                    "it, --name begins another"
                )
            return job, None
        if not exists:
            raise ConfigError(f"--resume {job.resume}: there is no sweep in {self.place}")
        settled = _resumed(job, space, _without_population(job, self._read_yaml(_SETTINGS)))
        self._proposals = [Proposal(**one) for one in self._lines("proposals.jsonl")]
        self._trials = [Trial(**one) for one in self._lines("trials.jsonl")]
        return settled, self._read_yaml(_BASE)

    def begin(self, job: TuneJob, space: Space, base: dict[str, Any]) -> None:
        """Write what a resume needs; the settings last, for a folder that has them is a sweep.

        Raises:
            StorageError: it cannot be written.
        """
        settings = {
            **job.what_decides_the_trials(),
            "num_samples": job.num_samples,
            "space_sha256": _space_hash(space),
        }
        for name, values in ((_BASE, base), (_SETTINGS, settings)):
            text = yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False)
            self.place.child(name).write_bytes(text.encode())

    def add_proposal(self, proposed: Proposal) -> None:
        """Note a trial that is about to start."""
        self._proposals.append(proposed)
        self._write_lines("proposals.jsonl", self._proposals)

    def add_trial(self, trial: Trial) -> None:
        """Note a trial that has ended, once.

        Raises:
            ValueError: it has ended before.
        """
        if any(one.number == trial.number for one in self._trials):
            raise ValueError(f"trial {trial.number} has ended already")
        self._trials.append(trial)
        self._write_lines("trials.jsonl", self._trials)

    def _write_lines(self, name: str, entries: list[Any]) -> None:
        """All lines anew: a reader, and a resume after a kill, never meet half a line."""
        text = "".join(json.dumps(asdict(one)) + "\n" for one in entries)
        self.place.child(name).write_bytes(text.encode())

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.place.child(name)
        if file.kind() == "missing":
            return []
        try:
            lines = [json.loads(line) for line in file.read_bytes().splitlines()]
        except (OSError, ValueError) as fault:
            raise StorageError(
                f"{file} is damaged ({fault}); begin the sweep anew under another --name"
            ) from fault
        # Earlier versions told of each trial that it was no segment of a population.
        return [{name: one[name] for name in one if name != "segment"} for one in lines]

    def _read_yaml(self, name: str) -> dict[str, Any]:
        file = self.place.child(name)
        try:
            values = yaml.safe_load(file.read_bytes())
        except (OSError, yaml.YAMLError) as fault:
            raise StorageError(f"{file} cannot be read: {one_line(fault)}") from fault
        if not isinstance(values, dict):
            raise StorageError(f"{file} is no sweep's; begin another with --name")
        return values


def sweep_name(job: TuneJob, space: Space) -> str:
    """The name given, or the space's with a hash of what decides the trials."""
    given = job.resume or job.name
    if given is None:
        decides = {**job.what_decides_the_trials(), "space_sha256": _space_hash(space)}
        return f"{space.name}-{config_hash(decides)[:8]}"
    if "/" in given or given.startswith(".") or not given.strip():
        raise ConfigError(f"--name must be the name of a folder in --output, got {given!r}")
    return given


def best_of(space: Space, trials: tuple[Trial, ...]) -> Trial | None:
    """The best trial that was trained to its end; the earlier one among equals."""
    found: Trial | None = None
    for trial in sorted(trials, key=lambda one: one.number):
        if trial.status != "ok" or trial.metric is None:
            continue
        if found is None or found.metric is None or space.better(trial.metric, found.metric):
            found = trial
    return found


def finite(value: object) -> float | None:
    """A number, or None for what is none."""
    good = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if good and isinstance(value, int | float) else None


def _space_hash(space: Space) -> str:
    return config_hash({"source": space.source})


def _without_population(job: TuneJob, kept: dict[str, Any]) -> dict[str, Any]:
    """Settings kept by an earlier version, without those of the scheduler that went.

    Raises:
        ConfigError: the sweep was that scheduler's.
    """
    if kept.get("scheduler") == "pbt":
        raise ConfigError(
            f"--resume {job.resume}: population based training (--scheduler pbt) is not "
            "offered any more; begin another sweep with --name, perhaps with --scheduler asha"
        )
    return {name: value for name, value in kept.items() if name != "perturb_epochs"}


def _resumed(job: TuneJob, space: Space, kept: dict[str, Any]) -> TuneJob:
    """The job with the settings that its sweep began with; others must not contradict them.

    Raises:
        ConfigError: they do.
        StorageError: the settings kept are those of another version.
    """
    if kept.pop("space_sha256", None) != _space_hash(space):
        raise ConfigError(
            f"--space {job.space} is not the file that this sweep began with; restore it, or begin "
            "another sweep with --name"
        )
    num_samples = kept.pop("num_samples", None)
    asked = job.what_decides_the_trials()
    default = TuneJob(space=job.space).what_decides_the_trials()
    if kept.keys() - asked.keys():
        raise StorageError(f"the sweep to resume is of another version: {', '.join(kept)}")
    for name, value in kept.items():
        if asked[name] not in (default[name], value):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} must stay {value} in a sweep that goes on, got {asked[name]}; leave it "
                "out, or begin another sweep with --name"
            )
    return TuneJob.model_validate(
        {**job.model_dump(), **kept, "num_samples": job.num_samples or num_samples}
    )
