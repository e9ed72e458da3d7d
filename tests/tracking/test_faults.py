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

from pipeline.errors import DataError, StorageError
from pipeline.tracking.tracker import Tracker, deliver_spool, main, start_tracker
from tests.conftest import ROOT

CANARY = "canary-5b1f"


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


def check_run(uri: str, num_steps: int = 50) -> None:
    """The run of ``log_a_run`` is in the store, once and exactly."""
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("lab")
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rule": "solost", "images": "s3://***@bucket/x"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(s, 1 / (s + 1)) for s in range(num_steps)]
    names = sorted(one.path for one in client.list_artifacts(run.info.run_id))
    assert names == ["config.txt", "grid.png"]


@pytest.mark.parametrize("code", [401, 403, 404, 500, 503])
def test_failing_server_leaves_all_in_the_spool_and_warns_once(
    serve: Any, mlflow_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    tracker = start_tracker(serve(answers(code)), experiment="lab", spool=tmp_path / "spool")
    log_a_run(tracker)
    start = time.perf_counter()
    delivery = tracker.close()
    assert time.perf_counter() - start < 15
    assert (delivery.delivered, delivery.spooled, delivery.lost) == (0, 54, 0)
    outage, end = caplog.messages
    assert "MLflow does not take events" in outage
    assert end == (
        f"54 events not delivered; they are in {delivery.spool}; "
        f"send them with: python -m pipeline.tracking.tracker {delivery.spool}"
    )
    assert deliver_spool(tmp_path / "spool", mlflow_uri).delivered == 54
    check_run(mlflow_uri)
    assert not (tmp_path / "spool").exists()


def test_hanging_server_costs_microseconds_a_call_and_close_keeps_its_time(
    serve: Any, tmp_path: Path
) -> None:
    tracker = start_tracker(serve(hangs), experiment="lab", spool=tmp_path / "spool")
    time.sleep(0.2)
    seconds = log_a_run(tracker, num_steps=2000)
    assert statistics.median(seconds) < 1e-4
    assert statistics.quantiles(seconds, n=100)[-1] < 5e-3
    start = time.perf_counter()
    delivery = tracker.close(timeout_s=1.0)
    assert time.perf_counter() - start < 2.0
    assert delivery.spooled == 2004


def test_calls_cost_microseconds_while_a_slow_store_works(mlflow_uri: str, tmp_path: Path) -> None:
    with start_tracker(mlflow_uri, experiment="lab", spool=tmp_path / "spool") as tracker:
        assert tracker.wait_for_run_id(60)
        seconds = log_a_run(tracker, num_steps=2000)
    assert statistics.median(seconds) < 1e-4
    assert tracker.close().spooled == 0


SCRIPT = """
import os, sys, time
from pathlib import Path
from pipeline.tracking.tracker import start_tracker
uri, spool, end = sys.argv[1:4]
tracker = start_tracker(uri, experiment="lab", spool=Path(spool))
for step in range(50):
    tracker.log_metrics({"loss": 1 / (step + 1)}, step=step)
if end == "kill":
    time.sleep(1)
    os.kill(os.getpid(), 9)
elif end == "close":
    time.sleep(3)
    tracker.close(timeout_s=0.5)
"""


def run_script(uri: str, spool: Path, end: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SCRIPT, uri, str(spool), end]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("end", ["close", "forgotten"])
def test_process_ends_promptly_while_the_server_hangs(serve: Any, tmp_path: Path, end: str) -> None:
    start = time.perf_counter()
    done = run_script(serve(hangs), tmp_path / "spool", end)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 10
    assert "Traceback" not in done.stderr


def test_killed_job_leaves_a_spool_that_can_be_delivered(mlflow_uri: str, tmp_path: Path) -> None:
    done = run_script(f"http://127.0.0.1:{free_port()}", tmp_path / "spool", "kill")
    assert done.returncode == -signal.SIGKILL
    assert deliver_spool(tmp_path / "spool", mlflow_uri).delivered == 50


def test_broken_artifact_store_does_not_hold_up_metrics(mlflow_uri: str, tmp_path: Path) -> None:
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    tracker = start_tracker(mlflow_uri, experiment="lab", spool=tmp_path / "spool")
    log_a_run(tracker)
    client = MlflowClient(tracking_uri=mlflow_uri)
    run_id = tracker.wait_for_run_id(60)
    assert run_id
    until(lambda: client.get_run(run_id).data.metrics == {"loss": 1 / 50})
    delivery = tracker.close()
    assert (delivery.delivered, delivery.spooled) == (52, 2)
    run = client.get_run(run_id)
    assert "patchseed.tracking_trouble" in run.data.tags
    (tmp_path / "mlartifacts").unlink()
    assert deliver_spool(tmp_path / "spool").delivered == 2
    check_run(mlflow_uri)


def test_secret_reaches_neither_database_nor_spool_nor_log(
    serve: Any, mlflow_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start_tracker(
        serve(answers(500)), experiment=f"e://me:{CANARY}@x", spool=tmp_path / "spool"
    )
    log_a_run(tracker)
    tracker.set_tags({f"k://me:{CANARY}@x": f"AWS_SECRET_ACCESS_KEY={CANARY}"})
    tracker.log_dict({"uri": f"s3://me:{CANARY}@b"}, "config.json")
    tracker.log_metrics({"loss": f"s3://me:{CANARY}@b"})
    tracker.close()
    assert files_with_the_canary(tmp_path / "spool", "config.txt") == []
    assert deliver_spool(tmp_path / "spool", mlflow_uri).spooled == 0
    assert files_with_the_canary(tmp_path, "config.json") == []
    assert CANARY not in caplog.text


def files_with_the_canary(folder: Path, written: str) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert written in [path.name for path in files]
    return [path for path in files if CANARY.encode() in path.read_bytes()]


def test_events_that_are_sent_twice_are_recorded_once(
    serve: Any, mlflow_uri: str, tmp_path: Path
) -> None:
    tracker = start_tracker(serve(answers(500)), experiment="lab", spool=tmp_path / "spool")
    log_a_run(tracker)
    tracker.close()
    shutil.copytree(tmp_path / "spool", tmp_path / "copy")
    assert deliver_spool(tmp_path / "spool", mlflow_uri).delivered == 54
    assert deliver_spool(tmp_path / "copy", mlflow_uri).delivered == 54
    check_run(mlflow_uri)


def test_garbled_and_half_written_lines_do_not_hold_up_the_others(
    serve: Any, mlflow_uri: str, tmp_path: Path
) -> None:
    tracker = start_tracker(serve(answers(500)), experiment="lab", spool=tmp_path / "spool")
    log_a_run(tracker)
    spool = tracker.close().spool
    assert spool
    lines = (spool / "events.jsonl").read_text()
    (spool / "events.jsonl").write_text("garbled\n" + lines + '{"kind": "met')
    again = deliver_spool(spool, mlflow_uri)
    assert (again.delivered, again.spooled) == (54, 1)
    check_run(mlflow_uri)


FULL_DISK = """
import resource, sys
from pathlib import Path
from pipeline.tracking.tracker import start_tracker
uri, spool = sys.argv[1:3]
tracker = start_tracker(uri, experiment="lab", spool=Path(spool))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(50):
    tracker.log_metrics({"loss": step}, step=step)
delivery = tracker.close()
print(delivery.spooled, delivery.lost)
"""


def test_full_disk_costs_events_but_never_half_a_line(mlflow_uri: str, tmp_path: Path) -> None:
    down = f"http://127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, down, str(tmp_path / "spool")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    spooled, lost = map(int, done.stdout.split())
    assert spooled > 0
    assert spooled + lost == 51
    assert deliver_spool(tmp_path / "spool", mlflow_uri).delivered == spooled


def test_spool_of_a_running_job_is_left_alone(serve: Any, mlflow_uri: str, tmp_path: Path) -> None:
    tracker = start_tracker(serve(answers(500)), experiment="lab", spool=tmp_path / "spool")
    with pytest.raises(StorageError, match="in use by a running job"):
        deliver_spool(tmp_path / "spool", mlflow_uri)
    tracker.close()


def test_delivery_to_a_server_that_is_down_keeps_the_spool(serve: Any, tmp_path: Path) -> None:
    tracker = start_tracker(serve(answers(500)), experiment="lab", spool=tmp_path / "spool")
    log_a_run(tracker)
    tracker.close()
    with pytest.raises(StorageError, match="54 are still in"):
        deliver_spool(tmp_path / "spool")


def test_delivery_of_nothing_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tracking spool"):
        deliver_spool(tmp_path)


def test_command_line_delivers_and_tells_by_its_exit_code(
    serve: Any, mlflow_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = start_tracker(serve(answers(500)), experiment="lab", spool=tmp_path / "spool")
    log_a_run(tracker)
    spool = tracker.close().spool
    assert main([str(spool)]) == StorageError.exit_code
    assert main([str(spool), "--tracking-uri", mlflow_uri]) == 0
    assert capsys.readouterr().out == "54 events delivered\n"
    assert main([str(spool)]) == DataError.exit_code


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
def test_server_killed_in_mid_run_is_made_whole_after_its_restart(
    mlflow_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    server = start_server(tmp_path, port)
    tracker = start_tracker(f"http://127.0.0.1:{port}", experiment="lab", spool=tmp_path / "spool")
    try:
        log_a_run(tracker, num_steps=20)
        until(lambda: list((tmp_path / "artifacts").rglob("*.png")))
    finally:
        kill(server)
    assert statistics.median(log_steps(tracker, range(20, 400))) < 1e-4
    delivery = tracker.close()
    assert delivery.spooled >= 380
    assert delivery.delivered + delivery.spooled == 404
    server = start_server(tmp_path, port)
    try:
        again = deliver_spool(tmp_path / "spool")
        assert again.delivered == delivery.spooled
        assert again.run_id == tracker.run_id
        check_run(f"http://127.0.0.1:{port}", num_steps=400)
    finally:
        kill(server)


@pytest.mark.slow
def test_server_that_comes_back_during_the_run_gets_everything(
    mlflow_uri: str, tmp_path: Path
) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    tracker = start_tracker(address, experiment="lab", spool=tmp_path / "spool")
    log_a_run(tracker)
    server = start_server(tmp_path, port)
    try:
        tracker.wait_for_run_id(60)
        assert tracker.close(timeout_s=60).spooled == 0
        check_run(address)
    finally:
        kill(server)
