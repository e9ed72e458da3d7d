"""Tracking with a healthy store (real sqlite): what is logged is made legal and read back."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.errors import ConfigError
from pipeline.tracking import delivery
from pipeline.tracking.delivery import legal_key, legal_path, legal_text
from pipeline.tracking.tracker import NoTracker, absolute_uri, start_tracker
from tests.conftest import ROOT

CANARY = "canary-5b1f"


def only_run(uri: str, experiment: str = "lab") -> Any:
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return run


def metric_steps(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri=uri).get_metric_history(run_id, key)
    return [(one.step, one.value) for one in history]


def artifact(uri: str, run_id: str, path: str, folder: Path) -> bytes:
    client = MlflowClient(tracking_uri=uri)
    return Path(client.download_artifacts(run_id, path, str(folder))).read_bytes()


def test_everything_logged_is_read_back(mlflow_uri: str, tmp_path: Path) -> None:
    (tmp_path / "down").mkdir()
    with start_tracker(
        mlflow_uri,
        experiment="lab",
        run_name="r1",
        parent_run_id="p" * 32,
    ) as tracker:
        tracker.log_params({"rule": "solost", "localization.keep_fraction": 0.5, "none": None})
        for step in range(600):
            tracker.log_metrics({"loss": 1 / (step + 1)}, step=step)
        tracker.set_tags({"weights_sha256": "abc"})
        tracker.log_dict({"rows": 3}, "out/_MANIFEST.json")
        tracker.log_text("grüße", "note.txt")
        tracker.log_artifact_bytes(b"\x89PNG", "pictures/grid.png")
        tracker.log_artifact_bytes(b"w" * 1000, "weights.bin")
        assert tracker.wait_for_run_id(60) is not None
    told = tracker.close()
    assert (told.delivered, told.undelivered) == (607, 0)
    run = only_run(mlflow_uri)
    assert run.info.run_id == tracker.run_id
    assert (run.info.run_name, run.info.status) == ("r1", "FINISHED")
    assert run.data.params == {
        "rule": "solost",
        "localization.keep_fraction": "0.5",
        "none": "None",
    }
    assert metric_steps(mlflow_uri, run.info.run_id, "loss") == [
        (s, 1 / (s + 1)) for s in range(600)
    ]
    assert run.data.tags["weights_sha256"] == "abc"
    assert run.data.tags["mlflow.parentRunId"] == "p" * 32
    read = {
        path: artifact(mlflow_uri, run.info.run_id, path, tmp_path / "down")
        for path in ("out/_MANIFEST.json", "note.txt", "pictures/grid.png", "weights.bin")
    }
    assert json.loads(read["out/_MANIFEST.json"]) == {"rows": 3}
    assert read["note.txt"].decode() == "grüße"
    assert read["pictures/grid.png"] == b"\x89PNG"
    assert read["weights.bin"] == b"w" * 1000


def test_default_store_is_absolute_and_beside_its_artifacts(
    empty_mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow_database, "mlflow.db")
    with start_tracker(None, experiment="lab") as tracker:
        tracker.log_text("x", "x.txt")
    run = only_run(f"sqlite:///{tmp_path}/mlflow.db")
    assert run.info.artifact_uri.startswith(f"{tmp_path}/mlartifacts/")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlartifacts", "mlflow.db"]


@pytest.mark.parametrize(
    ("fault", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_status_says_how_the_block_ended(
    mlflow_uri: str, tmp_path: Path, fault: type[BaseException], status: str
) -> None:
    with (
        pytest.raises(fault),
        start_tracker(mlflow_uri, experiment="lab"),
    ):
        raise fault
    assert only_run(mlflow_uri).info.status == status


def test_resumed_run_goes_on_and_a_changed_parameter_becomes_a_tag(
    mlflow_uri: str, tmp_path: Path
) -> None:
    with start_tracker(mlflow_uri, experiment="lab") as first:
        first.log_params({"a": 1, "b": 2})
        first.log_metrics({"loss": 2.0}, step=0)
    with start_tracker(mlflow_uri, experiment="lab", known={"run_id": first.run_id}) as second:
        second.log_params({"a": 1, "b": 3, "c": 4})
        second.log_metrics({"loss": 1.0}, step=1)
    assert second.close().undelivered == 0
    run = only_run(mlflow_uri)
    assert run.data.params == {"a": "1", "b": "2", "c": "4"}
    assert run.data.tags["changed.b"] == "3"
    assert "changed.a" not in run.data.tags
    assert metric_steps(mlflow_uri, run.info.run_id, "loss") == [(0, 2.0), (1, 1.0)]
    assert run.info.status == "FINISHED"


def test_resume_of_an_unknown_run_makes_a_new_one(mlflow_uri: str, tmp_path: Path) -> None:
    with start_tracker(mlflow_uri, experiment="lab", known={"run_id": "0" * 32}) as tracker:
        tracker.log_metrics({"loss": 1.0})
    assert only_run(mlflow_uri).data.metrics == {"loss": 1.0}


def finish(uri: str, tag: str, *, steps: range, again: bool = False) -> int:
    """Tell a finished run as it lies on disk; the number of events that were delivered."""
    with start_tracker(uri, experiment="lab", known={"tag": tag}, again=again) as tracker:
        tracker.log_params({"a": 1})
        for step in steps:
            tracker.log_metrics({"loss": 1 / (step + 1), "up": math.inf}, step=step)
        tracker.log_metrics({"best": 0.5})
        tracker.log_dict({"best": 0.5}, "summary.json")
        tracker.log_artifact_bytes(b"w" * 1000, "model/weights.bin")
    assert tracker.close().undelivered == 0
    return tracker.close().delivered


def test_the_same_told_again_sends_what_is_missing_and_doubles_nothing(
    mlflow_uri: str, tmp_path: Path
) -> None:
    finish(mlflow_uri, "t", steps=range(3, 5))
    before = only_run(mlflow_uri)
    model = Path(before.info.artifact_uri) / "model" / "weights.bin"
    written = model.stat().st_mtime_ns
    (Path(before.info.artifact_uri) / "summary.json").unlink()
    for _ in range(2):
        assert finish(mlflow_uri, "t", steps=range(6), again=True) == 11
        run = only_run(mlflow_uri)
        steps = metric_steps(mlflow_uri, run.info.run_id, "loss")
        assert sorted(steps) == [(step, 1 / (step + 1)) for step in range(6)]
        assert metric_steps(mlflow_uri, run.info.run_id, "best") == [(0, 0.5)]
        summary = artifact(mlflow_uri, run.info.run_id, "summary.json", tmp_path)
        assert json.loads(summary) == {"best": 0.5}
        assert model.stat().st_mtime_ns == written, "a file that MLflow has is not sent"
        assert (run.info.status, run.info.end_time) == ("FINISHED", before.info.end_time)
        assert "changed.a" not in run.data.tags


def test_a_run_told_again_to_a_store_that_lacks_it_is_made_and_ends(mlflow_uri: str) -> None:
    for _ in range(2):
        finish(mlflow_uri, "t", steps=range(3), again=True)
        run = only_run(mlflow_uri)
        assert run.info.status == "FINISHED"
        assert len(metric_steps(mlflow_uri, run.info.run_id, "loss")) == 3


def test_what_mlflow_refuses_is_made_legal(mlflow_uri: str, tmp_path: Path) -> None:
    with start_tracker(mlflow_uri, experiment="lab") as tracker:
        tracker.log_params({"x" * 300: 1, "long": "ü" * 7000, "a$b": 2, "../up": 3})
        tracker.log_params({f"p{i}": i for i in range(150)})
        tracker.log_metrics({f"m{i}": i for i in range(1200)}, step=7)
        tracker.log_metrics({"loss": math.nan, "good": 1}, step=8)
        tracker.log_metrics({"loss": math.inf, "up": math.inf, "corloc": None}, step=9)
        tracker.log_metrics({})
        tracker.log_text("x", "../../escape?.txt")
    assert tracker.close().undelivered == 0
    data = only_run(mlflow_uri).data
    assert len(data.params) == 154
    assert data.params["a_b"] == "2"
    assert data.params["up"] == "3"
    assert data.params["long"].endswith("ü... (7000 characters)")
    assert len(data.params["long"]) == 6000
    assert len(data.metrics) == 1201
    assert data.metrics["m1199"] == 1199.0
    assert data.tags["not_finite.loss"] == "nan at step 8"
    assert data.tags["not_finite.up"] == "inf at step 9"
    assert data.tags["not_finite.corloc"] == "None at step 9"


@pytest.mark.parametrize(
    ("given", "legal"),
    [
        ("a/b.c-d e:f", "a/b.c-d e:f"),
        ("a$b", "a_b"),
        ("a//b/./c", "a/b/c"),
        ("/abs", "abs"),
        ("..", "_"),
        ("", "_"),
        ("line\n", "line_"),
    ],
)
def test_key_is_the_nearest_legal_one(given: str, legal: str) -> None:
    assert legal_key(given) == legal


def test_long_keys_stay_different_and_within_the_limit() -> None:
    keys = {legal_key("k" * 300 + tail) for tail in "ab"}
    assert len(keys) == 2
    assert {len(key) for key in keys} == {250}


def test_long_file_name_keeps_its_suffix() -> None:
    name = legal_path("a/" + "ü" * 300 + ".png").split("/")[1]
    assert name.endswith(".png")
    assert len(name.encode()) <= 255


def test_secret_is_blotted_out_before_a_text_is_cut() -> None:
    assert CANARY not in legal_text(f"{'x' * 50}://user:{CANARY}@host" + "y" * 100, 90)


@pytest.mark.parametrize(
    "uri",
    [
        "./mlruns",
        "/data/mlruns",
        "file:///data/mlruns",
        "runs.db",
        "sqlite://",
        "sqlite:///:memory:",
        "ftp://host",
        "http://",
        f"http://user:{CANARY}@host:5000",
    ],
)
def test_store_that_cannot_work_is_refused_in_one_line(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        absolute_uri(uri)
    assert "must be" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert CANARY not in str(caught.value)


def test_relative_sqlite_path_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///a/b.db?timeout=9") == f"sqlite:///{tmp_path}/a/b.db?timeout=9"
    assert absolute_uri("sqlite:////x/b.db") == "sqlite:////x/b.db"
    assert absolute_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"


def test_environment_uri_is_the_default_as_everywhere_in_mlflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert absolute_uri(None) == "http://elsewhere:5000"
    assert absolute_uri("sqlite:////x/b.db") == "sqlite:////x/b.db"


def test_off_records_nothing(tmp_path: Path) -> None:
    with start_tracker("off", experiment="lab") as tracker:
        tracker.log_metrics({"loss": 1.0})
    assert isinstance(tracker, NoTracker)
    assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []


class Unreadable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_values_that_cannot_be_read_cost_only_their_event(
    mlflow_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with start_tracker(mlflow_uri, experiment="lab") as tracker:
        tracker.log_params({"a": Unreadable()})
        tracker.log_metrics(None)  # type: ignore[arg-type]
        tracker.log_text(Unreadable(), "note.txt")  # type: ignore[arg-type]
        tracker.log_metrics({"good": 1})
    assert tracker.close().undelivered == 3
    assert len(caplog.messages) == 2, "one warning a minute, and the last word"
    assert only_run(mlflow_uri).data.metrics == {"good": 1.0}


def test_full_queue_costs_events_and_says_so(
    mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "QUEUE_EVENTS", 0)
    tracker = start_tracker(mlflow_uri, experiment="lab")
    tracker.log_metrics({"loss": 1.0})
    told = tracker.close()
    assert told.undelivered == 2
    assert str(told).startswith("2 events not delivered to MLflow: the same command run again")


def test_full_queue_is_full_of_bytes_too(mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "QUEUE_BYTES", 1000)
    with start_tracker(mlflow_uri, experiment="lab") as tracker:
        tracker.log_artifact_bytes(b"w" * 1001, "weights.bin")
        tracker.log_metrics({"loss": 1.0})
    assert tracker.close().undelivered == 1
    assert only_run(mlflow_uri).data.metrics == {"loss": 1.0}


WORKER = """
import sys
from pipeline.tracking.tracker import start_tracker
uri, name = sys.argv[1:3]
tracker = start_tracker(uri, experiment="lab", run_name=name)
tracker.wait_for_run_id(120)
for step in range(50):
    tracker.log_metrics({"loss": step}, step=step)
sys.exit(tracker.close(timeout_s=60).undelivered)
"""


def start_worker(*args: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *args], cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.slow
def test_four_processes_share_a_database_that_nobody_made_yet(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    workers = [start_worker(uri, f"w{i}") for i in range(4)]
    told = [worker.communicate(timeout=150) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, told
    assert told == [("", "")] * 4, "MLflow's own chatter must not reach the job's output"
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("lab")
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["w0", "w1", "w2", "w3"]
    for run in runs:
        expected = [(step, float(step)) for step in range(50)]
        assert metric_steps(uri, run.info.run_id, "loss") == expected
