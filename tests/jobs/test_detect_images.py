"""The detection job, run as a user runs it: real Ray, and a real kill.

What it shares with the labelling job (leases, refusals, full disks, buckets) is tested there.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.pseudo_labels import SCHEMA, read_manifest
from pipeline.detection.exported_detector import load_detector
from pipeline.storage import Location
from tests.conftest import ROOT
from tests.jobs.conftest import (
    NO_RAY,
    DetectJobs,
    comparable,
    finished_blocks,
    kill,
    run_script,
    table_of,
    wait_for,
    write_mixed,
    write_photos,
)
from tests.jobs.here import run_here

SMALL_BLOCKS = (
    *("--compute.block-size", "2", "--compute.num-actors", "1"),
    *("--progress-seconds", "0.2", "--max-bad-fraction", "0.5"),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty photos, and three files that are none."""
    return write_mixed(tmp_path_factory.mktemp("photos"), 20)


@pytest.fixture(scope="module")
def found(
    photos: Path, tiny_detector: Path, tmp_path_factory: pytest.TempPathFactory, ray_address: str
) -> Path:
    """The table of an uninterrupted run."""
    output = tmp_path_factory.mktemp("uninterrupted") / "found"
    done = DetectJobs(tiny_detector, output.parent, ray_address).run(photos, output, *SMALL_BLOCKS)
    assert done.returncode == 0, done.stderr
    assert "found 23 images" in done.stdout
    return output


@pytest.mark.ray
def test_the_table_holds_what_the_detector_finds_image_by_image(
    found: Path, photos: Path, tiny_detector: Path
) -> None:
    predictor = load_detector(str(tiny_detector))
    table = table_of(found)
    assert table.schema.remove_metadata() == SCHEMA
    rows = {row["uri"].removeprefix(f"{photos}/"): row for row in table.to_pylist()}
    bad = {"truncated.png": "error_decode", "empty.JPG": "error_read", "page.jpg": "error_decode"}
    for name, status in bad.items():
        row = rows.pop(name)
        assert (row["status"], row["boxes"]) == (status, None)
    assert len(rows) == 20
    for name, row in rows.items():
        alone = predictor.predict(photos / name)
        assert len(alone) > 1
        assert np.array_equal(np.float32(row["boxes"]), np.float32(alone.boxes_D4))
        assert np.array_equal(np.float32(row["scores"]), np.float32(alone.scores_D))
        assert row["labels"] == alone.labels_D.tolist()
        assert (row["status"], row["method"], row["seed_xy"]) == ("ok", "cad_r2", None)


@pytest.mark.ray
def test_the_manifest_says_which_detector_it_was(found: Path, tiny_detector: Path) -> None:
    manifest = read_manifest(Location.parse(str(found)))
    detector = json.loads((tiny_detector / "config.json").read_text())
    assert manifest.weights_sha256 == detector["weights"]["sha256"]
    assert manifest.config["detector.weights_sha256"] == manifest.weights_sha256
    assert manifest.config["detector.options.score_threshold"] == 0.01
    assert manifest.counts == {"error_decode": 2, "error_read": 1, "ok": 20}
    first = table_of(found).to_pylist()[0]
    assert first["run_id"] == manifest.run_id
    assert first["weights_sha256"] == manifest.weights_sha256


@pytest.mark.ray
def test_the_table_can_be_measured(found: Path, photos: Path, tmp_path: Path) -> None:
    names = sorted(path.relative_to(photos).as_posix() for path in photos.glob("part-*/*.png"))
    sizes = {row["uri"]: (row["width"], row["height"]) for row in table_of(found).to_pylist()}
    images = [
        {"id": i, "file_name": name, "width": width, "height": height}
        for i, name in enumerate(names)
        for width, height in [sizes[f"{photos}/{name}"]]
    ]
    objects = [
        {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [5, 5, 40, 40], "iscrowd": 0}
        for i in range(len(names))
    ]
    truth = tmp_path / "truth.json"
    categories = [{"id": 1, "name": "object"}]
    truth.write_text(
        json.dumps({"images": images, "annotations": objects, "categories": categories})
    )
    done = run_here(
        ROOT / "jobs" / "evaluate_boxes.py",
        *("--labels", found, "--ground-truth", truth, "--num-resamples", 100),
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["labels"]["method"] == "cad_r2"


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_driver_resumes_to_the_table_of_an_uninterrupted_run(
    detect_jobs: DetectJobs, photos: Path, found: Path, tmp_path: Path
) -> None:
    output = tmp_path / "found"
    job = detect_jobs.start(photos, output, *SMALL_BLOCKS)
    wait_for(lambda: len(finished_blocks(output)) >= 2, job)
    kill(job)
    kept = {path: path.stat().st_mtime_ns for path in finished_blocks(output)}
    assert 2 <= len(kept) < 12
    assert not (output / "_MANIFEST.json").exists()
    done = detect_jobs.run(photos, output, "--resume", *SMALL_BLOCKS)
    assert done.returncode == 0, done.stderr
    assert "resuming: " in done.stdout
    assert comparable(output).equals(comparable(found))
    other = detect_jobs.run(photos, output, "--resume", "--score-threshold", "0.5")
    assert other.returncode == 2
    assert "detector.options.score_threshold: 0.01 there, 0.5 now" in other.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_the_images_of_a_table_keep_their_ids(
    detect_jobs: DetectJobs, found: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    done = detect_jobs.run(found, again, "--max-bad-fraction", "0.5")
    assert done.returncode == 0, done.stderr
    assert comparable(again, "config_hash").equals(comparable(found, "config_hash"))
    assert read_manifest(Location.parse(str(again))).collection["kind"] == "labels"


@pytest.mark.parametrize("damage", ["absent", "flipped", "another kind"])
def test_a_detector_that_cannot_be_read_is_one_line_and_exit_code_4(
    tiny_detector: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(tiny_detector, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "absent":
        weights.unlink()
    elif damage == "flipped":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    else:
        config.write_text(json.dumps({"kind": "classifier"}))
    write_photos(tmp_path / "photos", 1)
    done = DetectJobs(folder, tmp_path, NO_RAY).run(tmp_path / "photos", tmp_path / "found")
    assert done.returncode == 4
    assert done.stderr.startswith(f"WeightsError: {folder} holds no detector")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "give either --images or --labels"),
        (["--images", "a", "--labels", "b"], "give either --images or --labels"),
        (["--labels", "b", "--output", "b"], "--output must not be the folder of --labels"),
        (["--images", "a", "--score-threshold", "1.5"], "--score-threshold"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    tiny_detector: Path, tmp_path: Path, flags: list[str], complaint: str
) -> None:
    given = flags if "--output" in flags else [*flags, "--output", str(tmp_path / "found")]
    done = run_here(ROOT / "jobs" / "detect_images.py", "--detector", tiny_detector, *given)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_a_table_that_is_none_is_told_before_ray_starts(
    tiny_detector: Path, tmp_path: Path
) -> None:
    done = run_script(
        ROOT / "jobs" / "detect_images.py",
        *("--detector", tiny_detector, "--labels", tmp_path, "--output", tmp_path / "found"),
        *("--tracking-uri", "off"),
        RAY_ADDRESS=NO_RAY,
    )
    assert done.returncode == 3
    assert "holds no _MANIFEST.json" in done.stderr
    assert list((tmp_path / "found").iterdir()) == []
