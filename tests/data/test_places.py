"""What a job reads: made absolute, and looked for before anything else is begun."""

import tarfile
from operator import attrgetter
from pathlib import Path

import pytest

from pipeline.config import (
    ClusterJob,
    DetectJob,
    LabelJob,
    PretrainDinoJob,
    TrainClassifierJob,
    TrainDetectorJob,
)
from pipeline.config.settings import Settings
from pipeline.data.places import absolute_places, require_places, with_absolute_places
from pipeline.errors import ConfigError, DataError
from pipeline.storage import Location


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "labels"):
        (tmp_path / name).mkdir()
    for name in ("gt.json", "weights.pth", "one.txt"):
        (tmp_path / name).touch()
    tarfile.open(tmp_path / "photos.tar", "w").close()
    return tmp_path


def dino(*images: str, **others: object) -> PretrainDinoJob:
    return PretrainDinoJob.model_validate({"images": images, **others})


def test_everything_a_run_reads_and_writes_becomes_absolute(here: Path) -> None:
    probe = {"images": "photos", "ground_truth": "gt.json", "labelled": "labels"}
    job = dino("photos/*.jpg", "photos.tar", init="weights.pth", probe=probe)
    changed = with_absolute_places(job.model_copy(update={"tracking_uri": "sqlite:///x.db"}))
    assert changed.images == (f"{here}/photos/*.jpg", f"{here}/photos.tar")
    assert changed.init == f"{here}/weights.pth"
    assert changed.output == f"{here}/runs"
    assert changed.tracking_uri == f"sqlite:///{here}/x.db"
    assert changed.probe.images == f"{here}/photos"
    assert changed.probe.labelled == f"{here}/labels"
    assert with_absolute_places(changed) == changed
    # And nothing else changed.
    kept = {"images", "init", "output", "tracking_uri", "probe"}
    assert changed.model_dump(exclude=kept) == job.model_dump(exclude=kept)


@pytest.mark.parametrize(
    "job",
    [
        LabelJob(images="photos/*.jpg", output="out", backbone={"checkpoint": "weights.pth"}),
        DetectJob(images="photos", detector="labels", output="out"),
        DetectJob(labels="labels", detector="~/labels", output="file:///out"),
        ClusterJob(labels="labels", output="out", backbone={"checkpoint": "weights.pth"}),
    ],
)
def test_so_does_all_that_a_job_over_images_or_boxes_names(here: Path, job: Settings) -> None:
    changed = with_absolute_places(job)
    for name in [*job.places, "output"]:
        given, now = attrgetter(name)(job), attrgetter(name)(changed)
        assert now == (given if given is None else str(Location.parse(given)))
        assert now is None or now.startswith("/")
    assert with_absolute_places(changed) == changed


def test_published_weights_keep_their_name_unless_a_file_has_it(here: Path) -> None:
    job = dino("photos", init="vit_small_patch16_224.dino")
    assert absolute_places(job)["init"] == "vit_small_patch16_224.dino"
    (here / "vit_small_patch16_224.dino").touch()
    assert absolute_places(job)["init"] == f"{here}/vit_small_patch16_224.dino"


def test_places_that_were_not_given_are_none_of_ours(here: Path) -> None:
    assert set(absolute_places(dino("photos"))) == {"images"}


@pytest.mark.parametrize(
    "job",
    [ClusterJob, DetectJob, LabelJob, PretrainDinoJob, TrainClassifierJob, TrainDetectorJob],
)
def test_every_listed_place_is_a_setting(job: type[Settings]) -> None:
    assert job.places
    for name in job.places:
        *groups, last = name.split(".")
        settings = job
        for group in groups:
            kind = settings.model_fields[group].annotation
            assert isinstance(kind, type)
            assert issubclass(kind, Settings)
            settings = kind
        assert last in settings.model_fields


@pytest.mark.parametrize("images", ["photos", "photos/*.jpg", "one.txt", "photos.tar"])
def test_what_is_there_passes(here: Path, images: str) -> None:
    require_places(dino(images, init="a_published.name", probe={"labelled": "labels"}))


@pytest.mark.parametrize(
    ("job", "named"),
    [
        (dino("photos", "nothing"), "nothing does not exist"),
        (dino("nothing/*.jpg"), "nothing is no folder"),
        (dino("nothing.tar"), r"--images: there is no .*nothing\.tar"),
        (dino("photos", probe={"labelled": "none"}), r"--probe\.labelled: there is no"),
        (
            dino("photos", probe={"images": "photos", "ground_truth": "no.json"}),
            r"--probe\.ground-truth: there is no",
        ),
        (TrainDetectorJob(labels="labels", add_labels="no"), "--add-labels: there is no"),
    ],
)
def test_what_is_not_there_is_named(here: Path, job: PretrainDinoJob, named: str) -> None:
    with pytest.raises(DataError, match=named):
        require_places(job)


def test_a_folder_that_will_be_downloaded_need_not_be_there(here: Path) -> None:
    job = TrainClassifierJob.model_validate({"data": {"name": "cifar10", "root": "data"}})
    with pytest.raises(DataError, match=r"--data\.root: there is no"):
        require_places(job)
    require_places(job, but=("data.root",))


def test_a_store_we_do_not_read_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match="ftp"):
        absolute_places(dino("ftp://host/photos"))
