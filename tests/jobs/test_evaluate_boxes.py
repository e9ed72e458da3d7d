"""The whole command: what it prints, its last line, its exit codes."""

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.jobs.conftest import help_without_libraries, run_script
from tests.jobs.here import run_here
from tests.tables import Row, label_row, leave_out_later_columns, write_table

JOB = ROOT / "jobs" / "evaluate_boxes.py"

run = partial(run_here, JOB, COLUMNS="80")


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
    args = ("--labels", labels, "--ground-truth", truth)
    result = run_script(JOB, *args, PYTHONIOENCODING="ascii", COLUMNS="30")
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
    assert "--ignore-difficult" in help_without_libraries(JOB)


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
    # As detections: scores of 1, and difficult objects no objects, as in LOST's own tables.
    detection = numbers(result)["detection"]
    assert round(detection["ap50"], 1) == 15.6
    assert (detection["num_objects"], detection["warnings"]) == (12_608, [])
    easy = numbers(run(*args, "--ignore-difficult", "--difficult", "keep"))
    assert (easy["hits"], easy["corloc"]) == (3065, 61.165)
    assert easy["detection"]["num_objects"] == 15_662


def test_central_box_on_real_photos_is_far_from_nothing(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "voc07_test_500"
    images = json.loads((folder / "instances.json").read_text())["images"]
    whole = {image["file_name"]: [0, 0, image["width"], image["height"]] for image in images}
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    found = numbers(run("--labels", tmp_path / "whole.json", "--ground-truth", folder))
    assert found["corloc"] == found["baselines"]["full_image"]["corloc"] == 32.0
    assert found["baselines"]["full_image"]["labels_minus_this_interval"] == [0, 0]
    assert found["baselines"]["central_70"]["corloc"] == 41.0


# ---- all boxes against all objects


def test_average_precision_names_its_rule_and_repeats_it_in_every_line(
    labels: Path, truth: Path
) -> None:
    # Of 101 recalls 51 are at most a half and 34 at most a third. The near miss on the difficult
    # object ties with the hit and comes after it, so only the number of objects matters.
    expected = {"drop": (2, 51 / 101), "ignore": (2, 51 / 101), "keep": (3, 34 / 101)}
    for rule, (num_objects, ap50) in expected.items():
        result = run("--labels", labels, "--ground-truth", truth, "--difficult", rule)
        found = numbers(result)["detection"]
        assert (found["difficult"], found["num_objects"]) == (rule, num_objects)
        words = {"drop": "dropped", "ignore": "ignored", "keep": "kept"}[rule]
        assert f"(difficult objects {words})" in result.stdout
        assert result.stdout.count(f"difficult objects {words}") == 3
        assert found["ap50"] == pytest.approx(100 * ap50, abs=1e-3)
        assert found["ap50_interval"][0] <= found["ap50"] <= found["ap50_interval"][1]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures of 100 x 100, two labelled with several boxes and classes, and their truth."""
    boxes = {1: [[0, 0, 50, 50], [50, 50, 40, 40]], 2: [[10, 10, 60, 60]], 3: []}
    rows: list[Row] = []
    annotations: list[dict[str, Any]] = []
    for number, objects in boxes.items():
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (100, 100), (60, 60, 60 * number)).save(path)
        corners = [[float(x), float(y), float(x + w), float(y + h)] for x, y, w, h in objects]
        corners.append([70.0, 0.0, 95.0, 30.0])
        scores = [0.9 - 0.1 * place for place in range(len(corners))]
        rows.append(row(path.name, uri=str(path), boxes=corners, scores=scores))
        rows[-1]["labels"] = [number + place for place in range(len(corners))]
        annotations += [
            {"id": len(annotations) + place + 1, "image_id": 40 + number, "bbox": box}
            | {"category_id": number}
            for place, box in enumerate(objects)
        ]
    write_table(tmp_path / "table", rows)
    content = {
        "images": [
            {"id": 40 + i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in boxes
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog[x]"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(content))
    return tmp_path


def test_files_hold_the_numbers_the_curve_the_failures_and_the_boxes(photos: Path) -> None:
    out, boxes = photos / "deep" / "out", photos / "boxes.json"
    args = ("--labels", photos / "table", "--ground-truth", photos / "gt.json")
    result = run(*args, "--output", out, "--coco-results", boxes)
    found = numbers(result)
    assert result.stderr == ""
    assert sorted(path.name for path in out.iterdir()) == [
        "evaluation.json",
        "precision_recall.png",
        "reliability.png",
        "worst_cases.png",
    ]
    assert json.loads((out / "evaluation.json").read_text()) == found
    for name in ("precision_recall.png", "reliability.png", "worst_cases.png"):
        with Image.open(out / name) as picture:
            picture.load()
    assert found["evaluated_with"]["pycocotools"]
    assert {len(value) for value in found["detection"]["sha256"].values()} == {64}
    # 0.9, 0.8 and 0.9 are true; the false ones with 0.9, 0.8 and 0.7 are among them.
    detection = found["detection"]
    assert detection["boxes_per_image"]["images_by_num_boxes"] == {"1": 1, "2": 1, "3-4": 1}
    assert detection["recall_by_num_objects"]["2"]["recall"] == 100
    entries = json.loads(boxes.read_text())
    assert [one["image_id"] for one in entries] == [41, 41, 41, 42, 42, 43]
    assert (entries[1]["bbox"], entries[1]["score"]) == ([50, 50, 40, 40], pytest.approx(0.8))


def test_labels_beyond_one_are_matched_with_the_classes(photos: Path) -> None:
    args = ("--labels", photos / "table", "--ground-truth", photos / "gt.json")
    result = run(*args)
    classes = numbers(result)["detection"]["classes"]
    # The cat's two boxes are in clusters 1 and 2, the dog's one is in cluster 2.
    assert classes["cluster_of"] == {"cat": 1, "dog[x]": 2}
    assert classes["ap50"] == {"cat": 50, "dog[x]": 100}
    assert classes["mean_ap50"] == 75
    assert "Mean AP50 over classes 75.00 %" in result.stdout
    assert "dog[x]" in result.stdout


def test_one_kind_of_label_is_matched_only_when_asked(labels: Path, truth: Path) -> None:
    args = ("--labels", labels, "--ground-truth", truth)
    assert numbers(run(*args))["detection"]["classes"] is None
    result = run(*args, "--class-aware")
    assert_one_line(result, 3, "--class-aware: objects of 3 images have no class")


# ---- what scores are worth


def test_scores_are_measured_by_hand_made_numbers(photos: Path) -> None:
    # Right: 0.9, 0.8, 0.9; wrong: 0.7, 0.8, 0.9. Of nine pairs 2 + 1 + 2 are in order, and
    # 1 + 1 + 1 equal.
    args = ("--labels", photos / "table", "--ground-truth", photos / "gt.json")
    result = run(*args)
    quality = numbers(result)["detection"]["score_quality"]
    assert (quality["num_boxes"], quality["num_right"]) == (6, 3)
    assert quality["auroc"] == {"scores": pytest.approx(6.5 / 9, abs=1e-4)}
    # Bins 0.7, 0.8 and 0.9, as Parquet's float32 is just below or above: 0 of 1, 1 of 2, 2 of 3.
    assert quality["ece"] == pytest.approx((0.7 + 2 * 0.3 + 3 * (0.9 - 2 / 3)) / 6, abs=1e-4)
    assert quality["brier"] == pytest.approx(
        (0.1**2 + 0.1**2 + 0.9**2 + 0.2**2 + 0.8**2 + 0.7**2) / 6, abs=1e-4
    )
    # The best box is one of three of 0.9, of which two are right.
    assert quality["precision_at_coverage"]["10"] == 66.667
    assert quality["precision_at_coverage"]["100"] == 50
    assert "AUROC of the scores 0.722 [" in result.stdout
    assert "As probabilities: ECE 0.3" in result.stdout


def test_what_scores_rest_on_is_ranked_too_and_other_scores_are_no_probabilities(
    tmp_path: Path, truth: Path
) -> None:
    hit, miss = [0.0, 0.0, 100.0, 80.0], [90.0, 90.0, 91.0, 91.0]
    told = {"contrast": [0.3, 0.2], "agreement": [0.5, 0.5]}
    folder = write_table(
        tmp_path / "table",
        [
            row("1.jpg", boxes=[hit, miss], scores=[7.0, 8.0], **told),
            row("2.jpg", boxes=[miss], scores=[2.0], contrast=[0.1], agreement=None),
        ],
    )
    result = run("--labels", folder, "--ground-truth", truth, "--output", tmp_path / "out")
    quality = numbers(result)["detection"]["score_quality"]
    # Agreement is not known of every box.
    assert quality["auroc"] == {"scores": 0.5, "contrast": 1.0}
    assert quality["ece"] is None
    assert "AUROC of the column contrast: 1.000 [" in result.stdout
    assert "No ECE: scores from 2 to 8 are no probabilities" in result.stdout
    assert not (tmp_path / "out" / "reliability.png").exists()
    equal = numbers(run("--labels", folder, "--ground-truth", truth, "--scores", "equal"))
    assert equal["detection"]["score_quality"] is None


def test_where_all_boxes_are_right_nothing_is_told_apart(tmp_path: Path, truth: Path) -> None:
    folder = write_table(tmp_path / "t", [row("1.jpg", boxes=[[0.0, 0, 100, 80]], scores=[0.4])])
    result = run("--labels", folder, "--ground-truth", truth)
    quality = numbers(result)["detection"]["score_quality"]
    assert (quality["auroc"], quality["auroc_interval"]) == ({"scores": None}, {"scores": None})
    assert quality["ece"] == 0.6
    assert "No AUROC: all boxes are right." in result.stdout


def test_a_table_older_than_the_columns_of_evidence_is_measured(
    tmp_path: Path, truth: Path
) -> None:
    folder = write_table(tmp_path / "old", [row("1.jpg", scores=[0.5]), row("2.jpg", scores=[0.4])])
    leave_out_later_columns(tmp_path / "old")
    assert numbers(run("--labels", folder, "--ground-truth", truth))["num_images"] == 3


def test_impossible_evidence_is_a_data_error(tmp_path: Path, truth: Path) -> None:
    folder = write_table(tmp_path / "t", [row("1.jpg", contrast=[float("nan")])])
    result = run("--labels", folder, "--ground-truth", truth)
    assert_one_line(result, 3, "the contrast of /photos/1.jpg must be finite, got [nan]")


def test_output_among_the_labels_is_refused(photos: Path) -> None:
    table = photos / "table"
    args = ("--labels", table, "--ground-truth", photos / "gt.json", "--output", table)
    assert_one_line(run(*args), 2, "--output must not be the table's own folder")


def test_numbers_are_recorded_where_asked_and_nowhere_else(photos: Path, mlflow_uri: str) -> None:
    from pipeline.tracking.tracker import connect

    args = ("--labels", photos / "table", "--ground-truth", photos / "gt.json")
    result = run(*args, "--tracking-uri", mlflow_uri, "--run-name", "measured")
    found = numbers(result)
    client, _ = connect(mlflow_uri)
    (experiment,) = client.search_experiments(filter_string="name = 'patchseed'")
    (recorded,) = client.search_runs([experiment.experiment_id])
    assert recorded.info.run_name == "measured"
    assert recorded.data.metrics["evaluation/detection.ap50"] == found["detection"]["ap50"]
    assert recorded.data.metrics["evaluation/corloc"] == found["corloc"]
    assert recorded.data.params["difficult"] == "drop"
    assert recorded.data.tags["labels.run_id"] == "r1"
