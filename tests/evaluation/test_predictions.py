"""Labels from a table or a JSON file; impossible ones -> one line that shows the first."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.evaluation.predictions import Prediction, describe_labels, read_predictions
from pipeline.storage import Location
from tests.tables import Row, label_row, write_table


def row(name: str, **columns: Any) -> Row:
    return label_row(name, width=100, height=80, **columns)


def write_json(folder: Path, content: Any) -> Location:
    (folder / "labels.json").write_text(json.dumps(content))
    return Location.parse(str(folder / "labels.json"))


A, B, C = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("boxes", "scores", "best"),
    [
        ([A], [0.1], A),
        ([A, B, C], [0.1, 0.7, 0.2], B),
        ([A, B, C], [0.1, 0.7, 0.7], B),
        ([A, B, C], None, A),
        ([], [], None),
        (None, None, None),
    ],
)
def test_best_scored_box_counts_and_the_first_among_equals(
    tmp_path: Path, boxes: Any, scores: Any, best: Any
) -> None:
    (found,) = read_predictions(write_table(tmp_path, [row("1.jpg", boxes=boxes, scores=scores)]))
    box = None if best is None else tuple(best)
    assert found == Prediction("/photos/1.jpg", box, "ok", 100, 80)


@pytest.mark.parametrize("status", ["no_object", "skipped_too_small", "error_decode"])
def test_row_that_is_not_ok_has_no_box_whatever_stands_in_it(tmp_path: Path, status: str) -> None:
    place = write_table(tmp_path, [row("1.jpg", status=status, boxes=[A], scores=[1.0])])
    (found,) = read_predictions(place)
    assert (found.box, found.status) == (None, status)


def test_json_gives_names_and_boxes_alone(tmp_path: Path) -> None:
    (found,) = read_predictions(write_json(tmp_path, {"1.jpg": [1, 2.5, 3, 4]}))
    assert found == Prediction("1.jpg", (1, 2.5, 3, 4), "ok", None, None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([A], "must be a pseudo-label table (folder) or a JSON file"),
        ({"images": [], "annotations": []}, "got a COCO file"),
        ({"1.jpg": [0, 0, 1]}, "1 of 1 boxes are impossible; the first: '1.jpg' must be [x0"),
        ({"1.jpg": None}, "must be [x0, y0, x1, y1], got None"),
        ({"1.jpg": [0, 0, "1", 1]}, "must be [x0, y0, x1, y1]"),
        ({"1.jpg": [0, 0, True, 1]}, "must be [x0, y0, x1, y1]"),
        ({"1.jpg": [A]}, "must be [x0, y0, x1, y1]"),
        ({"1.jpg": [0, 0, float("nan"), 1]}, "must be finite"),
        ({"1.jpg": [0, 0, float("inf"), 1]}, "must be finite"),
        ({"1.jpg": A, "2.jpg": [5, 0, 5, 1]}, "1 of 2 boxes are impossible; the first: '2.jpg'"),
        ({"1.jpg": [0, 5, 5, 4]}, "must have x0 < x1 and y0 < y1"),
    ],
)
def test_impossible_json_is_refused_before_anything_is_measured(
    tmp_path: Path, content: Any, reason: str
) -> None:
    with pytest.raises(DataError) as fault:
        read_predictions(write_json(tmp_path, content))
    assert reason in str(fault.value)
    assert "labels.json" in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"boxes": [[5.0, 0.0, 5.0, 9.0]]}, "the box of /photos/1.jpg must have x0 < x1"),
        ({"boxes": [[0.0, 0.0, float("nan"), 9.0]]}, "must be finite"),
        ({"boxes": [A, B], "scores": [0.5]}, "/photos/1.jpg has 2 boxes, but 1 scores"),
    ],
)
def test_impossible_row_of_a_table_is_named(
    tmp_path: Path, columns: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError) as fault:
        list(read_predictions(write_table(tmp_path, [row("1.jpg", **columns)])))
    assert reason in str(fault.value)


def test_missing_labels_and_a_lone_parquet_file_are_told_apart(tmp_path: Path) -> None:
    table = write_table(tmp_path, [row("1.jpg", boxes=[A])])
    with pytest.raises(DataError, match="there is no "):
        read_predictions(table.child("nowhere"))
    with pytest.raises(DataError, match="give the folder of the table"):
        read_predictions(table.child("part-00000.parquet"))


def test_table_says_which_run_made_it_and_json_where_it_lies(tmp_path: Path) -> None:
    found = describe_labels(
        write_table(tmp_path / "t", [row("1.jpg"), row("2.jpg", method="lost")])
    )
    assert (found["run_id"], found["config_hash"], found["method"]) == ("r1", "c1", "lost, solost")
    place = write_json(tmp_path, {})
    assert describe_labels(place) == {"source": str(place)}


def test_empty_table_has_no_method(tmp_path: Path) -> None:
    place = write_table(tmp_path, [])
    assert list(read_predictions(place)) == []
    assert describe_labels(place)["method"] is None
