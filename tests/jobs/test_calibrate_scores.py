"""Scores become probabilities: what they are then, what is written, what is refused."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit

from pipeline.data.pseudo_labels import (
    MANIFEST_NAME,
    config_hash,
    iterate_labels,
    manifest_sha256,
    read_labels,
    read_manifest,
)
from pipeline.storage import Location
from tests.conftest import ROOT
from tests.jobs.conftest import help_without_libraries
from tests.jobs.here import run_here
from tests.tables import Row, label_row, leave_out_later_columns, write_table

JOB = ROOT / "jobs" / "calibrate_scores.py"
Result = subprocess.CompletedProcess[str]

OBJECT, ELSEWHERE = [0.0, 0.0, 50.0, 50.0], [60.0, 60.0, 90.0, 90.0]
SETTINGS = {"localization.rule": "head", "clusters.seed": 7}


def true_probability(score: float) -> float:
    return float(expit(7 * score - 6))


def image(number: int, *, num_boxes: int = 2, **columns: Any) -> Row:
    """A row whose boxes are right as often as their scores say by ``true_probability``."""
    rng = np.random.default_rng(number)
    scores = np.sort(rng.random(num_boxes))[::-1].astype(np.float32).tolist()
    right = [rng.random() < true_probability(score) for score in scores]
    known: dict[str, Any] = {
        "width": 100,
        "height": 100,
        "boxes": [OBJECT if one else ELSEWHERE for one in right],
        "scores": scores,
        "labels": [1] * num_boxes,
    }
    return label_row(f"{number:06d}.jpg", **(known | columns))


def write_truth(place: Path, numbers: Sequence[int]) -> Path:
    """Each of these images has one object."""
    content = {
        "images": [{"id": n, "file_name": f"{n:06d}.jpg"} for n in numbers],
        "annotations": [{"id": n, "image_id": n, "bbox": OBJECT} for n in numbers],
    }
    place.write_text(json.dumps(content))
    return place


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Three hundred images, some without a box, in two files."""
    rows = [image(number) for number in range(300)]
    rows[3] |= {"status": "no_object", "boxes": [], "scores": [], "labels": []}
    rows[4] |= dict.fromkeys(("boxes", "scores", "labels")) | {"status": "error_read"}
    fields = {"weights_sha256": "w1", "job": {"images": "photos"}, "collection": {"root": "x"}}
    write_table(tmp_path / "labels", rows[:200], rows[200:], config=SETTINGS, **fields)
    return tmp_path / "labels"


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Of a hundred images in the table, and of two that are not."""
    return write_truth(tmp_path / "few.json", [*range(100), 1000, 1001])


def arguments(table: Path, truth: Path, output: Path, *flags: object) -> list[object]:
    return ["--labels", table, "--ground-truth", truth, "--output", output, *flags]


def run(table: Path, truth: Path, output: Path, *flags: object) -> Result:
    return run_here(JOB, *arguments(table, truth, output, *flags))


def rows_of(folder: Path) -> list[Row]:
    rows: list[Row] = read_labels(Location.parse(str(folder))).to_pylist()
    return rows


def scores_of(folder: Path) -> list[float]:
    return [score for row in rows_of(folder) for score in row["scores"] or ()]


@pytest.mark.parametrize("method", ["logistic", "isotonic"])
def test_scores_become_the_probabilities_they_were_made_of_and_all_else_stays(
    table: Path, truth: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    result = run(table, truth, out, "--method", method)
    assert result.returncode == 0, result.stderr
    true = np.array([true_probability(score) for score in scores_of(table)])
    assert (
        np.abs(np.array(scores_of(out)) - true).mean() < {"logistic": 0.05, "isotonic": 0.1}[method]
    )
    before, after = rows_of(table), rows_of(out)
    for old, new in zip(before, after, strict=True):
        assert (old["scores"] is None) == (new["scores"] is None)
        del old["scores"], new["scores"]
    assert after == before
    # In the order of the files, too.
    places = [Location.parse(str(folder)) for folder in (table, out)]
    one, other = ([i for t in iterate_labels(p) for i in t["image_id"].to_pylist()] for p in places)
    assert one == other


def test_many_boxes_of_an_image_and_another_ground_truth_confirm_it(tmp_path: Path) -> None:
    rows = [image(number, num_boxes=1 + number % 8) for number in range(1000)]
    write_table(tmp_path / "labels", rows)
    few = write_truth(tmp_path / "few.json", range(80))
    others = write_truth(tmp_path / "others.json", range(80, 1000))
    assert run(tmp_path / "labels", few, tmp_path / "out").returncode == 0
    errors = []
    for folder in ("labels", "out"):
        args = ("--labels", tmp_path / folder, "--ground-truth", others)
        last = run_here(ROOT / "jobs" / "evaluate_boxes.py", *args).stdout.splitlines()[-1]
        errors.append(json.loads(last)["detection"]["score_quality"]["ece"])
    assert errors[0] > 0.1
    assert errors[1] < 0.05


def test_the_manifest_and_the_report_tell_how_and_from_what(
    table: Path, truth: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(table, truth, out, "--seed", 3)
    source, made = (read_manifest(Location.parse(str(one))) for one in (table, out))
    said = {k.removeprefix("calibration."): v for k, v in made.config.items() if k not in SETTINGS}
    assert {k: v for k, v in made.config.items() if k in SETTINGS} == SETTINGS
    assert said["labels_manifest_sha256"] == manifest_sha256(Location.parse(str(table)))
    assert len(said["ground_truth_sha256"]) == 64
    assert (said["labels"], said["ground_truth"]) == (str(table), str(truth))
    assert (said["method"], said["seed"], said["columns"]) == ("logistic", 3, ["scores"])
    assert (said["num_images"], said["num_boxes"]) == (98, 196)
    assert said["weights"][0] > 0
    assert 0 < said["cross_validated.ece"] < said["before.ece"]
    assert 0.5 < said["cross_validated.auroc"] <= 1
    assert said["cross_validated.brier"] < said["before.brier"]
    assert made.config_hash == config_hash(made.config)
    assert (made.counts, made.weights_sha256) == (source.counts, "w1")
    assert made.job["images"] == "photos"
    assert made.job["calibration"]["output"] == str(out)
    assert made.collection == {"root": "x"}
    assert "Of further labelled images 2 have no box, and 2 are not in the table." in result.stdout
    assert "FEW LABELS" not in result.stdout
    report = (out / "_calibration" / "report.md").read_text()
    assert "98 labelled images" in report
    assert said["ground_truth_sha256"] in report
    with Image.open(out / "_calibration" / "reliability.png") as picture:
        picture.load()
    assert {one.name for one in out.iterdir()} == {
        *(MANIFEST_NAME, "_calibration", "_run"),
        *(file.name for file in made.files),
    }


def test_the_same_command_gives_the_same_scores_and_the_map_can_be_applied_again(
    table: Path, truth: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        assert run(table, truth, tmp_path / name).returncode == 0
    assert scores_of(tmp_path / "one") == scores_of(tmp_path / "two")
    said = read_manifest(Location.parse(str(tmp_path / "one"))).config
    weight, bias = said["calibration.weights"][0], said["calibration.bias"]
    expected = expit(weight * np.array(scores_of(table)) + bias)
    assert np.array(scores_of(tmp_path / "one")) == pytest.approx(expected, abs=1e-6)


def test_few_labels_are_told_and_fewer_refused(table: Path, tmp_path: Path) -> None:
    some = write_truth(tmp_path / "some.json", range(30))
    result = run(table, some, tmp_path / "some")
    assert result.returncode == 0
    assert "FEW LABELS: 28 images; below 50, by --method logistic, the ECE" in result.stdout
    result = run(table, some, tmp_path / "isotonic", "--method", "isotonic")
    assert "FEW LABELS: 28 images; below 100, by --method isotonic, the ECE" in result.stdout
    few = write_truth(tmp_path / "few.json", [*range(11), 1000])
    result = run(table, few, tmp_path / "few")
    assert_one_line(result, 3, "at least 10 images of")
    assert "got 9 (2 have none, 1 are not in the table)" in result.stderr
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize(("box", "fate"), [(OBJECT, "right"), (ELSEWHERE, "wrong")])
def test_boxes_all_of_one_kind_teach_nothing(tmp_path: Path, box: list[float], fate: str) -> None:
    write_table(tmp_path / "labels", [image(n, boxes=[box, box]) for n in range(20)])
    truth = write_truth(tmp_path / "few.json", range(20))
    result = run(tmp_path / "labels", truth, tmp_path / "out")
    assert_one_line(result, 3, f"all 40 boxes of 20 labelled images are {fate}")
    assert not (tmp_path / "out").exists()


def test_evidence_counts_where_every_box_of_the_table_has_it(tmp_path: Path) -> None:
    rows = [image(n, contrast=[n / 60, n / 50], agreement=[0.5, 0.4]) for n in range(60)]
    write_table(tmp_path / "whole", rows)
    # One that nobody labelled is enough.
    rows[59]["agreement"] = None
    write_table(tmp_path / "part", rows)
    truth = write_truth(tmp_path / "few.json", range(55))
    assert (
        "on scores, contrast, agreement\n" in run(tmp_path / "whole", truth, tmp_path / "1").stdout
    )
    assert "on scores, contrast\n" in run(tmp_path / "part", truth, tmp_path / "2").stdout
    flags = ("--method", "isotonic")
    assert "on scores\n" in run(tmp_path / "whole", truth, tmp_path / "3", *flags).stdout


def test_scores_that_say_nothing_become_the_share_of_right_boxes(tmp_path: Path) -> None:
    rows = [
        image(n, boxes=[OBJECT if n % 4 else ELSEWHERE], scores=None, labels=[1]) for n in range(60)
    ]
    write_table(tmp_path / "labels", rows)
    truth = write_truth(tmp_path / "few.json", range(60))
    result = run(tmp_path / "labels", truth, tmp_path / "out")
    assert "SCORES SAY NOTHING on these images" in result.stdout
    assert scores_of(tmp_path / "out") == pytest.approx([0.75] * 60)


def test_a_table_older_than_a_column_is_calibrated(
    table: Path, truth: Path, tmp_path: Path
) -> None:
    leave_out_later_columns(table)
    assert run(table, truth, tmp_path / "out").returncode == 0
    assert {row["contrast"] for row in rows_of(tmp_path / "out")} == {None}


def test_a_calibrated_table_can_be_calibrated_and_forgets_the_first_map(
    table: Path, truth: Path, tmp_path: Path
) -> None:
    assert run(table, truth, tmp_path / "one", "--method", "isotonic").returncode == 0
    assert run(tmp_path / "one", truth, tmp_path / "two").returncode == 0
    said = read_manifest(Location.parse(str(tmp_path / "two"))).config
    assert "calibration.probabilities" not in said
    assert said["calibration.labels"] == str(tmp_path / "one")


def test_a_table_is_replaced_only_when_asked_and_only_when_the_new_one_is_ready(
    table: Path, truth: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(table, truth, out).returncode == 0
    before = (out / MANIFEST_NAME).read_bytes()
    assert_one_line(run(table, truth, out), 5, "already holds a table: choose another --output, or")
    few = write_truth(tmp_path / "few2.json", range(5))
    assert_one_line(run(table, few, out, "--overwrite"), 3, "at least 10 images")
    assert (out / MANIFEST_NAME).read_bytes() == before
    assert run(table, truth, out, "--overwrite", "--method", "isotonic").returncode == 0
    assert len(rows_of(out)) == 300
    assert len(list(out.glob("*.parquet"))) == 1
    assert "| calibration.method | isotonic |" in (out / "_calibration/report.md").read_text()


def test_a_folder_of_others_and_the_table_itself_are_left_alone(
    table: Path, truth: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    result = run(table, truth, out, "--overwrite")
    assert_one_line(result, 5, "entries that are not of a labelling run, e.g. thesis.txt")
    (tmp_path / "link").symlink_to(table)
    for output in (table, tmp_path / "link"):
        result = run(table, truth, output, "--overwrite")
        assert_one_line(result, 2, "--output must not be the table of --labels itself")
    result = run(table, truth, out / "thesis.txt", "--overwrite")
    assert_one_line(result, 2, "--output must be a folder, got the file")
    assert len(rows_of(table)) == 300


def test_bad_input_is_a_data_error(table: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_one_line(run(tmp_path / "no", truth, out), 3, f"holds no {MANIFEST_NAME}")
    result = run(table, tmp_path / "no.json", out)
    assert_one_line(result, 3, f"--ground-truth: there is no {tmp_path / 'no.json'}")
    truth.write_text("{")
    assert_one_line(run(table, truth, out), 3, "cannot be read as JSON")
    strangers = write_truth(tmp_path / "others.json", [5000])
    assert_one_line(run(table, strangers, out), 3, "no label belongs to an annotated image")
    write_table(tmp_path / "bad", [image(n, scores=[0.5, float("nan")]) for n in range(20)])
    result = run(tmp_path / "bad", write_truth(tmp_path / "t.json", range(20)), out)
    assert_one_line(result, 3, "the scores of /photos/000000.jpg must be finite")
    assert not out.exists()


@pytest.mark.slow
def test_a_job_that_is_killed_leaves_no_table_and_overwrite_makes_it_whole(tmp_path: Path) -> None:
    write_table(tmp_path / "labels", [image(number) for number in range(30_000)])
    truth, out = write_truth(tmp_path / "few.json", range(60)), tmp_path / "out"
    command = [sys.executable, str(JOB), *map(str, arguments(tmp_path / "labels", truth, out))]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (out / "_run" / "run.json").exists():
        assert job.poll() is None
        time.sleep(0.001)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert not (out / MANIFEST_NAME).exists()
    assert_one_line(run(tmp_path / "labels", truth, out), 5, "already holds a table")
    assert run(tmp_path / "labels", truth, out, "--overwrite").returncode == 0
    assert run(tmp_path / "labels", truth, tmp_path / "other").returncode == 0
    assert scores_of(out) == scores_of(tmp_path / "other")


def test_real_boxes_on_real_photos(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "voc07_test_500"
    content = json.loads((folder / "instances.json").read_text())
    # Central boxes of all sizes: the larger the surer, as objects of photos are.
    rows = [
        label_row(
            one["file_name"],
            boxes=[
                [
                    m * one["width"],
                    m * one["height"],
                    (1 - m) * one["width"],
                    (1 - m) * one["height"],
                ]
            ],
            scores=[1.0 - m],
            labels=[1],
        )
        for one, m in zip(content["images"], np.linspace(0, 0.45, 500), strict=True)
    ]
    write_table(tmp_path / "labels", rows)
    result = run(tmp_path / "labels", folder, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    said = read_manifest(Location.parse(str(tmp_path / "out"))).config
    assert said["calibration.num_images"] == 500
    assert said["calibration.before.ece"] > 0.3
    assert said["calibration.cross_validated.ece"] < 0.1


def test_a_table_in_a_bucket_becomes_one_in_a_bucket(s3_bucket: str, tmp_path: Path) -> None:
    source, out = f"{s3_bucket}/labels", f"{s3_bucket}/out"
    folder = Location.parse(source)
    place = write_table(tmp_path / "labels", [image(number) for number in range(60)])
    for one in place.files():
        folder.child(one.name).write_bytes(one.read_bytes())
    truth = write_truth(tmp_path / "few.json", range(60))
    for flags in ((), ("--overwrite",)):
        args = ("--labels", source, "--ground-truth", truth, "--output", out, *flags)
        assert run_here(JOB, *args).returncode == 0
    assert len(read_labels(Location.parse(out))) == 60
    assert Location.parse(f"{out}/_calibration/report.md").kind() == "file"
    args = ("--labels", source, "--ground-truth", truth, "--output", f"{source}/", "--overwrite")
    assert_one_line(run_here(JOB, *args), 2, "--output must not be the table of --labels itself")


def test_help_needs_no_torch() -> None:
    assert "--ground-truth" in help_without_libraries(JOB)


def assert_one_line(result: Result, code: int, reason: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
