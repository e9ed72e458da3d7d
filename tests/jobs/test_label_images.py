"""The labelling job, run as a user runs it: real Ray, and real processes where they are killed."""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest

from pipeline.data.pseudo_labels import SCHEMA, read_manifest
from pipeline.storage import Location
from tests.jobs.conftest import (
    NO_RAY,
    LabelJobs,
    comparable,
    finished_blocks,
    kill,
    line_of,
    processes_below,
    table_of,
    wait_for,
    write_mixed,
    write_photos,
)

pytestmark = pytest.mark.ray

# One actor, because what costs time here is starting processes.
SMALL_BLOCKS = (
    *("--compute.block-size", "2", "--compute.num-actors", "1"),
    *("--progress-seconds", "0.2"),
)
MIXED = ("--max-bad-fraction", "0.5", "--localization.rule", "lost")


class LabelledFolder(NamedTuple):
    photos: Path
    output: Path
    told: str


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 40)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(
    photos: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory, ray_address: str
) -> pa.Table:
    output = tmp_path_factory.mktemp("uninterrupted") / "labels"
    done = LabelJobs(tiny_weights, output.parent, ray_address).run(photos, output, *SMALL_BLOCKS)
    assert done.returncode == 0, done.stderr
    return comparable(output)


@pytest.fixture(scope="module")
def labelled(
    tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory, ray_address: str
) -> LabelledFolder:
    """A folder of ten images of all kinds, and the table of it."""
    photos = write_mixed(tmp_path_factory.mktemp("mixed") / "photos", 6)
    (photos / "notes.txt").write_bytes(b"not an image")
    good = (photos / "part-0" / "photo-000.png").read_bytes()
    (photos / "näme with % # \n.png").write_bytes(good)
    output = photos.parent / "labels"
    done = LabelJobs(tiny_weights, photos.parent, ray_address).run(photos, output, *MIXED)
    assert done.returncode == 0, done.stderr
    return LabelledFolder(photos, output, done.stdout)


def test_a_mixed_folder_gives_one_row_per_file_with_its_status(labelled: LabelledFolder) -> None:
    table = table_of(labelled.output)
    assert table.schema.remove_metadata() == SCHEMA
    statuses = {
        row["uri"].removeprefix(f"{labelled.photos}/"): row["status"] for row in table.to_pylist()
    }
    assert len(statuses) == 10
    assert statuses["truncated.png"] == "error_decode"
    assert statuses["empty.JPG"] == "error_read"
    assert statuses["page.jpg"] == "error_decode"
    assert sorted(statuses.values()).count("ok") == 7
    assert "found 10 images" in labelled.told
    assert "1 .txt" in labelled.told
    for row in table.to_pylist():
        if row["status"] == "ok":
            x0, y0, x1, y1 = row["boxes"][0]
            assert 0 <= x0 < x1 <= row["width"]
            assert 0 <= y0 < y1 <= row["height"]


def test_the_manifest_says_how_the_table_was_made(labelled: LabelledFolder) -> None:
    manifest = json.loads((labelled.output / "_MANIFEST.json").read_text())
    assert manifest["config"]["localization.rule"] == "lost"
    assert manifest["config"]["backbone.weights_sha256"] == manifest["weights_sha256"]
    assert manifest["versions"].keys() >= {"python", "torch", "ray", "patchseed"}
    row = table_of(labelled.output).to_pylist()[0]
    assert row["run_id"] == manifest["run_id"]
    assert row["config_hash"] == manifest["config_hash"]


def test_a_second_run_is_refused_until_told_to_overwrite(
    label_jobs: LabelJobs, labelled: LabelledFolder, tmp_path: Path
) -> None:
    photos, output = labelled.photos, tmp_path / "labels"
    shutil.copytree(labelled.output, output)
    before = comparable(output)
    refused = label_jobs.run(photos, output, *MIXED)
    assert refused.returncode == 5
    assert "already holds a finished table" in refused.stderr
    other = label_jobs.run(photos, output, *MIXED, "--resume", "--localization.rule", "solost")
    assert other.returncode == 2
    assert "localization.rule: 'lost' there, 'solost' now" in other.stderr
    again = label_jobs.run(photos, output, *MIXED, "--resume")
    assert again.returncode == 0
    assert "nothing is left to do" in again.stdout
    run_id = table_of(output)["run_id"][0]
    assert label_jobs.run(photos, output, *MIXED, "--overwrite").returncode == 0
    assert table_of(output)["run_id"][0] != run_id
    assert comparable(output).equals(before)


def test_a_killed_driver_resumes_to_the_table_of_an_uninterrupted_run(
    label_jobs: LabelJobs, photos: Path, uninterrupted: pa.Table, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    job = label_jobs.start(photos, output, *SMALL_BLOCKS)
    wait_for(lambda: len(finished_blocks(output)) >= 5, job)
    kill(job)
    kept = {path: path.stat().st_mtime_ns for path in finished_blocks(output)}
    assert 5 <= len(kept) < 20
    assert not (output / "_MANIFEST.json").exists()
    # Killed again, early, on a cluster that outlives it, and resumed for good.
    cluster = label_jobs.ray_address
    job = label_jobs.start(photos, output, "--resume", *SMALL_BLOCKS, RAY_ADDRESS=cluster)
    wait_for(lambda: len(finished_blocks(output)) > len(kept), job)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "recomputed"
    kill(job)
    done = label_jobs.run(photos, output, "--resume", *SMALL_BLOCKS)
    assert done.returncode == 0, done.stderr
    assert "resuming: " in done.stdout
    assert comparable(output).equals(uninterrupted)


@pytest.mark.slow
def test_a_killed_actor_loses_nothing(
    label_jobs: LabelJobs, photos: Path, uninterrupted: pa.Table, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    job = label_jobs.start(photos, output, *SMALL_BLOCKS)
    wait_for(lambda: len(finished_blocks(output)) >= 3, job)
    actors = [p for p in processes_below(job) if "LabelBlock" in line_of(p)]
    assert actors, [line_of(p)[:60] for p in processes_below(job)]
    actors[0].send_signal(signal.SIGKILL)
    assert job.wait(timeout=240) == 0
    assert comparable(output).equals(uninterrupted)


@pytest.mark.parametrize(
    ("blocks_before", "joins"), [pytest.param(1, False, marks=pytest.mark.slow), (3, True)]
)
def test_a_job_keeps_others_out_and_at_sigterm_ends_with_143_and_leaves_nothing_behind(
    label_jobs: LabelJobs, photos: Path, tmp_path: Path, blocks_before: int, joins: bool
) -> None:
    output = tmp_path / "labels"
    env = {"RAY_ADDRESS": label_jobs.ray_address} if joins else {}
    job = label_jobs.start(photos, output, *SMALL_BLOCKS, **env)
    wait_for(lambda: (output / "_lease.json").exists(), job)
    second = label_jobs.run(photos, output, "--resume", *SMALL_BLOCKS)
    assert second.returncode == 5
    assert f"in use by process {job.pid}" in second.stderr
    wait_for(lambda: len(finished_blocks(output)) >= blocks_before, job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 143
    log = next(label_jobs.folder.glob("job-*.log")).read_text()
    assert "Interrupted: what is finished is kept, --resume goes on with it" in log
    assert not (output / "_lease.json").exists()
    assert len(finished_blocks(output)) >= blocks_before


@pytest.mark.slow
def test_failed_rows_are_labelled_again_when_asked(label_jobs: LabelJobs, tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "labels"
    write_photos(photos, 5)
    broken = photos / "part-0" / "photo-000.png"
    good = broken.read_bytes()
    broken.write_bytes(good[:100])
    first = label_jobs.run(photos, output)
    assert first.returncode == 6
    assert "TooManyBadImages: 1 of 5 images failed" in first.stderr
    ids = table_of(output)["image_id"]
    broken.write_bytes(good)
    second = label_jobs.run(photos, output, "--resume", "--retry-failed")
    assert second.returncode == 0, second.stderr
    manifest = read_manifest(Location.parse(str(output)))
    assert (manifest.counts, manifest.passes) == ({"ok": 5}, 2)
    assert table_of(output)["image_id"].equals(ids)


@pytest.mark.parametrize(
    ("images", "code", "complaint"),
    [("nowhere", 3, "nowhere does not exist"), ("empty", 3, "no image")],
)
def test_nothing_to_label_is_told_before_ray_starts_and_leaves_no_trace(
    label_jobs: LabelJobs, tmp_path: Path, images: str, code: int, complaint: str
) -> None:
    (tmp_path / "empty").mkdir()
    done = label_jobs.run(tmp_path / images, tmp_path / "labels", RAY_ADDRESS=NO_RAY)
    assert done.returncode == code
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "labels").iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_what_is_done_stays(
    label_jobs: LabelJobs, photos: Path, uninterrupted: pa.Table, small_disk: Path
) -> None:
    output = small_disk / "labels"
    full = label_jobs.run(photos, output, *SMALL_BLOCKS)
    assert full.returncode == 5, full.stderr
    assert "StorageError: cannot write" in full.stderr
    assert "--resume" in full.stderr
    assert full.stderr.count("\n") == 1
    assert finished_blocks(output)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    done = label_jobs.run(photos, output, "--resume", *SMALL_BLOCKS)
    assert done.returncode == 0, done.stderr
    assert comparable(output).equals(uninterrupted)
