"""Tracking when MLflow fails: servers that are down, killed, slow or broken never touch the job."""

import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.tracking import delivery
from pipeline.tracking.delivery import Courier, MlflowRun
from pipeline.tracking.tracker import MlflowTracker, Tracker, connect, start_tracker
from tests.conftest import ROOT

CANARY = "canary-5b1f"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage is an outage, however often a test's server is asked whether it is over."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE_SECONDS", 0.05)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler], None]], str]]:
    """Starts a server that answers every request as the given function does; gives its URI."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[BaseHTTPRequestHandler], None]) -> str:
        class Handler(BaseHTTPRequestHandler):
            do_GET = do_POST = do_PUT = do_PATCH = answer

            def log_message(self, *args: object) -> None:
                """Keep the test's output clean."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answers(code: int) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda request: request.send_error(code)


def hangs(request: BaseHTTPRequestHandler) -> None:
    time.sleep(60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(happened: Callable[[], object], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def log_a_run(tracker: Tracker, num_steps: int = 50) -> list[float]:
    """Log one of everything and ``num_steps`` metrics; the seconds that each metric's call took."""
    tracker.log_params({"rule": "solost", "images": f"s3://me:{CANARY}@bucket/x"})
    tracker.log_text(f"from https://me:{CANARY}@host/x", "config.txt")
    tracker.log_artifact_bytes(b"\x89PNG", "grid.png")
    return log_steps(tracker, range(num_steps))


def log_steps(tracker: Tracker, steps: range) -> list[float]:
    """Log a metric at each step; the seconds that each call took."""
    seconds = []
    for step in steps:
        start = time.perf_counter()
        tracker.log_metrics({"loss": 1 / (step + 1)}, step=step)
        seconds.append(time.perf_counter() - start)
    return seconds


def tell(uri: str, tag: str | None, *, num_steps: int = 50) -> None:
    """The same command, run again: all that lies on disk is told once more."""
    with start_tracker(uri, experiment="lab", known={"tag": tag}, again=True) as tracker:
        log_a_run(tracker, num_steps)
    assert tracker.close().undelivered == 0


def check_run(uri: str, num_steps: int = 50, experiment: str = "lab") -> None:
    """The run of ``log_a_run`` is in the store, once and exactly."""
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rule": "solost", "images": "s3://***@bucket/x"}
    history = client.get_metric_history(run.info.run_id, "loss")
    told = sorted((m.step, m.value) for m in history)
    assert told == [(s, 1 / (s + 1)) for s in range(num_steps)]
    names = sorted(one.path for one in client.list_artifacts(run.info.run_id))
    assert names == ["config.txt", "grid.png"]


@pytest.mark.parametrize("code", [401, 403, 404, 500, 503])
def test_failing_server_is_counted_warned_of_once_and_told_again_elsewhere(
    serve: Any, mlflow_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    tracker = start_tracker(serve(answers(code)), experiment="lab")
    log_a_run(tracker)
    start = time.perf_counter()
    told = tracker.close()
    assert time.perf_counter() - start < 15
    assert (told.delivered, told.undelivered) == (0, 54)
    outage, end = caplog.messages
    assert "MLflow does not take events" in outage
    assert end == (
        "54 events not delivered to MLflow: the same command run again "
        "(a labelling job with --resume) sends what it lacks"
    )
    tell(mlflow_uri, tracker.tag)
    check_run(mlflow_uri)


def test_hanging_server_costs_microseconds_a_call_and_close_keeps_its_time(
    serve: Any, tmp_path: Path
) -> None:
    tracker = start_tracker(serve(hangs), experiment="lab")
    time.sleep(0.2)
    seconds = log_a_run(tracker, num_steps=2000)
    assert statistics.median(seconds) < 1e-4
    assert statistics.quantiles(seconds, n=100)[-1] < 5e-3
    start = time.perf_counter()
    told = tracker.close(timeout_s=1.0)
    assert time.perf_counter() - start < 2.0
    assert told.undelivered == 2004


def test_calls_cost_microseconds_while_a_slow_store_works(mlflow_uri: str, tmp_path: Path) -> None:
    with start_tracker(mlflow_uri, experiment="lab") as tracker:
        assert tracker.wait_for_run_id(60)
        seconds = log_a_run(tracker, num_steps=2000)
    assert statistics.median(seconds) < 1e-4
    assert tracker.close().undelivered == 0


SCRIPT = """
import os, sys, time
from pipeline.tracking.tracker import start_tracker
uri, end = sys.argv[1:3]
tracker = start_tracker(uri, experiment="lab", known={"tag": "of-a-job"})
for step in range(50):
    tracker.log_metrics({"loss": 1 / (step + 1)}, step=step)
if end == "kill":
    assert tracker.wait_for_run_id(60)
    os.kill(os.getpid(), 9)
elif end == "close":
    time.sleep(3)
    tracker.close(timeout_s=0.5)
"""


def run_script(uri: str, end: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SCRIPT, uri, end]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("end", ["close", "forgotten"])
def test_process_ends_promptly_while_the_server_hangs(serve: Any, end: str) -> None:
    start = time.perf_counter()
    done = run_script(serve(hangs), end)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 10
    assert "Traceback" not in done.stderr


def test_killed_job_is_made_whole_by_the_same_command(mlflow_uri: str) -> None:
    assert run_script(mlflow_uri, "kill").returncode == -signal.SIGKILL
    tell(mlflow_uri, "of-a-job")
    check_run(mlflow_uri)


class LosesAnswers:
    """An MLflow client each of whose calls is done the first time, and looks as if it were not."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._lost: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            answer = getattr(self._client, name)(*args, **named)
            kind = f"{name} {sorted(named)}"
            if kind not in self._lost:
                self._lost.add(kind)
                raise ConnectionError("the answer never came")
            return answer

        return call


def test_answers_that_never_came_make_no_second_run_and_no_second_value(mlflow_uri: str) -> None:
    client, entities = connect(mlflow_uri)
    run = MlflowRun("lab", "tag")
    tracker = MlflowTracker(run, Courier(run, lambda: (LosesAnswers(client), entities)))
    log_a_run(tracker)
    run_id = tracker.wait_for_run_id(60)
    assert run_id
    until(lambda: client.get_run(run_id).data.metrics == {"loss": 1 / 50})
    told = tracker.close()
    assert (told.delivered, told.undelivered) == (54, 0)
    check_run(mlflow_uri)


@pytest.mark.parametrize("closed_at_once", [False, True])
def test_broken_artifact_store_does_not_hold_up_metrics(
    mlflow_uri: str, tmp_path: Path, closed_at_once: bool
) -> None:
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    tracker = start_tracker(mlflow_uri, experiment="lab")
    log_a_run(tracker)
    client = MlflowClient(tracking_uri=mlflow_uri)
    run_id = tracker.wait_for_run_id(60)
    assert run_id
    if not closed_at_once:
        until(lambda: client.get_run(run_id).data.metrics == {"loss": 1 / 50})
    told = tracker.close()
    assert (told.delivered, told.undelivered) == (52, 2)
    run = client.get_run(run_id)
    assert "patchseed.tracking_trouble" in run.data.tags
    (tmp_path / "mlartifacts").unlink()
    tell(mlflow_uri, tracker.tag)
    check_run(mlflow_uri)


def test_secret_reaches_neither_database_nor_artifacts_nor_log(
    serve: Any, mlflow_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for uri in (serve(answers(500)), mlflow_uri):
        tracker = start_tracker(uri, experiment=f"e://me:{CANARY}@x", run_name=f"s3://{CANARY}@x")
        log_a_run(tracker)
        tracker.set_tags({f"k://me:{CANARY}@x": f"AWS_SECRET_ACCESS_KEY={CANARY}"})
        tracker.log_dict({"uri": f"s3://me:{CANARY}@b"}, "config.json")
        tracker.log_metrics({"loss": f"s3://me:{CANARY}@b"})
        told = tracker.close()
    assert told.undelivered == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "config.txt", "mlflow.db"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in caplog.text


def start_server(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    store += ["--artifacts-destination", str(folder / "artifacts")]
    where = ["--host", "127.0.0.1", "--port", str(port), "-w", "1"]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *where],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    for _ in range(240):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return server
        except OSError:
            time.sleep(0.25)
    kill(server)
    raise AssertionError((folder / "server.log").read_text())


def kill(server: "subprocess.Popen[bytes]") -> None:
    """SIGKILL the server and its workers: the group is of its own making."""
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.slow
def test_server_that_comes_late_is_killed_and_comes_back_holds_all_in_the_end(
    tmp_path: Path, empty_mlflow_database: Path
) -> None:
    shutil.copy(empty_mlflow_database, tmp_path / "mlflow.db")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    late = start_tracker(address, experiment="late")
    log_a_run(late)
    server = start_server(tmp_path, port)
    try:
        assert late.wait_for_run_id(60)
        assert late.close(timeout_s=60).undelivered == 0
        check_run(address, experiment="late")
        pictures = len(list((tmp_path / "artifacts").rglob("*.png")))
        tracker = start_tracker(address, experiment="lab")
        log_a_run(tracker, num_steps=20)
        until(lambda: len(list((tmp_path / "artifacts").rglob("*.png"))) > pictures)
    finally:
        kill(server)
    assert statistics.median(log_steps(tracker, range(20, 400))) < 1e-4
    told = tracker.close()
    assert told.undelivered >= 380
    assert told.delivered + told.undelivered == 404
    server = start_server(tmp_path, port)
    try:
        for _ in range(2):
            tell(address, tracker.tag, num_steps=400)
            check_run(address, num_steps=400)
        (run,) = MlflowClient(address).search_runs(
            [MlflowClient(address).get_experiment_by_name("lab").experiment_id]
        )
        assert run.info.run_id == tracker.run_id
    finally:
        kill(server)
