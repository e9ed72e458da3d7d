"""Boxes from finished tables: what is left out is counted, and merging equals a slow loop."""

import hashlib
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.boxes import pairwise_iou
from pipeline.data.labelled_images import PackedBytes
from pipeline.detection.box_table import BoxTable, TableSource, merge_boxes, read_box_table
from pipeline.errors import DataError
from tests.tables import Row, label_row, write_table

SQUARE = [10.0, 20.0, 50.0, 60.0]


def boxed(image_id: str, *boxes: list[float], **columns: Any) -> Row:
    known = {
        "width": 100,
        "height": 80,
        "boxes": list(boxes),
        "scores": [0.5] * len(boxes),
        "labels": [1] * len(boxes),
    }
    return label_row(image_id, **(known | columns))


def rows_of(table: BoxTable) -> dict[str, list[tuple[list[float], int, float]]]:
    """Everything by image, as plain values."""
    found = {}
    for index in range(len(table)):
        mine = table.rows(index)
        boxes = table.boxes_M4[mine].tolist()
        values = zip(
            boxes, table.labels_M[mine].tolist(), table.scores_M[mine].tolist(), strict=True
        )
        found[table.image_id(index)] = list(values)
    assert list(found) == sorted(found)
    assert table.bounds[-1] == len(table.boxes_M4) == len(table.labels_M) == len(table.scores_M)
    return found


def test_a_table_is_its_ok_rows_in_the_order_of_their_ids(tmp_path: Path) -> None:
    place = write_table(
        tmp_path,
        [boxed("c", SQUARE, [0.0, 0.0, 100.0, 80.0], scores=[0.25, 4.0], labels=[1, 7])],
        [boxed("a", SQUARE, width=60, height=90, uri="s3://lake/a.jpg")],
    )
    table = read_box_table(place)
    assert rows_of(table) == {
        "a": [(SQUARE, 1, 0.5)],
        "c": [(SQUARE, 1, 0.25), ([0.0, 0.0, 100.0, 80.0], 7, 4.0)],
    }
    assert [table.uri(0), table.uri(1)] == ["s3://lake/a.jpg", "/photos/c"]
    assert (table.width_N.tolist(), table.height_N.tolist()) == ([60, 100], [90, 80])
    assert table.is_wide_N.tolist() == [False, True]
    manifest = (tmp_path / "_MANIFEST.json").read_bytes()
    digest = hashlib.sha256(manifest).hexdigest()
    assert table.sources == (TableSource(str(place), digest, 2, {}, {}),)
    assert table.boxes_M4.dtype == table.scores_M.dtype == np.float32
    assert table.labels_M.dtype == table.bounds.dtype == np.int64


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    nan = [0.0, math.nan, 5.0, 5.0]
    infinite = [-math.inf, 0.0, math.inf, 5.0]
    inverted = [5.0, 0.0, 4.0, 9.0]
    flat = [5.0, 3.0, 9.0, 3.0]
    outside = [100.0, 0.0, 130.0, 9.0]
    place = write_table(
        tmp_path,
        [
            boxed("1", SQUARE, nan, inverted, outside),
            boxed("2", infinite, flat),
            boxed("3"),
            boxed("4", boxes=None, scores=None, labels=None),
            boxed("5", SQUARE, SQUARE, scores=[0.1, math.nan]),
            boxed("6", SQUARE, width=None),
            boxed("7", boxes=[], status="no_object"),
            label_row("8", status="error_read"),
            label_row("9", status="error_read"),
        ],
    )
    table = read_box_table(place, min_score=0.2)
    assert rows_of(table) == {"1": [(SQUARE, 1, 0.5)]}
    (source,) = table.sources
    assert source.rows == 9
    assert source.images_left_out == {
        "no_usable_box": 3,
        "error_read": 2,
        "no_box": 2,
        "no_object": 1,
    }
    assert source.boxes_left_out == {
        "not_finite": 3,
        "degenerate": 2,
        "outside": 2,
        "below_min_score": 1,
    }
    assert source.describe().startswith("images: 3 no_usable_box, 2 error_read")
    assert list(rows_of(read_box_table(place))) == ["1", "5"]


def test_boxes_are_cut_at_the_edges_and_slivers_go(tmp_path: Path) -> None:
    place = write_table(
        tmp_path,
        [boxed("a", [-5.0, -1.0, 500.0, 80.5], [99.995, 0.0, 200.0, 9.0], [1.0, 1.0, 1.001, 9.0])],
    )
    table = read_box_table(place)
    assert rows_of(table) == {"a": [([0.0, 0.0, 100.0, 80.0], 1, 0.5)]}
    assert table.sources[0].boxes_left_out == {"outside": 1, "degenerate": 1}


def test_missing_scores_are_one_and_missing_labels_object(tmp_path: Path) -> None:
    place = write_table(
        tmp_path, [boxed("a", SQUARE, scores=None, labels=None), boxed("b", SQUARE, scores=[0.75])]
    )
    assert rows_of(read_box_table(place)) == {"a": [(SQUARE, 1, 1.0)], "b": [(SQUARE, 1, 0.75)]}


@pytest.mark.parametrize("rows", [[], [label_row("a", status="no_object"), boxed("b")]])
def test_no_usable_box_is_one_line_with_counts(tmp_path: Path, rows: list[Row]) -> None:
    place = write_table(tmp_path, rows)
    with pytest.raises(
        DataError, match=f"at least one usable box, got none in {len(rows)} row"
    ) as e:
        read_box_table(place)
    assert "\n" not in str(e.value)
    if rows:
        assert "1 no_object" in str(e.value)
        assert "1 no_box" in str(e.value)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"scores": [0.5, 0.5]}, "other numbers of boxes and of scores"),
        ({"labels": []}, "other numbers of boxes and of labels"),
        ({"labels": [0]}, r"labels in .* must be at least 1 .* got 0"),
    ],
)
def test_a_damaged_row_is_refused(tmp_path: Path, columns: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_box_table(write_table(tmp_path, [boxed("a", SQUARE, **columns)]))


def test_a_large_table_has_no_object_per_row(tmp_path: Path) -> None:
    rows = [boxed(f"{number:05}", SQUARE, SQUARE) for number in range(5000)]
    table = read_box_table(write_table(tmp_path, rows))
    assert len(table) == 5000
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(table, protocol=5, buffer_callback=buffers.append)
    assert len(head) < 4000
    assert sum(buffer.raw().nbytes for buffer in buffers) < 5000 * 150


# Merging.

Plain = dict[str, list[list[float]]]


def table_of(images: Plain, *, score: float, size: tuple[int, int] = (64, 64)) -> BoxTable:
    ids = sorted(images)
    boxes = [box for image in ids for box in images[image]]
    return BoxTable(
        image_ids=PackedBytes(image.encode() for image in ids),
        uris=PackedBytes(f"/{score}/{image}".encode() for image in ids),
        width_N=np.full(len(ids), size[0], np.int32),
        height_N=np.full(len(ids), size[1], np.int32),
        bounds=np.cumsum([0] + [len(images[image]) for image in ids]).astype(np.int64),
        boxes_M4=np.array(boxes, np.float32).reshape(-1, 4),
        labels_M=np.ones(len(boxes), np.int64),
        scores_M=np.full(len(boxes), score, np.float32),
    )


def slow_merge(
    first: Plain, found: Plain, iou: float
) -> dict[str, list[tuple[list[float], int, float]]]:
    merged = {}
    for image in sorted(first.keys() | found.keys()):
        new = found.get(image, [])
        old = [
            box
            for box in first.get(image, [])
            if all(pairwise_iou([box], [other])[0, 0] < iou for other in new)
        ]
        merged[image] = [(box, 1, 0.5) for box in new] + [(box, 1, 1.0) for box in old]
    return merged


BOX = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4)).map(
    lambda box: [float(box[0]), float(box[1]), float(box[0] + box[2]), float(box[1] + box[3])]
)
IMAGES = st.dictionaries(
    st.sampled_from("abcdefgh"), st.lists(BOX, min_size=1, max_size=4), min_size=1
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(IMAGES, IMAGES, st.sampled_from([0.25, 0.5, 1.0]))
def test_merged_boxes_are_those_of_a_slow_loop(first: Plain, found: Plain, iou: float) -> None:
    merged = merge_boxes(table_of(first, score=1), table_of(found, score=0.5), iou=iou)
    expected = slow_merge(first, found, iou)
    assert rows_of(merged) == expected
    kept = sum(map(len, expected.values()))
    assert merged.num_overlapped + kept == sum(
        map(
            len,
            [*first.values(), *found.values()],
        )
    )
    # An image of both tables is read from where it was first.
    assert [merged.uri(index) for index in range(len(merged))] == [
        f"/{1 if image in first else 0.5}/{image}" for image in expected
    ]


def test_many_images_are_merged_in_chunks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def images(count: int) -> Plain:
        low = rng.integers(0, 30, (count, 3, 2)).astype(float)
        boxes = np.concatenate([low, low + rng.integers(1, 30, (count, 3, 2))], axis=2)
        return {f"{n:04}": boxes[n, : 1 + n % 3].tolist() for n in range(count)}

    first, found = images(300), images(200)
    monkeypatch.setattr("pipeline.detection.box_table._CHUNK", 7)
    merged = merge_boxes(table_of(first, score=1), table_of(found, score=0.5))
    assert rows_of(merged) == slow_merge(first, found, 0.5)


def test_a_merged_table_knows_both_sources(tmp_path: Path) -> None:
    first = read_box_table(write_table(tmp_path / "r0", [boxed("a", SQUARE)]))
    found = read_box_table(write_table(tmp_path / "r1", [boxed("a", [0.0, 0.0, 9.0, 9.0])]))
    merged = merge_boxes(first, found)
    assert merged.sources == first.sources + found.sources
    assert len(merged.boxes_M4) == 2


def test_tables_that_do_not_belong_together_are_refused() -> None:
    first, found = {"a": [SQUARE], "b": [SQUARE]}, {"b": [SQUARE]}
    with pytest.raises(DataError, match=r"image b must have one size, got 64x64 in.* and 64x48"):
        merge_boxes(table_of(first, score=1), table_of(found, score=1, size=(64, 48)))
    twice = table_of(first, score=1)
    twice = BoxTable(**(vars(twice) | {"image_ids": PackedBytes([b"a", b"a"])}))
    with pytest.raises(DataError, match=r"each image_id once, got 2 rows with 1"):
        merge_boxes(twice, table_of(found, score=1))
    with pytest.raises(ValueError, match="iou"):
        merge_boxes(table_of(first, score=1), table_of(found, score=1), iou=0)
