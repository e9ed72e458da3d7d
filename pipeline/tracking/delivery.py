"""The way of an event from a job to one MLflow run, on which nothing can stop or slow the job.

    job --(a bounded queue in memory)--> one daemon thread --(MLflow)--> run

``Outbox`` is the queue and its thread; ``Courier`` makes events legal for MLflow and sends them.
What MLflow has not taken when the job ends is told again by the same command. Everything may
therefore be sent twice: the run is found by its tag ``patchseed.tracker``, a metric carries its own
time, and one that an earlier process sent is left out. To add a kind of event: send it in
``Courier.send``. MLflow itself is handed in (only tracking/tracker.py imports it).
"""

import hashlib
import logging
import math
import posixpath
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from pipeline.errors import one_line, without_secrets

Event = dict[str, Any]

TRACKER_TAG = "patchseed.tracker"
TROUBLE_TAG = "patchseed.tracking_trouble"

QUEUE_EVENTS, QUEUE_BYTES = 10_000, 256 * 2**20
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
WARNING_SECONDS = 60.0
# Attempts at one event before it is asked whether the fault is its own.
PATIENCE = 3
# Attempts after close(): an outage that outlasts them is left to the same command, run again.
LAST_CHANCES = 2

KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 8000
# So few that even texts of nothing but escaped Unicode stay below MLflow's 1 MB a request.
TEXTS_PER_CALL, METRICS_PER_CALL = 20, 500
EVENTS_PER_CALL = 256
FILE_NAME_BYTES = 200

_LOG = logging.getLogger("pipeline.tracking.tracker")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Delivery:
    """What became of the events of a tracker."""

    delivered: int = 0
    undelivered: int = 0
    run_id: str | None = None

    def __str__(self) -> str:
        if not self.undelivered:
            return f"{self.delivered} events delivered"
        return (
            f"{self.undelivered} events not delivered to MLflow: the same command run again "
            "(a labelling job with --resume) sends what it lacks"
        )


@dataclass(frozen=True)
class MlflowRun:
    """The MLflow run that events belong to."""

    experiment: str
    tag: str
    name: str | None = None
    run_id: str | None = None
    parent_run_id: str | None = None
    again: bool = False
    """Whether all that is told lies on disk, finished: MLflow gets only what it lacks of it."""

    artifacts: str | None = None
    """Where a new experiment keeps artifacts; None is the server's choice."""


class Outbox:
    """The queue and its thread, a daemon: it never keeps a process alive."""

    def __init__(self, courier: "Courier") -> None:
        self._courier = courier
        self._changed = threading.Condition()
        self._queue: deque[Event] = deque()
        self._queue_bytes = 0
        self._delivered = self._lost = 0
        self._closing = threading.Event()
        self._closed = False
        self._warned = -WARNING_SECONDS
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def record(self, kind: str, make: Callable[[], Event]) -> None:
        """Queue one event; ``make`` snapshots its values; a fault in it costs only the event."""
        try:
            event = {"kind": kind, "ms": time.time_ns() // 1_000_000, **make()}
        except Exception as fault:  # whatever a value's str() or float() does
            self._lose(f"{kind} cannot be read: {_reason(fault)}")
            return
        size = _num_bytes(event)
        with self._changed:
            full = len(self._queue) >= QUEUE_EVENTS or self._queue_bytes + size > QUEUE_BYTES
            if not full and not self._closing.is_set():
                self._queue.append(event)
                self._queue_bytes += size
                self._changed.notify()
                return
        self._lose("the queue is full" if full else "the run is closed already")

    def close(self, timeout_s: float) -> Delivery:
        """Wait at most ``timeout_s`` for what is on its way; then stop, count, and tell."""
        with self._changed:
            self._closing.set()
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            self._closed = True
            undelivered = self._lost + len(self._queue)
        delivery = Delivery(self._delivered, undelivered, self._courier.run_id)
        if undelivered:
            _LOG.warning("%s", delivery)
        return delivery

    def _deliver(self) -> None:
        """The thread: until the queue is closed and empty, or hope is given up."""
        faults, most, chances, suspected = 0, EVENTS_PER_CALL, LAST_CHANCES, False
        while chances and not self._closed:
            events: list[Event] = []
            try:
                self._courier.enter_run()
                events = self._next(most)
                if not events:
                    return
                self._courier.send(events)
            except Exception as fault:  # MLflow, its drivers and the network raise all sorts
                if len(events) > 1:
                    most = 1  # one by one, until it shows which of them is to blame
                elif events and (suspected or _is_refusal(fault)):
                    self._remove(events)
                    self._lose(f"MLflow refuses it, the others go on: {_reason(fault)}")
                    faults, suspected = 0, False
                else:
                    faults += 1
                    # An artifact store without credentials must not hold up the metrics. The event
                    # is tried once more, as MLflow may have come back only now.
                    enough = faults >= PATIENCE or self._closing.is_set()
                    suspected = enough and self._courier.takes_a_tag(fault)
                    if not suspected:
                        chances -= self._closing.is_set()
                        self._pause(faults, fault)
                continue
            self._delivered += self._remove(events)
            faults, most, suspected = 0, min(EVENTS_PER_CALL, most * 2), False
            chances = LAST_CHANCES

    def _next(self, most: int) -> list[Event]:
        """The first event, with those after it if all are metrics; none where all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing.is_set())
            first = list(islice(self._queue, most))
        return list(takewhile(lambda event: event["kind"] == "metrics", first)) or first[:1]

    def _remove(self, events: Sequence[Event]) -> int:
        with self._changed:
            for event in events:
                self._queue.popleft()
                self._queue_bytes -= _num_bytes(event)
        return len(events)

    def _pause(self, faults: int, fault: Exception) -> None:
        self._warn(
            f"MLflow does not take events ({_reason(fault)}); the job goes on, "
            f"{len(self._queue)} events wait"
        )
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(faults - 1, 9))
        if self._closing.wait(pause):
            time.sleep(FIRST_PAUSE_SECONDS)  # close() has cut the pause short

    def _lose(self, why: str) -> None:
        with self._changed:
            self._lost += 1
        self._warn(f"tracking lost an event: {why}")

    def _warn(self, text: str) -> None:
        """The log's share of an outage: at most one line a minute, however long it lasts."""
        now = time.monotonic()
        if not self._closed and now - self._warned >= WARNING_SECONDS:
            self._warned = now
            _LOG.warning("%s", text)


class Courier:
    """Takes events to one MLflow run; its methods raise whatever MLflow raises."""

    def __init__(self, run: MlflowRun, connect: Callable[[], tuple[Any, Any]]) -> None:
        """Prepare; nothing is reached yet. ``connect`` gives a client and mlflow.entities."""
        self.run_id: str | None = None
        self.run_known = threading.Event()
        self._run = run
        self._connect = connect
        self._start_ms = time.time_ns() // 1_000_000
        self._client: Any = None
        self._entities: Any = None
        self._found: Any = None
        self._told_as_tags: set[str] = set()

    def enter_run(self) -> None:
        """Find the run, by its id or else its tag, or make it."""
        if self.run_id is not None:
            return
        if self._client is None:
            self._client, self._entities = self._connect()
        self._found = self._run_of_id() or self._run_of_tag()
        if self._found is None:
            tags = {TRACKER_TAG: self._run.tag}
            if self._run.parent_run_id:
                tags["mlflow.parentRunId"] = self._run.parent_run_id
            made = self._client.create_run(self._experiment(), self._start_ms, tags, self._run.name)
            self.run_id = str(made.info.run_id)
        else:
            if not self._run.again:
                self._client.update_run(self._found.info.run_id, status="RUNNING")
            self.run_id = str(self._found.info.run_id)
        self.run_known.set()

    def send(self, events: Sequence[Event]) -> None:
        """Send one event, or several of metrics."""
        event = events[0]
        match event["kind"]:
            case "metrics":
                self._send_metrics(events)
            case "params":
                for chunk in _chunks(_legal_texts(event["values"], PARAM_LENGTH), TEXTS_PER_CALL):
                    self._send_params(dict(chunk))
            case "tags":
                self._send_tags(_legal_texts(event["values"], TAG_LENGTH))
            case "file":
                self._send_file(event["path"], event["content"])
            case "end":
                # A run that is told again ended when it ended.
                if not (self._is_again and self._found.info.status == "FINISHED"):
                    self._client.set_terminated(self.run_id, event["status"], event["ms"])
            case kind:
                raise ValueError(f"an event of kind {kind!r} cannot be sent")

    def takes_a_tag(self, fault: Exception) -> bool:
        """Whether MLflow itself is well; it is told why an event is not there."""
        if self.run_id is None:
            return False
        told = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {_reason(fault)}"
        try:
            self._client.set_tag(self.run_id, TROUBLE_TAG, told, synchronous=True)
        except Exception:  # MLflow takes nothing at all: the event is not to blame
            return False
        return True

    @property
    def _is_again(self) -> bool:
        return self._run.again and self._found is not None

    def _run_of_id(self) -> Any:
        """The run with the id that was given, where there is one."""
        run_id = self._run.run_id
        if run_id is None:
            return None
        try:
            found = self._client.get_run(run_id)
            stage = found.info.lifecycle_stage
        except Exception as fault:
            if getattr(fault, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            stage = "missing"
        if stage != "active":
            _LOG.warning("MLflow's run %s is %s: another one is used", run_id, stage)
            return None
        return found

    def _run_of_tag(self) -> Any:
        """The run that an earlier attempt, or an earlier process, made."""
        wanted = f"tags.`{TRACKER_TAG}` = '{self._run.tag}'"
        return next(iter(self._client.search_runs([self._experiment()], wanted)), None)

    def _experiment(self) -> str:
        name = self._run.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, self._run.artifacts))
            except Exception:
                # Another job may have made it in the meantime; if not, the fault is a real one.
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            _LOG.warning("MLflow's experiment %s was deleted: it is restored", name)
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    @cached_property
    def _metrics_before(self) -> set[tuple[str, int, float]]:
        """Key, step and value of each metric that the run had when it was found."""
        if self._found is None:
            return set()
        return {
            (key, one.step, one.value)
            for key in self._found.data.metrics
            for one in self._client.get_metric_history(self.run_id, key)
        }

    def _send_metrics(self, events: Sequence[Event]) -> None:
        """Finite numbers as metrics; of the others each key's first as a tag (no plot has inf)."""
        metrics: list[Any] = []
        strange: dict[str, str] = {}
        for event in events:
            for name, value in event["values"].items():
                key = legal_key(name)
                if not (isinstance(value, float) and math.isfinite(value)):
                    strange.setdefault(f"not_finite.{name}", f"{value} at step {event['step']}")
                elif (key, event["step"], value) not in self._metrics_before:
                    metrics.append(self._entities.Metric(key, value, event["ms"], event["step"]))
        for chunk in _chunks(metrics, METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=chunk, synchronous=True)
        news = {key: text for key, text in strange.items() if key not in self._told_as_tags}
        self._send_tags(_legal_texts(news, TAG_LENGTH))
        self._told_as_tags |= news.keys()

    def _send_tags(self, values: Sequence[tuple[str, str]]) -> None:
        for chunk in _chunks(values, TEXTS_PER_CALL):
            tags = [self._entities.RunTag(key, text) for key, text in chunk]
            self._client.log_batch(self.run_id, tags=tags, synchronous=True)

    def _send_params(self, values: Mapping[str, str]) -> None:
        """Log parameters; one that has another value already becomes the tag ``changed.<key>``."""
        try:
            self._log_params(values)
        except Exception as fault:
            if not _is_refusal(fault):
                raise
            known = self._client.get_run(self.run_id).data.params
            self._log_params({key: text for key, text in values.items() if key not in known})
            changed = {key: text for key, text in values.items() if known.get(key, text) != text}
            self._send_tags([(legal_key(f"changed.{key}"), text) for key, text in changed.items()])

    def _log_params(self, values: Mapping[str, str]) -> None:
        params = [self._entities.Param(key, text) for key, text in values.items()]
        self._client.log_batch(self.run_id, params=params, synchronous=True)

    def _send_file(self, given: str, content: bytes | str) -> None:
        path = legal_path(given)
        data = content if isinstance(content, bytes) else without_secrets(content).encode()
        folder, name = posixpath.split(path)
        if self._is_again:
            there = self._client.list_artifacts(self.run_id, folder or None)
            if any((one.path, one.file_size) == (path, len(data)) for one in there):
                return
        with TemporaryDirectory(prefix="patchseed-tracking-") as place:
            file = Path(place) / name
            file.write_bytes(data)
            self._client.log_artifact(self.run_id, str(file), folder or None)


def legal_key(text: str) -> str:
    """The key nearest to ``text`` that MLflow takes; a long one ends in a hash to stay unique."""
    characters = re.sub(r"[^\w.\- :/]", "_", without_secrets(text))
    key = posixpath.normpath("/" + characters).lstrip("/") or "_"
    if len(key) <= KEY_LENGTH:
        return key
    return f"{key[: KEY_LENGTH - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def legal_text(text: str, limit: int) -> str:
    """``text`` without secrets, cut to ``limit`` characters with a note of its length."""
    text = without_secrets(text)
    note = f"... ({len(text)} characters)"
    return text if len(text) <= limit else text[: limit - len(note)] + note


def legal_path(text: str) -> str:
    """The relative artifact path nearest to ``text``: no way out of the run, no name too long."""
    path = posixpath.normpath("/" + re.sub(r"[^\w.\- /]", "_", text)).lstrip("/") or "unnamed"
    return "/".join(map(_short_name, path.split("/")))


def _short_name(name: str) -> str:
    if len(name.encode()) <= FILE_NAME_BYTES:
        return name
    return f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{name[-40:]}"


def _legal_texts(values: Mapping[str, str], limit: int) -> list[tuple[str, str]]:
    """Each legal key once, the last value wins."""
    legal = {legal_key(key): legal_text(text, limit) for key, text in values.items()}
    return list(legal.items())


def _is_refusal(fault: Exception) -> bool:
    """Whether MLflow understood the request and will never take it."""
    return getattr(fault, "error_code", "") == "INVALID_PARAMETER_VALUE"


def _reason(fault: BaseException) -> str:
    """Why MLflow did not take something, on one line and without secrets."""
    return without_secrets(one_line(fault))


def _num_bytes(event: Event) -> int:
    return len(event.get("content", b""))


def _chunks(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
