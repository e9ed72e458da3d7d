"""What a job tells MLflow, told so that MLflow can never stop or slow the job.

    with start_tracker(None, experiment="patchseed") as tracker:
        tracker.log_params({"rule": "solost"})
        tracker.log_metrics({"images_per_second": 12.5}, step=3)

A ``log_*`` call costs microseconds and never raises; a daemon thread does the rest
(tracking/delivery.py). What MLflow has not taken at the end is counted in one warning, and sent by
the same command run again: a job keeps its tracker's ``tag`` beside its results, and tells what
lies there. Without a URI runs go to ``./mlflow.db``, and their artifacts to ``./mlartifacts``
beside it, both as absolute paths.

To record another kind of thing: add a ``log_*`` method to ``Tracker``, and send it in
``Courier.send``. This file is the only one that imports MLflow.
"""

import fcntl
import json
import logging
import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pipeline.errors import ConfigError, without_secrets
from pipeline.tracking.delivery import Courier, Delivery, Event, MlflowRun, Outbox

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

OFF = "off"
CLOSE_SECONDS = 15.0
# Of a job that has nothing else to do than to tell again what it came to.
AGAIN_SECONDS = 120.0
# MLflow's own are 120 s and 7 retries: half an hour in which nothing is sent and nobody is told.
REQUEST_SECONDS, REQUEST_RETRIES = 10, 0

_SERVERS = ("http", "https")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


class Tracker(ABC):
    """A run being recorded; as a context manager it closes with the status its block ended in.

    Nothing here raises. What MLflow would refuse is made legal: other characters in names become
    ``_``, long texts are cut, a metric that is not finite becomes the tag ``not_finite.<metric>``,
    and a parameter that has another value already (after a resume) the tag ``changed.<parameter>``.
    """

    tag: str | None = None
    """By which a later tracker finds the run; None where nothing is recorded."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until it is known."""
        return None

    def wait_for_run_id(self, timeout_s: float = CLOSE_SECONDS) -> str | None:
        """``run_id``, awaited for at most ``timeout_s``: workers' runs need their parent's."""
        return self.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings, as ``str`` gives them now."""
        self._record("params", lambda: {"values": _texts(params)})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Record or change labels of the run; the last value wins."""
        self._record("tags", lambda: {"values": _texts(tags)})

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers, or what ``float`` makes one; without a step they belong to step 0."""
        self._record("metrics", lambda: {"values": _numbers(metrics), "step": int(step or 0)})

    def log_text(self, text: str, artifact_path: str) -> None:
        """Record a text as an artifact; secrets in it are blotted out."""
        self._record("file", lambda: {"path": artifact_path, "content": str(text)})

    def log_dict(self, values: Mapping[str, Any], artifact_path: str) -> None:
        """Record a mapping as an artifact, in JSON; secrets in it are blotted out."""
        self._record("file", lambda: {"path": artifact_path, "content": _json(values)})

    def log_artifact_bytes(self, data: bytes, artifact_path: str) -> None:
        """Record bytes, such as a PNG picture, as an artifact, as they are."""
        self._record("file", lambda: {"path": artifact_path, "content": bytes(data)})

    @abstractmethod
    def close(self, status: RunStatus = "FINISHED", timeout_s: float | None = None) -> Delivery:
        """End the run, wait at most ``timeout_s`` for what is on its way, say what became of it.

        Events that MLflow does not have by then are counted in a warning. A second call changes
        nothing. Without ``timeout_s`` 15 seconds are waited, 120 where a run is told again.
        """

    @abstractmethod
    def _record(self, kind: str, make: Callable[[], Event]) -> None:
        """Take one event; ``make`` snapshots its values and may raise."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")


class NoTracker(Tracker):
    """Records nothing: what the URI ``off`` gives."""

    def close(self, status: RunStatus = "FINISHED", timeout_s: float | None = None) -> Delivery:
        """An empty delivery."""
        return Delivery()

    def _record(self, kind: str, make: Callable[[], Event]) -> None:
        return


class MlflowTracker(Tracker):
    """Records in MLflow by way of an outbox; ``start_tracker`` makes it."""

    def __init__(self, run: MlflowRun, courier: Courier) -> None:
        self.tag = run.tag
        self._patience = AGAIN_SECONDS if run.again else CLOSE_SECONDS
        self._outbox = Outbox(courier)
        self._courier = courier
        self._delivery: Delivery | None = None

    @property
    def run_id(self) -> str | None:
        return self._courier.run_id

    def wait_for_run_id(self, timeout_s: float = CLOSE_SECONDS) -> str | None:
        self._courier.run_known.wait(timeout_s)
        return self.run_id

    def close(self, status: RunStatus = "FINISHED", timeout_s: float | None = None) -> Delivery:
        if self._delivery is None:
            self._record("end", lambda: {"status": status})
            self._delivery = self._outbox.close(self._patience if timeout_s is None else timeout_s)
        return self._delivery

    def _record(self, kind: str, make: Callable[[], Event]) -> None:
        self._outbox.record(kind, make)


def start_tracker(
    uri: str | None,
    *,
    experiment: str,
    run_name: str | None = None,
    known: Mapping[str, Any] | None = None,
    parent_run_id: str | None = None,
    again: bool = False,
) -> Tracker:
    """A tracker for one run; MLflow is imported and reached in the background.

    A run that is there already goes on; metrics it has at the same step are not sent again.

    Args:
        uri: MLflow server or database; None is ``$MLFLOW_TRACKING_URI``, else sqlite in
            ``./mlflow.db``; ``off`` records nothing.
        experiment: made where it does not exist.
        run_name: None lets MLflow make one up.
        known: an earlier tracker's ``run_id`` or ``tag``, or both: its run goes on, if it is there.
        parent_run_id: the run below which this one is shown.
        again: a finished run is told once more: files that it has are not sent, it ends as it did.

    Raises:
        ConfigError: MLflow 3 has no such store, or the experiment's name is empty or too long.
    """
    if uri == OFF:
        return NoTracker()
    uri = absolute_uri(uri)
    if not experiment.strip() or len(experiment) > 500:
        raise ConfigError(f"experiment must have 1 to 500 characters, got {experiment[:60]!r}")
    experiment, known = without_secrets(experiment), known or {}
    run = MlflowRun(
        experiment=experiment,
        tag=known.get("tag") or uuid.uuid4().hex,
        name=run_name and without_secrets(run_name)[:250],
        run_id=known.get("run_id"),
        parent_run_id=parent_run_id,
        again=again,
        artifacts=_artifacts(uri, experiment),
    )
    return MlflowTracker(run, Courier(run, lambda: connect(uri)))


def absolute_tracking_uri(uri: str | None) -> str:
    """The URI as workers in other folders understand it; ``off`` stays.

    Raises:
        ConfigError: as of `absolute_uri`.
    """
    return OFF if uri == OFF else absolute_uri(uri)


def absolute_uri(uri: str | None) -> str:
    """The tracking URI with nothing relative in it.

    None is ``$MLFLOW_TRACKING_URI`` as everywhere in MLflow, else sqlite in ``./mlflow.db``.

    Raises:
        ConfigError: MLflow 3 has no such store, or a password stands in a server's address.
    """
    if uri is None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in _SERVERS + _DATABASES or "://" not in uri:
        raise ConfigError(
            "tracking_uri must be sqlite:////absolute/path.db, http(s)://server, postgresql:// or "
            f"mysql:// (MLflow 3 keeps no runs in plain folders), or off; got {_shown(uri)}"
        )
    if scheme in _SERVERS and (not parts.hostname or "@" in parts.netloc):
        raise ConfigError(
            "tracking_uri of a server must be http(s)://host[:port], with MLFLOW_TRACKING_USERNAME "
            f"and MLFLOW_TRACKING_PASSWORD in the environment if it wants them; got {_shown(uri)}"
        )
    if scheme != "sqlite":
        return uri
    path, _, options = uri.partition(":///")[2].partition("?")
    if not path or path.startswith(":"):
        raise ConfigError(
            f"tracking_uri of sqlite must be sqlite:////absolute/path.db; got {_shown(uri)}"
        )
    return f"{parts.scheme}:///{os.path.abspath(path)}" + (f"?{options}" if options else "")


def _artifacts(uri: str, experiment: str) -> str | None:
    """A database's new experiments keep artifacts beside it; a server knows its own place."""
    if urlsplit(uri).scheme in _SERVERS:
        return None
    beside = Path(_sqlite_file(uri) or "mlflow.db").absolute().parent
    return str(beside / "mlartifacts" / re.sub(r"[^\w.-]", "_", experiment))


def connect(uri: str) -> tuple[Any, Any]:
    """An MlflowClient and the module mlflow.entities; import and a new database take seconds."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow.entities
    import mlflow.environment_variables as defaults

    # Changed as MLflow's defaults, not in the environment: what the user has set there still wins,
    # and child processes do not inherit it.
    defaults.MLFLOW_HTTP_REQUEST_TIMEOUT.default = REQUEST_SECONDS
    defaults.MLFLOW_HTTP_REQUEST_MAX_RETRIES.default = REQUEST_RETRIES
    defaults.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.default = True
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
    with _alone(_sqlite_file(uri)):
        return mlflow.MlflowClient(tracking_uri=uri), mlflow.entities


@contextmanager
def _alone(database: str | None) -> Iterator[None]:
    """Let one process at a time make a database's tables: Alembic breaks when two do."""
    if database is None:
        yield
        return
    folder = Path(database).parent
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks; a single process needs none
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sqlite_file(uri: str) -> str | None:
    if not uri.startswith("sqlite"):
        return None
    return uri.partition(":///")[2].partition("?")[0]


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, float | str]:
    """Every value as a float, or as text where it is none."""
    numbers: dict[str, float | str] = {}
    for key, value in values.items():
        try:
            numbers[str(key)] = float(value)
        except (TypeError, ValueError, OverflowError):
            numbers[str(key)] = str(value)
    return numbers


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), indent=2, default=str)


def _shown(uri: str) -> str:
    return repr(without_secrets(uri))
