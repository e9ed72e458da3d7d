"""The clustering job: what it writes, what it tells, what it refuses."""

import contextlib
import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.clustering.run import cluster_boxes
from pipeline.command_line import parse
from pipeline.config import ClusterJob, EvaluateJob, TrainDetectorJob
from pipeline.config.detection import presets
from pipeline.data.pseudo_labels import (
    MANIFEST_NAME,
    config_hash,
    manifest_sha256,
    read_manifest,
)
from pipeline.detection.setup import set_up
from pipeline.errors import PatchseedError
from pipeline.evaluation.evaluate_boxes import evaluate_boxes
from pipeline.storage import Location
from pipeline.training.workers import Workers
from tests.clustering.coloured import (
    COLOURS,
    MADE_WITH,
    assert_labels_are_the_colours,
    flags_for,
    rows_of,
    write_coloured_table,
)


@dataclass(frozen=True)
class Result:
    """Of a job that ran in this process: a process each would take a minute to start."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_coloured_table(tmp_path)


@pytest.fixture
def flags(tiny_weights: Path) -> list[str]:
    return flags_for(tiny_weights)


def run(table: Path, output: Path, *flags: object) -> Result:
    args = ["--labels", str(table), "--output", str(output), *map(str, flags)]
    with contextlib.redirect_stdout(io.StringIO()) as told:
        try:
            return Result(cluster_boxes(parse(ClusterJob, args)), told.getvalue(), "")
        except PatchseedError as fault:
            return Result(fault.exit_code, told.getvalue(), f"{fault}\n")


def assert_one_line(result: Result, code: int, reason: str) -> None:
    assert result.returncode == code, result.stderr
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_colours_become_labels_and_all_else_stays(
    table: Path, tmp_path: Path, flags: list[str]
) -> None:
    result = run(table, tmp_path / "classes", *flags, "--sheet", tmp_path / "sheet.png")
    assert result.returncode == 0, result.stderr
    assert "cluster: boxes   1: 8  2: 8  3: 8" in result.stdout
    assert_labels_are_the_colours(tmp_path / "classes", {1, 2, 3})
    before, after = rows_of(table), rows_of(tmp_path / "classes")
    for row in before + after:
        del row["labels"]
    assert after == before
    with Image.open(tmp_path / "sheet.png") as sheet:
        sheet.load()
        colours = {colour for _, colour in sheet.getcolors(1 << 24) or ()}
    assert set(COLOURS.values()) <= colours


def test_the_manifest_tells_how_and_from_what(
    table: Path, tmp_path: Path, flags: list[str], tiny_weights: Path
) -> None:
    out = tmp_path / "classes"
    assert run(table, out, *flags, "--seed", 7, "--sheet", "off").returncode == 0
    assert not (tmp_path / "classes_clusters.png").exists()
    source = read_manifest(Location.parse(str(table)))
    made = read_manifest(Location.parse(str(out)))
    assert made.run_id != source.run_id
    assert made.weights_sha256 == source.weights_sha256
    assert made.counts == {"ok": 12, "no_object": 1, "error_read": 1}
    own = {k: v for k, v in made.config.items() if k.startswith("clusters.")}
    assert {k: v for k, v in made.config.items() if k not in own} == MADE_WITH
    assert own == {
        "clusters.labels": str(table),
        "clusters.labels_manifest_sha256": manifest_sha256(Location.parse(str(table))),
        "clusters.num_clusters": 3,
        "clusters.method": "kmeans++",
        "clusters.restarts": 10,
        "clusters.seed": 7,
        "clusters.crop_size": 48,
        "clusters.antialias": True,
        "clusters.backbone": "vit_tiny_patch16_224",
        "clusters.normalize": "imagenet",
        "clusters.weights_sha256": hashlib.sha256(tiny_weights.read_bytes()).hexdigest(),
    }
    assert made.config_hash == config_hash(made.config)
    assert made.job["backbone"] == {"checkpoint": "elsewhere.pth"}
    assert made.job["clusters"]["output"] == str(out)
    assert sorted(path.name for path in out.iterdir()) == [
        MANIFEST_NAME,
        "_run",
        made.files[0].name,
    ]


def test_the_same_command_gives_the_same_labels(
    table: Path, tmp_path: Path, flags: list[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        assert run(table, folder, *flags, "--num-clusters", 5, "--sheet", "off").returncode == 0
    assert rows_of(one) == rows_of(two)
    assert {label for row in rows_of(one) for label in row["labels"] or ()} == {1, 2, 3, 4, 5}


def test_the_way_of_lost_has_its_numbering(table: Path, tmp_path: Path, flags: list[str]) -> None:
    result = run(table, tmp_path / "classes", *flags, "--method", "lost")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    labels = Counter(
        label for row in rows_of(tmp_path / "classes") for label in row["labels"] or ()
    )
    assert sum(labels.values()) == 24
    assert set(labels) <= {1, 2, 3}
    assert (
        read_manifest(Location.parse(str(tmp_path / "classes"))).config["clusters.restarts"] is None
    )


def test_bad_files_are_rows_and_told_and_too_many_end_with_code_six(
    table: Path, tmp_path: Path, flags: list[str]
) -> None:
    (tmp_path / "photos" / "04.png").write_bytes(b"")
    (tmp_path / "photos" / "07.png").write_text("no picture")
    result = run(table, tmp_path / "classes", *flags)
    assert_one_line(result, 6, "2 of 12 images with boxes can no longer be read")
    assert "IMAGES THAT CANNOT BE READ ANY MORE: 2" in result.stdout
    assert_labels_are_the_colours(tmp_path / "classes", {1, 2, 3})
    rows = {row["image_id"]: row for row in rows_of(tmp_path / "classes")}
    assert len(rows) == 14
    assert [rows[name]["status"] for name in ("04.png", "07.png")] == ["error_read", "error_decode"]
    assert rows["04.png"]["boxes"] is rows["04.png"]["labels"] is None
    assert (tmp_path / "classes_clusters.png").is_file()
    allowed = run(table, tmp_path / "again", *flags, "--max-bad-fraction", 0.2, "--sheet", "off")
    assert allowed.returncode == 0


def test_more_clusters_than_boxes_are_one_line_before_anything_is_written(
    table: Path, tmp_path: Path, flags: list[str]
) -> None:
    result = run(table, tmp_path / "classes", *flags, "--num-clusters", 25)
    assert_one_line(result, 2, "--num-clusters must be at most the number of boxes, 24 in")
    assert not (tmp_path / "classes").exists()
    # One less can be read than is in the table.
    (tmp_path / "photos" / "04.png").unlink()
    result = run(table, tmp_path / "classes", *flags, "--num-clusters", 23)
    assert_one_line(result, 2, "--num-clusters must be at most the number of boxes, 22 in")
    assert list((tmp_path / "classes").iterdir()) == []


def test_a_table_is_replaced_only_when_asked_and_only_when_the_new_one_is_ready(
    table: Path, tmp_path: Path, flags: list[str]
) -> None:
    out = tmp_path / "classes"
    assert run(table, out, *flags).returncode == 0
    before = (out / MANIFEST_NAME).read_bytes()
    assert_one_line(
        run(table, out, *flags), 5, "already holds a table: choose another --output, or"
    )
    broken = run(table, out, *flags, "--overwrite", "--num-clusters", 25)
    assert_one_line(broken, 2, "--num-clusters")
    assert (out / MANIFEST_NAME).read_bytes() == before
    again = run(table, out, *flags, "--overwrite", "--num-clusters", 2, "--sheet", "off")
    assert again.returncode == 0, again.stderr
    assert len(rows_of(out)) == 14
    assert {label for row in rows_of(out) for label in row["labels"] or ()} == {1, 2}
    assert len(list(out.glob("*.parquet"))) == 1


def test_a_folder_of_others_is_left_alone(table: Path, tmp_path: Path, flags: list[str]) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    result = run(table, out, *flags, "--overwrite")
    assert_one_line(result, 5, "entries that are not of a labelling run, e.g. thesis.txt")
    assert (out / "thesis.txt").read_text() == "all of it"


def test_places_that_would_spoil_a_table_are_refused(
    table: Path, tmp_path: Path, flags: list[str]
) -> None:
    link = tmp_path / "link"
    link.symlink_to(table)
    for output in (table, link):
        result = run(table, output, *flags, "--overwrite")
        assert_one_line(result, 2, "--output must not be the table of --labels itself")
    for folder in (table, tmp_path / "classes"):
        result = run(table, tmp_path / "classes", *flags, "--sheet", folder / "sheet.png")
        assert_one_line(result, 2, "--sheet must not lie in a table")
    assert len(rows_of(table)) == 14


def test_a_network_without_class_token_and_crops_below_a_patch_are_refused(
    table: Path, tmp_path: Path, tiny_weights: Path, flags: list[str]
) -> None:
    given = ("--backbone.checkpoint", tiny_weights, "--backbone.name")
    for name in ("vit_small_patch14_reg4_dinov2", "resnet50.dino"):
        result = run(table, tmp_path / "classes", *given, name, "--num-clusters", 2)
        assert result.returncode in (2, 4)
        assert result.stderr.count("\n") == 1
    result = run(table, tmp_path / "classes", *flags, "--crop-size", 15)
    assert_one_line(result, 2, "--crop-size: input should be greater than or equal to 16")


def test_no_table_is_a_data_error(tmp_path: Path, flags: list[str]) -> None:
    result = run(tmp_path / "nothing", tmp_path / "classes", *flags)
    assert_one_line(result, 3, f"holds no {MANIFEST_NAME}")


def test_a_detector_is_set_up_with_as_many_classes_and_clusters_meet_the_truth(
    table: Path, tmp_path: Path, flags: list[str]
) -> None:
    classes = tmp_path / "classes"
    assert run(table, classes, *flags).returncode == 0
    given = ["--labels", str(classes), "--output", str(tmp_path / "out"), "--preset", "nano"]
    loaders = ["--num-workers", "0", "--loader-workers", "0", "--detector.init", "none"]
    job = parse(TrainDetectorJob, [*given, *loaders], presets=presets())
    setup = set_up(job, Workers(0, 1, torch.device("cpu")))
    assert setup.table.labels_M.max() == 3
    assert sorted(np.bincount(setup.table.labels_M)[1:].tolist()) == [8, 8, 8]
    predictors: list[Any] = [
        module
        for name, module in setup.state.objective.named_modules()
        if name.endswith("cls_score")
    ]
    assert [one.out_features for one in predictors] == [4]

    truth = {
        "images": [
            {"id": number + 1, "file_name": f"{number:02d}.png", "width": 140, "height": 90}
            for number in range(12)
        ],
        "annotations": [
            {
                "id": 2 * number + place + 1,
                "image_id": number + 1,
                "category_id": number % 3 + 1,
                "bbox": box,
            }
            for number in range(12)
            for place, box in enumerate([[8, 10, 50, 60], [70, 20, 60, 40 + number]])
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(COLOURS, start=1)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    asked = EvaluateJob(labels=str(classes), ground_truth=str(tmp_path / "truth.json"))
    measured = evaluate_boxes(asked)
    found = measured["detection"]["classes"]
    assert found["mean_ap50"] == 100
    assert sorted(found["cluster_of"].values()) == [1, 2, 3]
