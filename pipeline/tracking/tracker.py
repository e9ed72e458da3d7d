"""What a job tells MLflow, told so that MLflow can never stop or slow the job.

    with start_tracker(None, experiment="patchseed", spool=Path("spool")) as tracker:
        tracker.log_params({"rule": "solost"})
        tracker.log_metrics({"images_per_second": 12.5}, step=3)

A ``log_*`` call costs microseconds and never raises; two daemon threads do the rest
(tracking/outbox.py). What MLflow does not take lies in ``spool``, and ``python -m
pipeline.tracking.tracker SPOOL`` sends it later. Without a URI runs go to ``./mlflow.db``, and
their artifacts to ``./mlartifacts`` beside it, both as absolute paths.

To record another kind of thing: add a ``log_*`` method to ``Tracker``, then make it legal and send
it in tracking/courier.py. This file is the only one that imports MLflow.
"""

import argparse
import fcntl
import json
import logging
import os
import re
import sys
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pipeline.errors import (
    ConfigError,
    DataError,
    PatchseedError,
    StorageError,
    one_line,
    without_secrets,
)
from pipeline.tracking.courier import Courier, reason
from pipeline.tracking.outbox import Delivery, Outbox
from pipeline.tracking.spool import Event, Spool

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

OFF = "off"
CLOSE_SECONDS = 15.0
# MLflow's own are 120 s and 7 retries: half an hour in which nothing is sent and nobody is told.
REQUEST_SECONDS, REQUEST_RETRIES = 10, 0

_SERVERS = ("http", "https")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_LOG = logging.getLogger("pipeline.tracking.tracker")


class Tracker(ABC):
    """A run being recorded; as a context manager it closes with the status its block ended in.

    Nothing here raises. What MLflow would refuse is made legal: other characters in names become
    ``_``, long texts are cut, a metric that is not finite becomes the tag ``not_finite.<metric>``,
    and a parameter that has another value already (after a resume) the tag ``changed.<parameter>``.
    """

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

    def log_file(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Record a local file as it is, under its own name if ``artifact_path`` says no other.

        It is linked or copied in the background: it may be replaced afterwards, but not rewritten.
        """
        self._record(
            "file",
            lambda: {"path": artifact_path or Path(path).name, "content": Path(path).absolute()},
        )

    @abstractmethod
    def close(self, status: RunStatus = "FINISHED", timeout_s: float = CLOSE_SECONDS) -> Delivery:
        """End the run, wait at most ``timeout_s`` for what is on its way, say what became of it.

        Events that MLflow does not have by then stay in the spool; the log names the command that
        sends them. A second call changes nothing.
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

    def close(self, status: RunStatus = "FINISHED", timeout_s: float = CLOSE_SECONDS) -> Delivery:
        """An empty delivery."""
        return Delivery()

    def _record(self, kind: str, make: Callable[[], Event]) -> None:
        return


class MlflowTracker(Tracker):
    """Records in MLflow by way of an outbox; ``start_tracker`` makes it."""

    def __init__(self, outbox: Outbox, courier: Courier) -> None:
        self._outbox = outbox
        self._courier = courier
        self._delivery: Delivery | None = None

    @property
    def run_id(self) -> str | None:
        return self._courier.run_id

    def wait_for_run_id(self, timeout_s: float = CLOSE_SECONDS) -> str | None:
        self._courier.run_known.wait(timeout_s)
        return self.run_id

    def close(self, status: RunStatus = "FINISHED", timeout_s: float = CLOSE_SECONDS) -> Delivery:
        if self._delivery is None:
            self._record("end", lambda: {"status": status})
            self._delivery = self._outbox.close(timeout_s)
        return self._delivery

    def _record(self, kind: str, make: Callable[[], Event]) -> None:
        self._outbox.record(kind, make)


def start_tracker(
    uri: str | None,
    *,
    experiment: str,
    spool: Path,
    run_name: str | None = None,
    run_id: str | None = None,
    parent_run_id: str | None = None,
) -> Tracker:
    """A tracker for one run; MLflow is imported and reached in the background.

    Args:
        uri: MLflow server or database; None is ``$MLFLOW_TRACKING_URI``, else sqlite in
            ``./mlflow.db``; ``off`` records nothing.
        experiment: made where it does not exist.
        spool: folder on a local disk for what is not delivered; each run gets its own within it.
        run_name: None lets MLflow make one up.
        run_id: a run to go on with; where the store does not have it, a new one is made.
        parent_run_id: the run below which this one is shown.

    Raises:
        ConfigError: MLflow 3 has no such store, or the experiment's name is empty or too long.
    """
    if uri == OFF:
        return NoTracker()
    uri = absolute_uri(uri)
    if not experiment.strip() or len(experiment) > 500:
        raise ConfigError(f"experiment must have 1 to 500 characters, got {experiment[:60]!r}")
    header = {
        "uri": without_secrets(uri),
        "experiment": without_secrets(experiment),
        "run_name": run_name and without_secrets(run_name)[:250],
        "run_id": run_id,
        "parent_run_id": parent_run_id,
        "tracker": uuid.uuid4().hex,
        "start_ms": time.time_ns() // 1_000_000,
    }
    folder = _new_spool(spool, header)
    courier = _courier(folder, uri)
    return MlflowTracker(Outbox(folder, courier), courier)


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


def deliver_spool(path: Path, uri: str | None = None) -> Delivery:
    """Send what earlier runs left in ``path``, and remove from it what MLflow took.

    Args:
        path: one run's spool, or the folder that holds several.
        uri: where to send it; None is where each run was to be recorded.

    Returns:
        The counts over all spools; ``spooled`` counts what MLflow refused and stays on disk.

    Raises:
        ConfigError: the URI had a password, which a spool does not keep, and none was given.
        DataError: there is no spool in ``path``.
        StorageError: MLflow cannot be reached, or the job that writes the spool still runs.
    """
    path = path.absolute()
    headers = sorted([*path.glob("run.json"), *path.glob("*/run.json")])
    if not headers:
        raise DataError(f"{path} holds no tracking spool: give the path that the warning named")
    done = [_deliver_one(Spool(header.parent), uri) for header in headers]
    delivered, spooled = sum(one.delivered for one in done), sum(one.spooled for one in done)
    return Delivery(delivered, spooled, 0, done[-1].run_id, path)


def main(args: Sequence[str] | None = None) -> int:
    """Deliver a spool from the command line; the exit code is 0 when nothing is left in it."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.tracking.tracker",
        description="Send MLflow what it could not be told.",
    )
    parser.add_argument("spool", type=Path, help="the folder that the job's last warning named")
    parser.add_argument("--tracking-uri", help="another MLflow than the one the run was meant for")
    given = parser.parse_args(args)
    try:
        delivery = deliver_spool(given.spool, given.tracking_uri)
    except PatchseedError as fault:
        sys.stderr.write(f"{type(fault).__name__}: {without_secrets(str(fault))}\n")
        return fault.exit_code
    sys.stdout.write(f"{delivery}\n")
    return StorageError.exit_code if delivery.spooled else 0


def _deliver_one(spool: Spool, uri: str | None) -> Delivery:
    try:
        wanted = uri or spool.header["uri"]
        if "***@" in wanted:
            raise ConfigError(f"give --tracking-uri: the spool keeps no password of {wanted}")
        courier = _courier(spool, absolute_uri(wanted))
        spool.recall()
        _drain(courier, spool)
    finally:
        left = spool.close()
    return Delivery(courier.delivered, left, 0, courier.run_id, spool.folder)


def _drain(courier: Courier, spool: Spool) -> None:
    while True:
        try:
            if not courier.deliver_next():
                return
        except Exception as fault:  # MLflow, its drivers and the network raise all sorts
            if not courier.set_aside(fault, patient=False):
                raise StorageError(
                    f"MLflow does not take events ({reason(fault)}); {spool.num_left} are still in "
                    f"{spool.folder}: send them again when MLflow is back"
                ) from fault


def _new_spool(parent: Path, header: Event) -> Spool:
    try:
        return Spool.create(parent, header)
    except (OSError, StorageError) as fault:
        elsewhere = Path(tempfile.mkdtemp(prefix="patchseed-tracking-"))
        _LOG.warning("cannot spool to %s (%s); using %s", parent, one_line(fault), elsewhere)
        return Spool.create(elsewhere, header)


def _courier(spool: Spool, uri: str) -> Courier:
    """A courier to ``uri``; new experiments of a database keep their artifacts beside it."""
    artifacts = None
    if urlsplit(uri).scheme not in _SERVERS:
        beside = Path(_sqlite_file(uri) or "mlflow.db").absolute().parent
        artifacts = str(
            beside / "mlartifacts" / re.sub(r"[^\w.-]", "_", spool.header["experiment"])
        )
    return Courier(spool, lambda: connect(uri), artifacts)


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


if __name__ == "__main__":
    sys.exit(main())
