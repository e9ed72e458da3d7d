"""A detector's run without Ray: stopped and continued, told again, and what is made of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline.config import TrainDetectorJob
from pipeline.data.pseudo_labels import manifest_sha256
from pipeline.detection.exported_detector import load_detector
from pipeline.detection.probe import read_probe
from pipeline.detection.setup import build, read_start
from pipeline.errors import DataError
from pipeline.evaluation.average_precision import average_precision
from pipeline.evaluation.corloc import best_ious, corloc
from pipeline.runs.folder import RunFolder
from pipeline.runs.life import Outside
from pipeline.storage import Location
from tests.detection.runs import (
    NUM_SCENES,
    Material,
    a_job,
    copy_of,
    probe_of,
    rows_of,
    train,
    weights_of,
    write_material,
)
from tests.tables import write_table

# A resumed run repeats the same sums.
SAME = 1e-6
LOSSES = ("box_reg", "classifier", "objectness", "rpn_box_reg")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


Finished = tuple[TrainDetectorJob, dict[str, Any], str]


@pytest.fixture(scope="module")
def uninterrupted(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that nothing happened to and that is not probed, its summary, and what it told."""
    job = a_job(material, tmp_path_factory.mktemp("whole"))
    return job, *train(job)


@pytest.fixture(scope="module")
def probed(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same run, watched."""
    job = a_job(material, tmp_path_factory.mktemp("probed"), probe=probe_of(material))
    return job, *train(job)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def folder_of(job: TrainDetectorJob) -> Path:
    return Path(RunFolder.of(job).place.path)


def model_of(job: TrainDetectorJob) -> dict[str, torch.Tensor]:
    predictor = load_detector(str(folder_of(job) / "model"))
    weights: dict[str, torch.Tensor] = predictor.detector.state_dict()
    return weights


def history(job: TrainDetectorJob) -> list[dict[str, float]]:
    lines = (folder_of(job) / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class Stop(BaseException):
    """As if the process had died."""


def stopping_after(windows: int) -> Outside:
    """Ends the run as soon as so many windows have their checkpoint."""
    told: list[dict[str, float]] = []

    def report(numbers: dict[str, float]) -> None:
        told.append(numbers)
        if len(told) == windows:
            raise Stop

    return Outside(lambda line: None, report)


def stopping_amid(window: int) -> Outside:
    """Ends the run after the second step of a window."""

    def tell(line: str) -> None:
        if line.startswith(f"epoch {window}/3 step 2/4"):
            raise Stop

    return Outside(tell)


def test_a_run_leaves_its_settings_numbers_detector_and_curves(uninterrupted: Finished) -> None:
    job, summary, _ = uninterrupted
    assert summary["finished"]
    assert [one["epoch"] for one in history(job)] == [1, 2, 3]
    for name in LOSSES:
        told = [one[f"train/loss_{name}"] for one in history(job)]
        assert all(0 < value < 10 for value in told)
        assert summary["metrics"][f"train/loss_{name}_last"] == told[-1]
    assert sum(history(job)[-1][f"train/loss_{name}"] for name in LOSSES) < sum(
        history(job)[0][f"train/loss_{name}"] for name in LOSSES
    )
    for name in ("config.yaml", "model/config.json", "figures/curves.png"):
        assert (folder_of(job) / name).stat().st_size > 0
    assert json.loads((folder_of(job) / "summary.json").read_text()) == summary


def test_training_moves_the_weights_far_beyond_what_runs_may_differ_by(
    uninterrupted: Finished,
) -> None:
    job, *_ = uninterrupted
    start = build(job, read_start("none"), num_classes=1).state_dict()
    assert apart(start, weights_of(job)) > 1e4 * SAME


@pytest.mark.parametrize(
    "stopped", [stopping_after(1), stopping_after(2), stopping_amid(2)], ids=["1", "2", "amid"]
)
def test_a_stopped_run_goes_on_to_the_weights_of_an_uninterrupted_one(
    material: Material, uninterrupted: Finished, tmp_path: Path, stopped: Outside
) -> None:
    job = a_job(material, tmp_path, progress_seconds=1e-9)
    with pytest.raises(Stop):
        train(job, stopped)
    assert 1 <= len(history(job)) < 3
    _, told = train(job)
    assert "going on after epoch" in told
    assert [one["epoch"] for one in history(job)] == [1, 2, 3]
    assert apart(weights_of(uninterrupted[0]), weights_of(job)) <= SAME
    assert apart(model_of(uninterrupted[0]), model_of(job)) <= SAME


def test_a_probe_changes_no_weight(uninterrupted: Finished, probed: Finished) -> None:
    assert apart(weights_of(uninterrupted[0]), weights_of(probed[0])) == 0
    assert apart(model_of(uninterrupted[0]), model_of(probed[0])) == 0


def test_a_probed_run_that_was_stopped_measures_what_an_uninterrupted_one_does(
    material: Material, probed: Finished, tmp_path: Path
) -> None:
    job = a_job(material, tmp_path, probe=probe_of(material))
    with pytest.raises(Stop):
        train(job, stopping_after(1))
    train(job)
    assert apart(weights_of(probed[0]), weights_of(job)) <= SAME
    for one, other in zip(history(probed[0]), history(job), strict=True):
        for name in one:
            if name.startswith("probe/"):
                assert one[name] == pytest.approx(other[name], abs=SAME)


def test_probes_of_every_second_and_the_last_window_are_in_history_and_summary(
    probed: Finished,
) -> None:
    job, summary, lines = probed
    for name in ("probe/ap50", "probe/ap", "probe/ar_100", "probe/corloc"):
        told = {one["epoch"]: one[name] for one in history(job) if name in one}
        assert told.keys() == {2, 3}
        assert all(0 <= value <= 1 for value in told.values())
        assert summary["metrics"][f"{name}_last"] == told[3]
    assert f"AP50 {summary['metrics']['probe/ap50_last']:.1%}" in lines
    # With a truth that it never meets, this file would show nothing.
    assert summary["metrics"]["probe/corloc_last"] > 0


def test_the_detector_on_disk_finds_what_the_last_probe_measured(probed: Finished) -> None:
    job, summary, _ = probed
    probe = read_probe(job)
    assert probe is not None
    predictor = load_detector(str(folder_of(job) / "model"))
    found = [predictor.predict(uri) for uri in probe.uris]
    boxes_N4 = np.array([one.boxes_D4[0] if len(one) else np.zeros(4) for one in found])
    hits = corloc(best_ious(boxes_N4, [truth.boxes_N4 for truth in probe.truths]))
    assert hits == summary["metrics"]["probe/corloc_last"]
    stats = average_precision(probe.truths, found, difficult="drop").stats
    assert stats["ap50"] == pytest.approx(summary["metrics"]["probe/ap50_last"], abs=SAME)


def test_the_detector_holds_measured_statistics_and_the_checkpoint_running_ones(
    uninterrupted: Finished,
) -> None:
    job, *_ = uninterrupted
    measured, running = model_of(job), weights_of(job)
    for name in running:
        same = torch.equal(measured[name], running[name])
        assert same == (".running_" not in name and "num_batches" not in name), name


def test_a_detector_without_precise_bn_is_the_checkpoint(
    material: Material, uninterrupted: Finished, tmp_path: Path
) -> None:
    job = a_job(material, tmp_path, precise_bn=0)
    train(job)
    assert apart(model_of(job), weights_of(job)) == 0
    assert apart(weights_of(job), weights_of(uninterrupted[0])) == 0


def test_a_finished_run_is_told_again_and_not_trained(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(material, tmp_path, steps=2, windows=1, precise_bn=0)
    summary, _ = train(job)

    def never(*given: Any) -> None:
        raise AssertionError("it is trained")

    monkeypatch.setattr("pipeline.detection.run.set_up", never)
    again, told = train(job)
    assert again == summary
    assert "finished already" in told


def test_a_run_says_which_boxes_it_learnt_from(material: Material, uninterrupted: Finished) -> None:
    job, summary, told = uninterrupted
    (source,) = summary["labels"]
    assert source["place"] == str(material.labels)
    assert source["manifest_sha256"] == manifest_sha256(Location.parse(str(material.labels)))
    assert (summary["num_images"], summary["num_boxes"]) == (NUM_SCENES, NUM_SCENES)
    assert summary["started_from"] == {"source": "scratch", "sha256": None}
    made_by = json.loads((folder_of(job) / "model" / "config.json").read_text())["made_by"]
    assert made_by["labels"] == summary["labels"]
    assert "12 images with 12 boxes; left out: nothing" in told


def test_a_run_starts_from_the_detector_of_another(
    material: Material, uninterrupted: Finished, tmp_path: Path
) -> None:
    model = folder_of(uninterrupted[0]) / "model"
    job = a_job(material, tmp_path, detector={"init": str(model)}, optim={"lr": 1e-9}, precise_bn=0)
    summary, _ = train(job)
    stored = json.loads((model / "config.json").read_text())
    assert summary["started_from"] == {"source": str(model), "sha256": stored["weights"]["sha256"]}
    learnt = {n: one for n, one in model_of(job).items() if n.endswith((".weight", ".bias"))}
    started = {name: model_of(uninterrupted[0])[name] for name in learnt}
    assert apart(started, learnt) < 1e-6


def test_rate_and_steps_that_were_scaled_to_the_batch_are_told(
    material: Material, tmp_path: Path
) -> None:
    optim = {"lr": 0.04, "reference_batch": 16}
    job = a_job(material, tmp_path, steps=1, windows=2, precise_bn=0, optim=optim)
    _, told = train(job)
    line = "4 steps of 4 images at rate 0.01, scaled from 1 steps of 16 images at 0.04"
    assert f"{line} (--optim.reference-batch)" in told.splitlines()
    assert history(job)[-1]["epoch"] == 2


def test_rate_and_steps_of_this_batch_are_told_as_they_are(uninterrupted: Finished) -> None:
    assert "12 steps of 4 images at rate 0.04" in uninterrupted[2].splitlines()


@pytest.mark.parametrize("moment", ["after a window", "before the first one"])
def test_labels_that_changed_since_the_run_began_are_refused_once_it_learnt_from_them(
    material: Material, tmp_path: Path, moment: str
) -> None:
    mine = copy_of(material, tmp_path)
    job = a_job(mine, tmp_path / "runs", progress_seconds=1e-9)
    with pytest.raises(Stop):
        train(job, stopping_after(1) if moment == "after a window" else stopping_amid(1))
    write_table(mine.labels, rows_of(mine, scores=[0.8]))
    if moment == "before the first one":
        assert train(job)[0]["finished"]
        return
    with pytest.raises(DataError, match="the labels have changed since this run began in") as told:
        train(job)
    assert "--overwrite" in str(told.value)
    assert len(history(job)) == 1
    anew = job.model_copy(update={"overwrite": True})
    assert "going on" not in train(anew)[1]


def test_mlflow_holds_losses_probes_settings_and_which_labels_once_however_often_it_is_told(
    material: Material, mlflow_uri: str, empty_mlflow_database: Path, tmp_path: Path
) -> None:
    job = a_job(
        material,
        tmp_path / "runs",
        **{"tracking_uri": mlflow_uri, "probe": probe_of(material), "steps": 4, "windows": 2},
    )
    summary, _ = train(job)
    check_recorded(job, summary, tmp_path)
    before = (folder_of(job) / "tracking.json").read_bytes()
    # The same command again, and to a store that was not there while it trained.
    train(job)
    assert (folder_of(job) / "tracking.json").read_bytes() == before
    check_recorded(job, summary, tmp_path)
    shutil.copy(empty_mlflow_database, tmp_path / "other.db")
    elsewhere = job.model_copy(update={"tracking_uri": f"sqlite:///{tmp_path}/other.db"})
    for _ in range(2):
        train(elsewhere)
        check_recorded(elsewhere, summary, tmp_path)


def check_recorded(job: TrainDetectorJob, summary: dict[str, Any], folder: Path) -> None:
    """MLflow holds the finished run once, and every number of its epochs once."""
    client = MlflowClient(tracking_uri=job.tracking_uri)
    experiment = client.get_experiment_by_name("patchseed")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["detector.kind"] == "nano"
    assert run.data.tags["patchseed.kind"] == "detector"
    assert run.data.tags["patchseed.finished"] == "true"
    (source,) = summary["labels"]
    assert run.data.tags["data.manifest_sha256.0"] == source["manifest_sha256"]
    for name in (*(f"train/loss_{one}" for one in LOSSES), "probe/ap50", "probe/corloc"):
        told = client.get_metric_history(run.info.run_id, name)
        assert sorted((one.step, one.value) for one in told) == [
            (one["epoch"], one[name]) for one in history(job) if name in one
        ]
        assert told
    for name in ("model/model.safetensors", "model/config.json", "figures/curves.png"):
        kept = client.download_artifacts(run.info.run_id, name, str(folder))
        assert Path(kept).read_bytes() == (folder_of(job) / name).read_bytes()
