"""Runs read back: written by the tracker into real stores, or lying in folders."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.comparison import recorded_runs
from pipeline.comparison.recorded_runs import read_experiment, read_folders
from pipeline.config import flatten
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.tracking.tracker import start_tracker

METRIC = "test/accuracy_selected"


def summary(seed: int = 0, weight: float = 0.0, value: float = 0.5, **more: Any) -> dict[str, Any]:
    """What a run's summary.json holds."""
    config = {
        "data": {"name": "cifar10", "download": False},
        "model": {"name": "swin", "checkpoint": None},
        "drloc": {"weight": weight, "stages": [-1]},
        "seed": seed,
    }
    return {
        "kind": "classifier",
        "finished": True,
        "name": f"run-{seed}-{weight}",
        "config": config,
        "config_hash": f"hash-{seed}-{weight}",
        "pair_key": "key",
        "data": {"images_sha256": f"images-{seed}"},
        "metrics": {METRIC: value, "val/accuracy_best": 0.25},
        "created_at": 1_700_000_000.0 + seed,
        **more,
    }


def record(content: dict[str, Any], uri: str, experiment: str = "lab") -> str:
    """Have a tracker record the run of a summary; its MLflow id."""
    with start_tracker(uri, experiment=experiment, run_name=content["name"]) as tracker:
        tracker.log_params(flatten(content["config"]))
        tracker.set_tags({"patchseed.kind": content["kind"]})
        tracker.log_metrics({name: value / 2 for name, value in content["metrics"].items()}, step=1)
        tracker.log_metrics(content["metrics"], step=2)
        tags = {"finished": "true" if content["finished"] else "false"}
        tags |= {"pair_key": content["pair_key"], "config_hash": content["config_hash"]}
        tracker.set_tags({f"patchseed.{name}": value for name, value in tags.items()})
        tracker.set_tags({"data.images_sha256": content["data"]["images_sha256"]})
    assert tracker.close().undelivered == 0
    assert tracker.run_id
    return tracker.run_id


def write(content: dict[str, Any], folder: Path) -> None:
    place = folder / content["name"] / "summary.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(content))


def test_tracked_run_is_read_back_as_it_was(mlflow_uri: str, tmp_path: Path) -> None:
    run_id = record(summary(seed=3, weight=0.5, value=0.75), mlflow_uri)
    (found,) = read_experiment("lab", mlflow_uri)
    assert found.name == "run-3-0.5"
    assert (found.seed, found.drloc_weight, found.finished) == (3, 0.5, True)
    assert (found.pair_key, found.config_hash) == ("key", "hash-3-0.5")
    assert found.metrics == {METRIC: 0.75, "val/accuracy_best": 0.25}, "the last values"
    assert found.config["data.name"] == "cifar10"
    assert found.images == "images-3"
    assert run_id in found.where


def test_folders_and_mlflow_give_the_same_records(mlflow_uri: str, tmp_path: Path) -> None:
    contents = [summary(seed=1), summary(weight=0.5), summary(weight=0.1, finished=False)]
    for content in contents:
        record(content, mlflow_uri)
        write({**content, "created_at": time.time()}, tmp_path / "runs")
    tracked, lying = read_experiment("lab", mlflow_uri), read_folders(str(tmp_path / "runs"))
    assert [one.finished for one in lying] == [True, True, False]
    for one, other in zip(tracked, lying, strict=True):
        assert {**vars(one), "where": ""} == {**vars(other), "where": ""}


def test_runs_of_other_kinds_are_not_read(mlflow_uri: str, tmp_path: Path) -> None:
    record(summary(), mlflow_uri)
    record(summary(seed=1, kind="labels"), mlflow_uri)
    assert [one.seed for one in read_experiment("lab", mlflow_uri)] == [0]
    for content in (summary(), summary(seed=1, kind="labels")):
        write(content, tmp_path / "runs")
    (tmp_path / "runs" / "notes.txt").write_text("")
    (tmp_path / "runs" / "begun").mkdir()
    assert [one.seed for one in read_folders(str(tmp_path / "runs"))] == [0]


def test_every_page_is_read_in_the_order_of_the_runs(
    mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_runs, "_PAGE", 2)
    for seed in range(5):
        record(summary(seed=seed), mlflow_uri)
    assert [one.seed for one in read_experiment("lab", mlflow_uri)] == [0, 1, 2, 3, 4]
    for name in ("lab-1", "lab-2", "other"):
        record(summary(), mlflow_uri, experiment=name)
    with pytest.raises(DataError, match="Default, first, lab, lab-1, lab-2, other"):
        read_experiment("nonsense", mlflow_uri)


def test_more_runs_than_a_page_holds_are_all_read(mlflow_uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Param, RunTag

    record(summary(), mlflow_uri)
    client = MlflowClient(tracking_uri=mlflow_uri)
    experiment = client.get_experiment_by_name("lab")
    assert experiment is not None
    shape = client.create_run(experiment.experiment_id)
    client.log_batch(
        shape.info.run_id,
        params=[Param("seed", "7"), Param("drloc.weight", "0.0")],
        tags=[RunTag("patchseed.kind", "classifier"), RunTag("patchseed.pair_key", "k")],
        synchronous=True,
    )
    copies = [f"{number:032x}" for number in range(1, 1201)]
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        # 1200 runs through the client would take a minute.
        for table in ("runs", "params", "tags"):
            names = [row[1] for row in base.execute(f"PRAGMA table_info({table})")]
            kept = ", ".join("?" if name == "run_uuid" else f'"{name}"' for name in names)
            base.executemany(
                f"INSERT INTO {table} SELECT {kept} FROM {table} WHERE run_uuid = ?",
                [(copy, shape.info.run_id) for copy in copies],
            )
    base.close()
    assert len(read_experiment("lab", mlflow_uri)) == 1202


def test_unknown_experiment_is_told_with_the_nearest_name(mlflow_uri: str, tmp_path: Path) -> None:
    record(summary(), mlflow_uri, experiment="flowers-drloc")
    with pytest.raises(DataError, match=r"no experiment 'flower-drloc', did you mean flowers-drl"):
        read_experiment("flower-drloc", mlflow_uri)
    with pytest.raises(DataError, match=r"'first' holds no classifier runs; .*flowers-drloc"):
        read_experiment("first", mlflow_uri)


def test_deleted_experiment_is_not_read(mlflow_uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    record(summary(), mlflow_uri)
    client = MlflowClient(tracking_uri=mlflow_uri)
    experiment = client.get_experiment_by_name("lab")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(DataError, match="has no experiment 'lab'"):
        read_experiment("lab", mlflow_uri)


def test_run_that_lacks_its_seed_is_left_out_with_a_warning(
    mlflow_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = summary(seed=1)
    del bare["config"]["seed"]
    record(bare, mlflow_uri)
    with pytest.raises(DataError, match="none of 1 classifier runs tells its seed"):
        read_experiment("lab", mlflow_uri)
    record(summary(), mlflow_uri)
    assert len(read_experiment("lab", mlflow_uri)) == 1
    assert "is left out: no 'seed'" in caplog.text


def test_reading_makes_neither_a_database_nor_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no MLflow database"):
        read_experiment("lab", f"sqlite:///{tmp_path}/nowhere/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_reading_changes_no_row(mlflow_uri: str, tmp_path: Path) -> None:
    def rows() -> list[str]:
        base = sqlite3.connect(tmp_path / "mlflow.db")
        told = list(base.iterdump())
        base.close()
        return told

    record(summary(), mlflow_uri)
    before = rows()
    read_experiment("lab", mlflow_uri)
    with pytest.raises(DataError):
        read_experiment("lob", mlflow_uri)
    assert rows() == before


def test_store_off_is_no_store_to_read() -> None:
    with pytest.raises(ConfigError, match="--runs FOLDER"):
        read_experiment("lab", "off")


def test_server_that_is_down_is_a_storage_error_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-5b1f")
    with pytest.raises(StorageError, match="cannot be read") as caught:
        read_experiment("lab", f"http://127.0.0.1:{free_port()}")
    assert "\n" not in str(caught.value)
    assert "canary" not in str(caught.value)


def test_folder_without_summaries_is_told_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    with pytest.raises(DataError, match="found 1 entries and 0 summaries"):
        read_folders(str(tmp_path))
    with pytest.raises(DataError, match="there is nothing; give the --output"):
        read_folders(str(tmp_path / "missing"))


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_damaged_summary_costs_a_warning_and_not_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    write(summary(), tmp_path)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "summary.json").write_text(text, encoding="latin-1")
    lacking = summary(seed=2)
    del lacking["pair_key"]
    write(lacking, tmp_path)
    assert [one.seed for one in read_folders(str(tmp_path))] == [0]
    assert "torn/summary.json is left out" in caplog.text
    assert "run-2-0.0/summary.json is left out: no 'pair_key'" in caplog.text


def test_folders_come_in_the_order_of_their_times_however_those_are_written(
    tmp_path: Path,
) -> None:
    times = {"2026-01-02T00:00:00+00:00": 3, 1_700_000_000: 1, "2026-01-01T23:00:00Z": 2, None: 0}
    for when, seed in times.items():
        write(summary(seed=seed, created_at=when), tmp_path)
    assert [one.seed for one in read_folders(str(tmp_path))] == [0, 1, 2, 3]


def test_metric_without_a_value_is_no_metric(tmp_path: Path) -> None:
    write(summary(metrics={METRIC: None, "val/accuracy_last": 0.5}), tmp_path)
    (found,) = read_folders(str(tmp_path))
    assert found.metrics == {"val/accuracy_last": 0.5}


def test_folders_in_a_bucket_are_read(s3_bucket: str) -> None:
    from pipeline.storage import Location

    data = json.dumps(summary(seed=4)).encode()
    Location.parse(f"{s3_bucket}/runs/one/summary.json").write_bytes(data)
    assert [one.seed for one in read_folders(f"{s3_bucket}/runs")] == [4]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def server(mlflow_uri: str, tmp_path: Path) -> Iterator[str]:
    """The address of an MLflow server over the store of the test."""
    address = f"http://127.0.0.1:{free_port()}"
    where = ["--host", "127.0.0.1", "--port", address.rpartition(":")[2], "-w", "1"]
    store = ["--backend-store-uri", mlflow_uri, "--artifacts-destination", str(tmp_path / "art")]
    with (tmp_path / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *where],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.25)
        yield address
    finally:
        # The group is of its own making: the server's workers go with it.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_server_gives_what_its_database_gives(
    server: str, mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_runs, "_PAGE", 2)
    for seed in range(3):
        record(summary(seed=seed, weight=0.5), server)
    assert read_experiment("lab", server) == read_experiment("lab", mlflow_uri)
    assert [one.seed for one in read_experiment("lab", server)] == [0, 1, 2]
    with pytest.raises(DataError, match="did you mean lab"):
        read_experiment("labs", server)
