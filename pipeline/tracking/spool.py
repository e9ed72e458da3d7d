"""A run's events on a local disk, in order, until MLflow has them.

A spool is a folder: ``run.json`` (which run, where), ``events.jsonl`` (one event a line),
``files/`` (artifacts' bytes), ``position.json`` (up to where MLflow has the events) and
``aside.jsonl`` (events that MLflow refused, so that they do not hold up the others). It is locked
while its job lives, so that nobody else delivers it. To add a field to an event, nothing is needed
here: only ``content`` (bytes, or a file's path) is the spool's business.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError

Event = dict[str, Any]

PEEK_BYTES = 64 * 2**10
# Above this a spool that MLflow has whole is emptied: a healthy job of a week keeps its disk.
COMPACT_BYTES = 4 * 2**20


class Spool:
    """One run's folder; every method may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Open an existing spool.

        Raises:
            StorageError: another process has it open, or it cannot be read.
        """
        self.folder = folder
        self.closed = False
        self.complete = False
        self._changed = threading.Condition()
        try:
            self.header: Event = json.loads((folder / "run.json").read_text())
            self._events = (folder / "events.jsonl").open("a+b", buffering=0)
        except (OSError, ValueError) as fault:
            raise StorageError(f"the tracking spool {folder} cannot be read: {fault}") from fault
        try:
            fcntl.flock(self._events, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            self._events.close()
            raise StorageError(f"{folder} is in use by a running job: wait for its end") from fault
        self._position, self.run_id = self._saved_position()
        self._position_file = os.open(folder / "position.json", os.O_RDWR | os.O_CREAT, 0o644)
        self._num_left = _num_lines(folder / "events.jsonl", self._position)
        self._num_aside = _num_lines(folder / "aside.jsonl", 0)

    @classmethod
    def create(cls, parent: Path, header: Event) -> "Spool":
        """A new spool for the run that ``header`` describes, in a folder of its own.

        Raises:
            OSError: ``parent`` cannot be written.
        """
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        folder = parent.absolute() / f"{stamp}-{header['tracker'][:8]}"
        (folder / "files").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(header, indent=2))
        return cls(folder)

    @property
    def num_left(self) -> int:
        """Events that MLflow does not have."""
        return self._num_left + self._num_aside

    def append(self, event: Event) -> None:
        """Add an event; its ``content``, if any, becomes a file.

        Raises:
            OSError: the disk is full, or the file to keep cannot be read.
        """
        line = {name: value for name, value in event.items() if name != "content"}
        if "content" in event:
            line["blob"] = self._keep(event["content"], event["name"])
        with self._changed:
            self._check_open()
            _append_whole(self._events.fileno(), _line(line))
            self._num_left += 1
            self._changed.notify_all()

    def finish(self) -> None:
        """Say that nothing will be added any more."""
        with self._changed:
            self.complete = True
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when there are events, or when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_left or self.complete or self.closed)

    def peek(self, most: int) -> list[bytes]:
        """The next lines, at most ``most``; none where all are delivered."""
        with self._changed:
            self._check_open()
            size = PEEK_BYTES
            while True:
                data = os.pread(self._events.fileno(), size, self._position)
                if b"\n" in data or len(data) < size:
                    break
                size *= 2
            # A line without its end was being written when the job was killed.
            lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)[:most]
            if not lines:
                self._num_left = 0  # also where somebody has emptied the file: nothing to wait on
            return lines

    def advance(self, lines: Sequence[bytes], run_id: str | None) -> None:
        """Remember that MLflow has the next ``lines``, and remove their files."""
        for line in lines:
            blob = parsed(line).get("blob")
            if blob:
                shutil.rmtree((self.folder / blob).parent, ignore_errors=True)
        self._move(lines, run_id)

    def set_aside(self, reason: str) -> None:
        """Take the next event out of the order; it stays in the folder, with the reason."""
        lines = self.peek(1)
        with self._changed:
            self._check_open()
            with (self.folder / "aside.jsonl").open("ab", buffering=0) as aside:
                _append_whole(aside.fileno(), _line({**parsed(lines[0]), "reason": reason}))
            self._num_aside += 1
        self._move(lines, self.run_id)

    def recall(self) -> None:
        """Put the events that were set aside in an earlier life at the end of the order."""
        path = self.folder / "aside.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        with self._changed:
            for line in lines:
                _append_whole(self._events.fileno(), line)
            path.unlink(missing_ok=True)
            self._num_left += len(lines)
            self._num_aside = 0

    def blob(self, event: Event) -> str:
        """The local file with an artifact's bytes; it has the artifact's name."""
        return str(self.folder / event["blob"])

    def close(self) -> int:
        """Unlock; remove the folder if MLflow has all of it. The number of events left in it."""
        with self._changed:
            if not self.closed:
                self.closed = True
                self._changed.notify_all()
                self._events.close()
                os.close(self._position_file)
                if not self.num_left:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    with suppress(OSError):  # another run's spool lies beside it
                        self.folder.parent.rmdir()
        return self.num_left

    def _keep(self, content: bytes | Path, name: str) -> str:
        """Write an artifact's bytes under ``files/``; a file on the same disk is linked."""
        blob = self.folder / "files" / uuid.uuid4().hex / name
        blob.parent.mkdir(parents=True)
        try:
            if isinstance(content, bytes):
                blob.write_bytes(content)
            else:
                _link_or_copy(content, blob)
        except BaseException:
            shutil.rmtree(blob.parent, ignore_errors=True)
            raise
        return str(blob.relative_to(self.folder))

    def _move(self, lines: Sequence[bytes], run_id: str | None) -> None:
        with self._changed:
            self._check_open()
            self.run_id = run_id
            self._position += sum(len(line) for line in lines)
            self._num_left -= len(lines)
            if not self._num_left and self._position > COMPACT_BYTES:
                os.ftruncate(self._events.fileno(), 0)
                self._position = 0
            state = json.dumps({"position": self._position, "run_id": run_id})
            os.pwrite(self._position_file, state.ljust(120).encode() + b"\n", 0)

    def _saved_position(self) -> tuple[int, str | None]:
        """Where an earlier life stopped. Where that is unknown, sending all again does no harm."""
        try:
            state = json.loads((self.folder / "position.json").read_text())
            size = (self.folder / "events.jsonl").stat().st_size
            return (state["position"] if state["position"] <= size else 0), state["run_id"]
        except (OSError, ValueError, KeyError):
            return 0, None

    def _check_open(self) -> None:
        if self.closed:
            raise StorageError(f"{self.folder} is closed")


def parsed(line: bytes) -> Event:
    """The event in a line; of kind ``"unreadable"`` where a disk has garbled it."""
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if isinstance(event, dict) and "kind" in event:
        return event
    return {"kind": "unreadable", "line": line.decode(errors="replace")}


def _line(event: Event) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _append_whole(descriptor: int, data: bytes) -> None:
    """Append all of ``data`` or nothing: half a line would spoil the next one."""
    size = os.fstat(descriptor).st_size
    written = 0
    try:
        written = os.write(descriptor, data)
    finally:
        if written < len(data):
            os.ftruncate(descriptor, size)
    if written < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _link_or_copy(source: Path, target: Path) -> None:
    source = source.resolve()
    if source.is_file():  # of a pipe there is nothing to keep, and copyfile says so
        with suppress(OSError):  # another disk, or another owner
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _num_lines(path: Path, start: int) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as stream:
        stream.seek(start)
        return sum(line.endswith(b"\n") for line in stream)
