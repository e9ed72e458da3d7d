"""Runs -> processes of the jobs, several at a time, in an order in which each finds what it needs.

A run that is done is not started again; one that was stopped goes on by itself, for the jobs do. A
run that fails costs the cells that need it, not the others.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import yaml

from pipeline.errors import StorageError
from pipeline.progress import duration
from pipeline.reproduction.cells import Run
from pipeline.storage import Location

_POLL_SECONDS = 0.2
_SIGTERM_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


@dataclass
class Runner:
    """Does runs, and tells of each as it ends.

    Attributes:
        jobs: folder of the scripts.
        logs: folder of settings and logs of the runs.
        num_parallel: processes at a time.
        tell: a line for people.
        describe: a finished run's result in a few words.
    """

    jobs: Path
    logs: Path
    num_parallel: int
    tell: Callable[[str], None]
    describe: Callable[[Run], str]
    _failed: dict[str, str] = field(default_factory=dict)
    _began: dict[str, float] = field(default_factory=dict)
    _taken: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of the runs that ended well, by their job."""

    def do(self, runs: Sequence[Run]) -> Mapping[str, str]:
        """Do what is not done yet; why runs failed, by their names.

        Raises:
            StorageError: settings or logs cannot be written.
        """
        waiting = [run for run in runs if not run.is_done]
        if len(waiting) < len(runs):
            self.tell(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
        total, ended = len(waiting), 0
        with _ending_them() as active:
            while waiting or active:
                self._start(waiting, active)
                for run, process in [one for one in active if one[1].poll() is not None]:
                    active.remove((run, process))
                    ended += 1
                    rest = [*waiting, *(one for one, _ in active)]
                    self._end(run, process.returncode, f"{ended}/{total}", rest)
                ended += self._give_up(waiting)
                time.sleep(_POLL_SECONDS)
        return self._failed

    def _start(self, waiting: list[Run], active: "_Active") -> None:
        """Start what can be started, as far as there is room."""
        open_names = {run.name for run in waiting} | {run.name for run, _ in active}
        for run in list(waiting):
            if len(active) >= self.num_parallel:
                return
            if not open_names & set(run.after) and not set(run.after) & self._failed.keys():
                waiting.remove(run)
                self._began[run.name] = time.monotonic()
                active.append((run, self._process(run)))

    def _give_up(self, waiting: list[Run]) -> int:
        """Leave out the runs that need one that failed; how many they are."""
        lost = [run for run in waiting if set(run.after) & self._failed.keys()]
        for run in lost:
            waiting.remove(run)
            self._failed[run.name] = "what it needs failed"
        return len(lost)

    def _process(self, run: Run) -> "subprocess.Popen[bytes]":
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            settings = self.logs / f"{run.name}.yaml"
            settings.write_text(yaml.safe_dump(run.values, sort_keys=False))
            log = (self.logs / f"{run.name}.log").open("wb")
        except OSError as fault:
            raise StorageError(f"{self.logs} cannot be written: {fault}") from fault
        with log:
            return subprocess.Popen(
                [sys.executable, str(self.jobs / f"{run.job}.py"), "--config", str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                # No thread of ours holds a lock: none has been started.
                preexec_fn=_die_with_parent,
            )

    def _end(self, run: Run, code: int, place: str, rest: Sequence[Run]) -> None:
        """Tell of a run that has ended, and remember why it failed."""
        log = self.logs / f"{run.name}.log"
        if code == 0 and run.is_done:
            seconds = time.monotonic() - self._began[run.name]
            self._taken.setdefault(run.job, []).append(seconds)
            left = self._time_left(rest)
            self.tell(f"run {place} ok {run.name}: {self.describe(run)}{left}")
            return
        self._failed[run.name] = f"{_last_line(log)} (code {code})"
        self.tell(f"run {place} FAILED {run.name}: {self._failed[run.name]}; its log: {log}")

    def _time_left(self, rest: Sequence[Run]) -> str:
        """By what runs of the same jobs took; nothing while one of the jobs has none."""
        if not rest or not all(run.job in self._taken for run in rest):
            return ""
        seconds = sum(fmean(self._taken[run.job]) for run in rest)
        return f" eta {duration(seconds / self.num_parallel)}"


_Active = list[tuple[Run, "subprocess.Popen[bytes]"]]


@contextmanager
def _ending_them() -> Iterator[_Active]:
    """A list of processes that are asked to end, and waited for, when this one is stopped."""
    active: _Active = []
    try:
        yield active
    finally:
        for _, process in active:
            process.terminate()
        deadline = time.monotonic() + _SIGTERM_SECONDS
        for _, process in active:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _die_with_parent() -> None:
    """Have Linux end this process when the one that started it is killed outright.

    Else it would go on unseen, and stand in the way of the same command given again.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it told nothing"


def local_folder(place: Location) -> Path:
    """The path of a place on this machine.

    Raises:
        StorageError: it is in a store.
    """
    if not place.is_local:
        raise StorageError(f"--output must be a local folder, got {place}")
    return Path(place.path)
