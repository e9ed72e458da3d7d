"""Events made legal for MLflow, and carried from a spool to one MLflow run.

Everything sent may be sent twice without harm: metrics and the run's end carry their own times, and
the run is found again by the tag ``patchseed.tracker``, so an answer that never came makes neither
a second run nor a second value. MLflow itself is handed in (only tracking/tracker.py imports it).
To add a kind of event: make it legal in ``legal``, send it in ``Courier._send``.
"""

import hashlib
import logging
import math
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any, TypeVar

from pipeline.errors import one_line, without_secrets
from pipeline.tracking.spool import Event, Spool, parsed

TRACKER_TAG = "patchseed.tracker"
TROUBLE_TAG = "patchseed.tracking_trouble"

KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 8000
# So few that even texts of nothing but escaped Unicode stay below MLflow's 1 MB a request.
TEXTS_PER_CALL, METRICS_PER_CALL = 20, 500
EVENTS_PER_CALL = 256
FILE_NAME_BYTES = 200

_LOG = logging.getLogger(__name__)
_Item = TypeVar("_Item")


def legal(event: Event, told: set[str]) -> list[Event]:
    """What MLflow will take for ``event``: none, one or two events, without secrets.

    Args:
        event: as a ``log_*`` call made it.
        told: tags of metrics already told as not finite; those found now are added.
    """
    values = event.get("values", {})
    match event["kind"]:
        case "params" | "tags" as kind:
            limit = PARAM_LENGTH if kind == "params" else TAG_LENGTH
            texts = {legal_key(key): legal_text(text, limit) for key, text in values.items()}
            return [{**event, "values": texts}] if texts else []
        case "metrics":
            return _legal_metrics(event, values, told)
        case "file":
            return [_legal_file(event)]
    return [event]


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


def reason(fault: BaseException) -> str:
    """Why MLflow did not take something, on one line and without secrets."""
    return without_secrets(one_line(fault))


def _legal_metrics(event: Event, values: Mapping[str, float | str], told: set[str]) -> list[Event]:
    """Finite numbers as metrics; of the others each key's first as a tag (a plot has no inf)."""
    finite = {
        legal_key(key): value
        for key, value in values.items()
        if isinstance(value, float) and math.isfinite(value)
    }
    strange = {
        legal_key(f"not_finite.{key}"): legal_text(f"{value} at step {event['step']}", TAG_LENGTH)
        for key, value in values.items()
        if not (isinstance(value, float) and math.isfinite(value))
    }
    news = {key: text for key, text in strange.items() if key not in told}
    told.update(news)
    events = [{**event, "values": finite}] if finite else []
    return events + ([{"kind": "tags", "ms": event["ms"], "values": news}] if news else [])


def _legal_file(event: Event) -> Event:
    content = event["content"]
    if isinstance(content, str):
        content = without_secrets(content).encode()
    folder, name = posixpath.split(legal_path(event["path"]))
    return {**event, "folder": folder, "name": name, "content": content}


def _short_name(name: str) -> str:
    if len(name.encode()) <= FILE_NAME_BYTES:
        return name
    return f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{name[-40:]}"


class Courier:
    """Takes events from a spool to one run; its methods raise whatever MLflow raises."""

    def __init__(
        self, spool: Spool, connect: Callable[[], tuple[Any, Any]], artifacts: str | None
    ) -> None:
        """Prepare; nothing is reached yet.

        Args:
            spool: where the events wait; its header says which run they belong to.
            connect: gives an MlflowClient and the module mlflow.entities.
            artifacts: where a new experiment keeps artifacts; None is the server's choice.
        """
        self.run_id: str | None = None
        self.run_known = threading.Event()
        self.delivered = 0
        self._spool = spool
        self._connect = connect
        self._artifacts = artifacts
        self._client: Any = None
        self._entities: Any = None
        self._most = EVENTS_PER_CALL

    def deliver_next(self) -> int:
        """Send the next event, or the next metrics together; 0 where the spool is empty."""
        if self.run_id is None:
            self.run_id = self._enter_run()
            self.run_known.set()
        lines = self._spool.peek(self._most)
        if not lines:
            return 0
        events = _sendable_together([parsed(line) for line in lines])
        try:
            self._send(events)
        except Exception:
            if len(events) == 1:
                raise
            self._most = 1  # one by one, until it shows which of them is to blame
            return self.deliver_next()
        self._most = min(EVENTS_PER_CALL, self._most * 2)
        self._spool.advance(lines[: len(events)], self.run_id)
        self.delivered += len(events)
        return len(events)

    def set_aside(self, fault: Exception, *, patient: bool) -> bool:
        """Take the next event out of the others' way, if the fault is its own.

        A plain refusal is the event's own fault. Without ``patient`` so is any other while MLflow
        takes a tag: an artifact store without credentials must not hold up the metrics.

        Returns:
            False where MLflow itself is at fault, and the event has to wait.
        """
        if self.run_id is None:
            return False
        if not _refused(fault):
            if patient:
                return False
            try:
                told = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {reason(fault)}"
                self._client.set_tag(self.run_id, TROUBLE_TAG, told, synchronous=True)
            except Exception:  # MLflow takes nothing at all: the event is not to blame
                return False
            with suppress(Exception):  # MLflow may have come back only now: once more
                self.deliver_next()
                return True
        self._spool.set_aside(reason(fault))
        return True

    def _enter_run(self) -> str:
        """The id of the run: the one to resume, the one an earlier attempt made, or a new one."""
        if self._client is None:
            self._client, self._entities = self._connect()
        header = self._spool.header
        experiment = self._experiment(header["experiment"])
        wanted = self._spool.run_id or header["run_id"]
        if wanted and self._resumes(wanted, header["run_id"]):
            return str(wanted)
        tag = header["tracker"]
        for run in self._client.search_runs([experiment], f"tags.`{TRACKER_TAG}` = '{tag}'"):
            return str(run.info.run_id)
        tags = {TRACKER_TAG: tag}
        if header["parent_run_id"]:
            tags["mlflow.parentRunId"] = header["parent_run_id"]
        run = self._client.create_run(experiment, header["start_ms"], tags, header["run_name"])
        return str(run.info.run_id)

    def _resumes(self, run_id: str, resumed: str | None) -> bool:
        """Whether the store has the run; a run that a job goes on with is running again."""
        try:
            stage = self._client.get_run(run_id).info.lifecycle_stage
        except Exception as fault:
            if getattr(fault, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            stage = "missing"
        if stage != "active":
            _LOG.warning("MLflow's run %s is %s: a new run is made", run_id, stage)
            return False
        if run_id == resumed:
            self._client.update_run(run_id, status="RUNNING")
        return True

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, self._artifacts))
            except Exception:
                # Another job may have made it in the meantime; if not, the fault is a real one.
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            _LOG.warning("MLflow's experiment %s was deleted: it is restored", name)
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _send(self, events: Sequence[Event]) -> None:
        event = events[0]
        match event["kind"]:
            case "metrics":
                for metrics in _chunks(self._metrics(events), METRICS_PER_CALL):
                    self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)
            case "params":
                for chunk in _chunks(list(event["values"].items()), TEXTS_PER_CALL):
                    self._send_params(dict(chunk))
            case "tags":
                self._send_tags(event["values"])
            case "file":
                folder = event["folder"] or None
                self._client.log_artifact(self.run_id, self._spool.blob(event), folder)
            case "end":
                self._client.set_terminated(self.run_id, event["status"], event["ms"])
            case kind:
                raise ValueError(f"an event of kind {kind!r} cannot be sent")

    def _metrics(self, events: Sequence[Event]) -> list[Any]:
        return [
            self._entities.Metric(key, value, event["ms"], event["step"])
            for event in events
            for key, value in event["values"].items()
        ]

    def _send_tags(self, values: Mapping[str, str]) -> None:
        for chunk in _chunks(list(values.items()), TEXTS_PER_CALL):
            tags = [self._entities.RunTag(key, text) for key, text in chunk]
            self._client.log_batch(self.run_id, tags=tags, synchronous=True)

    def _send_params(self, values: Mapping[str, str]) -> None:
        """Log parameters; one that has another value already becomes the tag ``changed.<key>``."""
        try:
            self._log_params(values)
        except Exception as fault:
            if not _refused(fault):
                raise
            known = self._client.get_run(self.run_id).data.params
            self._log_params({key: text for key, text in values.items() if key not in known})
            changed = {key: text for key, text in values.items() if known.get(key, text) != text}
            self._send_tags({legal_key(f"changed.{key}"): text for key, text in changed.items()})

    def _log_params(self, values: Mapping[str, str]) -> None:
        params = [self._entities.Param(key, text) for key, text in values.items()]
        self._client.log_batch(self.run_id, params=params, synchronous=True)


def _refused(fault: Exception) -> bool:
    """Whether MLflow understood the request and will never take it."""
    return getattr(fault, "error_code", "") == "INVALID_PARAMETER_VALUE"


def _sendable_together(events: list[Event]) -> list[Event]:
    """The first event, with those after it if all are metrics: one request instead of many."""
    return list(takewhile(lambda event: event["kind"] == "metrics", events)) or events[:1]


def _chunks(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
