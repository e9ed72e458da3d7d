"""Data a detector cannot learn from, or only just: refused in one line, or warned of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config import TrainDetectorJob
from pipeline.detection.run import train_detector_here
from pipeline.detection.setup import set_up
from pipeline.errors import DataError, TrainingDiverged
from pipeline.runs.folder import RunFolder
from pipeline.runs.life import Outside
from pipeline.training.workers import Workers
from tests.detection.runs import (
    ALONE,
    Material,
    a_job,
    copy_of,
    probe_of,
    rows_of,
    train,
    write_material,
)
from tests.tables import write_table
from tests.training.two_workers import TwoWorkers


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


def harm_table(material: Material) -> None:
    rows = rows_of(material)
    for row in rows[:3]:
        row.update(status="no_object", boxes=None, scores=None)
    for row in rows[3:]:
        row.update(boxes=[[5.0, 5.0, 5.0, 9.0]])
    write_table(material.labels, rows)


def take_images_away(material: Material) -> None:
    for photo in material.photos()[::2]:
        photo.unlink()


def resize_an_image(material: Material) -> None:
    for photo in material.photos():
        with Image.open(photo) as image:
            image.resize((64, 64)).save(photo)


REFUSALS: dict[str, tuple[Callable[[Material], None], str]] = {
    "no usable box": (
        harm_table,
        "at least one usable box, got none in 12 rows (left out: images: 9 no_usable_box, "
        "3 no_object; boxes: 9 degenerate)",
    ),
    "half of the images gone": (take_images_away, "max-bad-fraction 0.05 of 16 images"),
    "images of another size": (resize_an_image, "pixels as in the table of boxes, got 64x64"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_data_that_cannot_be_learnt_from_is_refused_in_one_line_and_leaves_no_folder(
    material: Material, tmp_path: Path, case: str
) -> None:
    mine = copy_of(material, tmp_path)
    harm, told = REFUSALS[case]
    harm(mine)
    job = a_job(mine, tmp_path / "runs")
    with pytest.raises(DataError) as refused:
        train(job)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "runs").glob("*")) == []


def test_a_probe_that_knows_none_of_its_photos_is_refused_and_leaves_no_folder(
    material: Material, tmp_path: Path
) -> None:
    truth = json.loads(material.truth.read_text())
    for image in truth["images"]:
        image["file_name"] = f"other_{image['id']}.jpg"
    (tmp_path / "other.json").write_text(json.dumps(truth))
    probe = probe_of(material) | {"ground_truth": str(tmp_path / "other.json")}
    with pytest.raises(DataError, match="none of 12 images of"):
        train(a_job(material, tmp_path / "runs", probe=probe))
    assert list((tmp_path / "runs").glob("*")) == []


def test_missing_images_are_replaced_by_others_up_to_the_fraction(
    material: Material, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = copy_of(material, tmp_path)
    take_images_away(mine)
    summary, _ = train(a_job(mine, tmp_path / "runs", data={"max_bad_fraction": 1.0}))
    assert summary["finished"]
    told = [one for one in caplog.messages if "takes its place" in one]
    # Once each by the loader of the steps; that of PreciseBN sees some of them again.
    assert 6 <= len(told) <= 12
    assert {Path(one.split(": ")[0].split()[-1]).exists() for one in told} == {False}


def test_an_image_that_is_damaged_while_the_run_is_under_way_is_warned_of_with_its_name(
    material: Material, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = copy_of(material, tmp_path)
    job = a_job(mine, tmp_path / "runs", data={"max_bad_fraction": 1.0})
    photo = mine.photos()[4]

    def damage(numbers: dict[str, float]) -> None:
        photo.write_bytes(photo.read_bytes()[:300])

    summary, _ = train(job, Outside(lambda line: None, damage))
    assert summary["finished"]
    assert {photo.name in one for one in caplog.messages} == {True}
    assert "the next image of its orientation takes its place" in caplog.text


def test_an_absurd_learning_rate_ends_in_one_line_and_keeps_the_weights_before_it(
    material: Material, tmp_path: Path
) -> None:
    job = a_job(material, tmp_path, optim={"lr": 1e30, "warmup_steps": 0})
    with pytest.raises(TrainingDiverged) as diverged:
        train(job)
    assert diverged.value.exit_code == 8
    told = str(diverged.value)
    assert "loss or gradient is not finite at epoch 1, step" in told
    assert told.endswith("command with --detect-anomaly meets this step again and names its images")
    assert "\n" not in told


SPOILT = 5


def spoilt_job(material: Material, folder: Path, **changes: Any) -> tuple[TrainDetectorJob, str]:
    """A job that weighs its boxes, and the image whose box weighs more than a loss can hold."""
    mine = copy_of(material, folder)
    rows = rows_of(mine)
    rows[SPOILT].update(scores=[3e38])
    write_table(mine.labels, rows)
    job = a_job(mine, folder / "runs", detector={"weight_by_score": True}, **changes)
    return job, rows[SPOILT]["uri"]


def step_with(uri: str, job: TrainDetectorJob) -> tuple[int, list[str]]:
    """The first step that has the image, and all its images."""
    batches = set_up(job, ALONE).task.begin_epoch(0)
    steps = [[one.name for one in batch.samples] for batch in batches]
    return next(found for found in enumerate(steps) if uri in found[1])


def test_the_same_command_with_detect_anomaly_meets_the_step_again_and_names_its_images(
    material: Material, tmp_path: Path
) -> None:
    job, uri = spoilt_job(material, tmp_path)
    watched = job.model_copy(update={"detect_anomaly": True})
    assert RunFolder.of(watched) == RunFolder.of(job)
    step, names = step_with(uri, job)
    told = []
    for one in (job, watched):
        with pytest.raises(TrainingDiverged) as diverged:
            train(one)
        told.append(str(diverged.value))
    plain, found = told
    assert f"at epoch 1, step {step} (" in plain
    assert found.split("; lower")[0] == plain.split("; lower")[0]
    assert found.endswith(f"; images: {', '.join(names)}")


def diverged_with(workers: Workers, job: TrainDetectorJob, folder: RunFolder) -> str:
    with pytest.raises(TrainingDiverged) as diverged:
        train_detector_here(job, folder, workers, Outside(lambda line: None))
    return str(diverged.value)


def test_of_two_workers_the_one_with_the_spoilt_box_names_its_images(
    material: Material, pair: TwoWorkers, tmp_path: Path
) -> None:
    job, uri = spoilt_job(material, tmp_path, detect_anomaly=True)
    _, names = step_with(uri, job)
    mine = next(half for half in (names[:2], names[2:]) if uri in half)
    first, second = pair.run(diverged_with, job, RunFolder.of(job))
    assert first == second
    assert f"worker {int(mine == names[2:])}: " in first
    assert f"worker {int(mine == names[:2])}: " not in first
    assert first.endswith(f"; images: {', '.join(mine)}")
