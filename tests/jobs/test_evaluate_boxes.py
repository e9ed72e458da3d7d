"""The whole command: what it prints, its last line, its exit codes."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.jobs.conftest import run_script
from tests.tables import Row, label_row, write_table

JOB = ROOT / "jobs" / "evaluate_boxes.py"

run = partial(run_script, JOB, COLUMNS="80")


def numbers(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Four images of 100 x 100; the second has a difficult object only, the last has none."""
    boxes = {1: [0, 0, 100, 80], 2: [20, 20, 60, 60], 3: [0, 0, 30, 30]}
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in (1, 2, 3, 4)
        ],
        "annotations": [
            {"id": i, "image_id": i, "bbox": box, "difficult": int(i == 2)}
            for i, box in boxes.items()
        ],
    }
    place = tmp_path / "gt.json"
    place.write_text(json.dumps(content))
    return place


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A hit, a near miss and a stranger; the third image has no label."""
    place = tmp_path / "labels.json"
    content = {"1.jpg": [0, 0, 100, 40], "2.jpg": [20, 20, 60, 60], "9.jpg": [0, 0, 1, 1]}
    place.write_text(json.dumps(content))
    return place


def row(name: str, **columns: Any) -> Row:
    known = {"width": 100, "height": 100, "boxes": [[0.0, 0.0, 1.0, 1.0]], "scores": [1.0]}
    return label_row(name, **(known | columns))


def test_every_number_of_a_hand_made_case(labels: Path, truth: Path) -> None:
    found = numbers(run("--labels", labels, "--ground-truth", truth))
    # IoU: 1/2 (a hit), 16/36, and none for the image without a label.
    assert (found["corloc"], found["hits"], found["num_images"]) == (33.333, 1, 3)
    assert (found["corloc_30"], found["corloc_50"], found["corloc_70"]) == (66.667, 33.333, 0)
    assert found["mean_best_iou"] == pytest.approx((1 / 2 + 16 / 36) / 3, abs=1e-4)
    assert (found["num_missing"], found["num_unmatched"]) == (1, 1)
    assert (found["num_without_objects"], found["num_difficult"]) == (1, 1)
    assert found["interval"][0] <= 33.333 <= found["interval"][1]
    # The whole image meets 80 %, 36 % and 9 % objects; the central box of 4900 px^2 ...
    whole, central = found["baselines"]["full_image"], found["baselines"]["central_70"]
    assert (whole["hits"], whole["corloc_30"]) == (1, 66.667)
    assert whole["mean_best_iou"] == pytest.approx((0.8 + 0.36 + 0.09) / 3, abs=1e-4)
    # ... shares 70 x 65, 60 x 60 and 15 x 15 with them.
    shared = [4550 / (8000 + 4900 - 4550), 3600 / 4900, 225 / (900 + 4900 - 225)]
    assert central["mean_best_iou"] == pytest.approx(sum(shared) / 3, abs=1e-4)
    assert (central["hits"], central["labels_minus_this"]) == (2, -33.333)
    # One of the three differs: one resample in 27 draws it three times, eight never.
    assert central["labels_minus_this_interval"] == [-100, 0]
    assert (found["num_single_object"], found["num_multi_object"]) == (3, 0)
    assert (found["corloc_single_object"], found["corloc_multi_object"]) == (33.333, None)


def test_images_with_difficult_objects_only_leave_the_denominator(
    labels: Path, truth: Path
) -> None:
    found = numbers(run("--labels", labels, "--ground-truth", truth, "--ignore-difficult"))
    assert (found["corloc"], found["num_images"], found["num_without_objects"]) == (50.0, 2, 2)
    assert found["ignore_difficult"] is True


def test_report_without_a_terminal_is_plain_and_says_what_was_left_out(
    labels: Path, truth: Path
) -> None:
    result = run("--labels", labels, "--ground-truth", truth)
    assert "\x1b" not in result.stdout
    *report, last = result.stdout.splitlines()
    assert max(map(len, report)) <= 80
    assert json.loads(last)
    text = "\n".join(report)
    assert "CorLoc 33.333 % (1/3 images), 95 % interval" in text
    assert "These boxes minus the central 70 % box: -33.3 [" in text
    assert "1 annotated images have no label: they count as misses." in text
    assert "1 labels have no annotated image: they are ignored." in text
    assert result.stderr == ""


def test_report_survives_a_narrow_ascii_terminal(labels: Path, truth: Path) -> None:
    result = run(
        "--labels", labels, "--ground-truth", truth, PYTHONIOENCODING="ascii", COLUMNS="30"
    )
    assert numbers(result)["hits"] == 1


def test_same_seed_same_line_and_another_seed_another_interval(labels: Path, truth: Path) -> None:
    args = ("--labels", labels, "--ground-truth", truth, "--num-resamples", 100)
    assert run(*args).stdout == run(*args).stdout
    one, other = numbers(run(*args)), numbers(run(*args, "--seed", 12))
    assert one["hits"] == other["hits"]
    leads = [found["baselines"]["central_70"] for found in (one, other)]
    assert leads[0] != leads[1] or one["interval"] != other["interval"]


def test_table_gives_sizes_statuses_and_provenance(tmp_path: Path, truth: Path) -> None:
    content = json.loads(truth.read_text())
    for image in content["images"]:
        del image["width"], image["height"]
    truth.write_text(json.dumps(content))
    good, bad = [0.0, 0.0, 100.0, 80.0], [90.0, 90.0, 91.0, 91.0]
    folder = write_table(
        tmp_path / "table",
        [
            row("1.jpg", boxes=[bad, good, bad], scores=[0.1, 0.7, 0.7]),
            row("2.jpg", status="no_object", boxes=[], scores=[]),
            row("3.jpg", status="error_decode", boxes=None, scores=None),
        ],
    )
    found = numbers(run("--labels", folder, "--ground-truth", truth))
    assert found["hits"] == 1
    assert found["statuses"] == {"ok": 1, "no_object": 1, "error_decode": 1}
    assert found["baselines"]["full_image"]["hits"] == 1
    provenance = {name: found["labels"][name] for name in ("run_id", "method", "config_hash")}
    assert provenance == {"run_id": "r1", "method": "solost", "config_hash": "c1"}


def test_unknown_size_makes_the_baselines_null_not_zero(labels: Path, truth: Path) -> None:
    content = json.loads(truth.read_text())
    del content["images"][1]["width"]
    truth.write_text(json.dumps(content))
    result = run("--labels", labels, "--ground-truth", truth)
    assert numbers(result)["baselines"] == {"full_image": None, "central_70": None}
    assert "No baselines: the size of 1 images" in result.stdout


def test_other_size_than_annotated_is_told(tmp_path: Path, truth: Path) -> None:
    folder = write_table(tmp_path / "table", [row("1.jpg", width=50), row("2.jpg")])
    result = run("--labels", folder, "--ground-truth", truth)
    found = numbers(result)
    assert found["num_size_differs"] == 1
    # By the annotation's size, the whole image meets the object that fills 80 % of it.
    assert found["baselines"]["full_image"]["hits"] == 1
    assert "WARNING: 1 images have another size" in result.stdout


def test_flag_without_effect_is_told(labels: Path, truth: Path) -> None:
    truth.write_text(truth.read_text().replace('"difficult": 1', '"difficult": 0'))
    result = run("--labels", labels, "--ground-truth", truth, "--ignore-difficult")
    assert "--ignore-difficult changes nothing" in result.stdout


def test_impossible_labels_end_with_one_line_and_code_three(labels: Path, truth: Path) -> None:
    labels.write_text('{"1.jpg": [0, 0, NaN, 1]}')
    result = run("--labels", labels, "--ground-truth", truth)
    assert_one_line(result, 3, "1 of 1 boxes are impossible; the first: '1.jpg' must be finite")


def assert_one_line(result: subprocess.CompletedProcess[str], code: int, reason: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_missing_places_are_named_by_flag(tmp_path: Path, labels: Path, truth: Path) -> None:
    nowhere = tmp_path / "nowhere"
    result = run("--labels", nowhere, "--ground-truth", truth)
    assert_one_line(result, 3, f"--labels: there is no {nowhere}")
    result = run("--labels", labels, "--ground-truth", nowhere)
    assert_one_line(result, 3, f"--ground-truth: there is no {nowhere}")


def test_nothing_to_find_is_a_data_error(labels: Path, truth: Path) -> None:
    content = json.loads(truth.read_text()) | {"annotations": []}
    truth.write_text(json.dumps(content))
    assert_one_line(run("--labels", labels, "--ground-truth", truth), 3, "holds no object")


def test_value_out_of_range_is_code_two(labels: Path, truth: Path) -> None:
    args = ("--labels", labels, "--ground-truth", truth, "--num-resamples", 0)
    assert_one_line(run(*args), 2, "--num-resamples: input should be greater than or equal to 1")


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(JOB)!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n"
        '    sys.stderr.write(f\'{stop.code} {sorted({"torch", "ray"} & set(sys.modules))}\')\n'
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stderr == "0 []"
    assert "--ignore-difficult" in result.stdout


def test_released_boxes_of_lost_print_the_published_number(shared: Path) -> None:
    golden = shared / "golden"
    args = (
        "--labels",
        golden / "lost_voc07_predictions.json",
        "--ground-truth",
        golden / "voc07_trainval_gt.json",
    )
    result = run(*args)
    assert "CorLoc 61.904 % (3102/5011 images)" in result.stdout
    assert numbers(result)["corloc"] == 61.904
    easy = numbers(run(*args, "--ignore-difficult"))
    assert (easy["hits"], easy["corloc"]) == (3065, 61.165)


def test_central_box_on_real_photos_is_far_from_nothing(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "voc07_test_500"
    images = json.loads((folder / "instances.json").read_text())["images"]
    whole = {image["file_name"]: [0, 0, image["width"], image["height"]] for image in images}
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    found = numbers(run("--labels", tmp_path / "whole.json", "--ground-truth", folder))
    assert found["corloc"] == found["baselines"]["full_image"]["corloc"] == 32.0
    assert found["baselines"]["full_image"]["labels_minus_this_interval"] == [0, 0]
    assert found["baselines"]["central_70"]["corloc"] == 41.0
