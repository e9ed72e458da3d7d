"""The way of an event from a job to MLflow, on which nothing can stop or slow the job.

    job --(memory)--> journal thread --(spool on disk)--> sender thread --(MLflow)--> run

``record`` costs microseconds and never raises. The journal thread makes events legal and appends
them to the spool; the sender thread, the only one that calls MLflow, takes them from there in
order. A slow MLflow lengthens the spool, a stalling disk lengthens the queue, which is bounded.
This file knows neither MLflow nor the kinds of events: those are tracking/courier.py's.
"""

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StorageError, one_line
from pipeline.tracking.courier import Courier, legal, reason
from pipeline.tracking.spool import Event, Spool

QUEUE_EVENTS, QUEUE_BYTES = 10_000, 256 * 2**20
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
WARNING_SECONDS = 60.0
# Attempts at one event before it is asked whether the fault is its own.
PATIENCE = 3
# Attempts after close(): an outage that outlasts them is left to the spool.
LAST_CHANCES = 2

_DISK_MAY_RECOVER = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_LOG = logging.getLogger("pipeline.tracking.tracker")


@dataclass(frozen=True)
class Delivery:
    """What became of the events: with MLflow, still on disk, or gone (queue or disk full)."""

    delivered: int = 0
    spooled: int = 0
    lost: int = 0
    run_id: str | None = None
    spool: Path | None = None

    def __str__(self) -> str:
        told = f"{self.delivered} events delivered"
        if self.spooled:
            told = (
                f"{self.spooled} events not delivered; they are in {self.spool}; "
                f"send them with: python -m pipeline.tracking.tracker {self.spool}"
            )
        return told + (f"; {self.lost} events lost" if self.lost else "")


class Outbox:
    """The queue and its two threads, which are daemons: they never keep a process alive."""

    def __init__(self, spool: Spool, courier: Courier) -> None:
        self._spool = spool
        self._courier = courier
        self._queued = threading.Condition()
        self._queue: deque[Event] = deque()
        self._queue_bytes = 0
        self._lost = 0
        self._closing = threading.Event()
        self._warnings = _Warnings()
        self._sender = threading.Thread(target=self._send, name="tracking-sender", daemon=True)
        journal = threading.Thread(target=self._keep, name="tracking-journal", daemon=True)
        journal.start()
        self._sender.start()

    def record(self, kind: str, make: Callable[[], Event]) -> None:
        """Queue one event; ``make`` snapshots its values; a fault in it costs only the event."""
        try:
            event = {"kind": kind, "ms": time.time_ns() // 1_000_000, **make()}
        except Exception as fault:  # whatever a value's str() or float() does
            self._lose(f"{kind} cannot be read: {reason(fault)}")
            return
        size = _num_bytes(event)
        with self._queued:
            full = len(self._queue) >= QUEUE_EVENTS or self._queue_bytes + size > QUEUE_BYTES
            if not full and not self._closing.is_set():
                self._queue.append(event)
                self._queue_bytes += size
                self._queued.notify()
                return
        self._lose("the queue is full, its disk stalls" if full else "the run is closed already")

    def close(self, timeout_s: float) -> Delivery:
        """Wait at most ``timeout_s`` for what is on its way; then stop, count, and tell."""
        with self._queued:
            self._closing.set()
            self._queued.notify_all()
        self._sender.join(timeout_s)
        self._warnings.silent = True
        with self._queued:
            lost = self._lost + len(self._queue)
        left = self._spool.close()
        courier = self._courier
        delivery = Delivery(courier.delivered, left, lost, courier.run_id, self._spool.folder)
        if left or lost:
            _LOG.warning("%s", delivery)
        return delivery

    def _lose(self, why: str) -> None:
        with self._queued:
            self._lost += 1
        self._warnings.say(f"tracking lost an event: {why}")

    def _keep(self) -> None:
        """The journal thread: from memory to disk, until the queue is closed and empty."""
        told: set[str] = set()
        while True:
            with self._queued:
                self._queued.wait_for(lambda: self._queue or self._closing.is_set())
                if not self._queue:
                    break
                event = self._queue[0]
            try:
                self._write(legal(event, told))
            except Exception as fault:  # a file that is gone, a disk that stays full
                self._lose(reason(fault))
            with self._queued:
                self._queue.popleft()
                self._queue_bytes -= _num_bytes(event)
        self._spool.finish()

    def _write(self, events: list[Event]) -> None:
        """Append to the spool; a full disk is waited for, as long as the job goes on."""
        while events:
            try:
                self._spool.append(events[0])
                events = events[1:]
            except OSError as fault:
                if fault.errno not in _DISK_MAY_RECOVER or self._closing.is_set():
                    raise
                self._warnings.say(f"cannot write {self._spool.folder}: {one_line(fault)}")
                self._closing.wait(1)

    def _send(self) -> None:
        """The sender thread: from disk to MLflow, until all is sent or hope is given up."""
        faults, last_chances = 0, LAST_CHANCES
        while not self._spool.closed:
            complete = self._spool.complete
            try:
                sent = self._courier.deliver_next()
            except Exception as fault:  # MLflow, its drivers and the network raise all sorts
                faults = self._after(fault, faults + 1)
                last_chances -= bool(faults) and self._closing.is_set()
                if not last_chances:
                    return
                continue
            faults, last_chances = 0, LAST_CHANCES
            if not sent:
                if complete:
                    return
                self._spool.wait()

    def _after(self, fault: Exception, faults: int) -> int:
        """Deal with the ``faults``-th failure in a row; the number that still counts."""
        if self._spool.closed:
            return faults
        with suppress(OSError, StorageError):  # the spool's disk is full, or it was closed
            if self._courier.set_aside(fault, patient=faults < PATIENCE):
                self._warnings.say(f"MLflow refuses an event, the others go on: {reason(fault)}")
                return 0
        self._warnings.say(
            f"MLflow does not take events ({reason(fault)}); the job goes on, "
            f"{self._spool.num_left} events wait in {self._spool.folder}"
        )
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(faults - 1, 9))
        if self._closing.wait(pause):
            time.sleep(FIRST_PAUSE_SECONDS)  # close() has cut the pause short
        return faults


class _Warnings:
    """The log's share of an outage: at most one line a minute, however long it lasts."""

    def __init__(self) -> None:
        self.silent = False
        self._lock = threading.Lock()
        self._last = -WARNING_SECONDS
        self._unsaid = 0

    def say(self, text: str) -> None:
        with self._lock:
            now = time.monotonic()
            if self.silent or now - self._last < WARNING_SECONDS:
                self._unsaid += 1
                return
            more = f" (and {self._unsaid} more since the last warning)" if self._unsaid else ""
            self._last, self._unsaid = now, 0
        _LOG.warning("%s%s", text, more)


def _num_bytes(event: Event) -> int:
    content = event.get("content", b"")
    return len(content) if isinstance(content, bytes | str) else 0
