"""Progress for people: a bar on a terminal, else one line every few seconds.

Knows counts and time only, so any long job can use it.
"""

import sys
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn


class ProgressReporter:
    """Tells how far a job is: count, %, items/s, time left, and the counts that matter.

    Args:
        verb: what is being done, e.g. ``"label"``.
        total: items in all.
        done: items an earlier run had finished; they count for % but not for the speed.
        seconds: pause between lines where stdout is not a terminal.
    """

    def __init__(self, verb: str, total: int, *, done: int = 0, seconds: float = 5.0) -> None:
        self.verb, self.total, self.done, self.seconds = verb, total, done, seconds
        self.counts: Counter[str] = Counter()
        self._already = done
        self._started = self._told = time.monotonic()
        self._first_seen: float | None = None
        self._first_rows = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "ProgressReporter":
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(),
            )
            self._task = self._bar.add_task(self.verb, total=self.total, note="starting")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done > self._already:
            self._print()

    def advance(self, rows: int, counts: Mapping[str, int]) -> None:
        """``rows`` more items are finished, with these outcomes."""
        self.done += rows
        self.counts.update(counts)
        if self._first_seen is None:
            self._first_seen, self._first_rows = time.monotonic(), rows
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, note=self._note())
        elif time.monotonic() - self._told >= self.seconds and self.done < self.total:
            self._print()

    @property
    def items_per_second(self) -> float:
        """Speed since the first items came out, as start-up is not speed; until more follow, the
        speed since the start.
        """
        now, done = time.monotonic(), self.done - self._already
        if self._first_seen is not None and done > self._first_rows:
            return (done - self._first_rows) / max(now - self._first_seen, 1e-9)
        return done / max(now - self._started, 1e-9)

    def _note(self) -> str:
        speed = self.items_per_second
        left = duration((self.total - self.done) / speed) if speed > 0 else "?"
        took = duration(time.monotonic() - self._started)
        when = f"eta {left}" if self.done < self.total else f"in {took}"
        outcomes = " ".join(f"{name}={count}" for name, count in sorted(self.counts.items()))
        return f"{speed:,.1f} img/s {when} {outcomes}".rstrip()

    def _print(self) -> None:
        self._told = time.monotonic()
        share = 100 * self.done / max(self.total, 1)
        sys.stdout.write(
            f"{self.verb} {self.done:,}/{self.total:,} ({share:.1f} %) {self._note()}\n"
        )
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """``75.2`` -> ``1m15s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
