"""Labels land on their boxes, also where images have gone; nothing else of a table changes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.clustering.table_boxes import TableBoxes
from pipeline.data.images import DecodedImage, decode_image
from pipeline.data.pseudo_labels import SCHEMA, read_labels
from pipeline.errors import DataError
from pipeline.storage import Location
from tests.tables import Row, label_row, write_table

NUM_BOXES = {"a": 1, "b": 3, "c": 0, "d": 2, "e": 1, "f": 2}


def decode(data: bytes) -> DecodedImage:
    return decode_image(data, min_side=1, max_side=64, max_pixels=10**6, background=(0, 0, 0))


def write_image(path: Path, shade: int) -> str:
    """A picture whose pixel values tell image and column; its hash."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = shade, np.arange(60)
    Image.fromarray(pixels).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_in(folder: Path) -> Iterator[Row]:
    for shade, (name, count) in enumerate(NUM_BOXES.items(), start=1):
        path = folder / f"{name}.png"
        boxes = [[10.0 * place, 5.0, 10.0 * place + 8, 25.0] for place in range(count)]
        yield label_row(
            name,
            uri=str(path),
            content_sha256=write_image(path, shade),
            size_bytes=path.stat().st_size,
            width=60,
            height=40,
            boxes=boxes,
            scores=[0.5] * count,
            labels=[1] * count,
            seed_xy=[1.0, 2.0],
            area_fraction=0.25,
        )
    nothing: dict[str, Any] = {"boxes": [], "scores": [], "labels": []}
    yield label_row("g", status="no_object", error="nothing", **nothing)
    yield label_row("h", status="error_read", error="not found")


@pytest.fixture
def labels(tmp_path: Path) -> Location:
    rows = list(rows_in(tmp_path))
    return write_table(tmp_path / "table", rows[:3], rows[3:])


def told(boxes: TableBoxes) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Image and first column of each crop; and what is told of the blocks."""
    blocks: list[tuple[int, int]] = []
    crops = list(boxes.crops(lambda images, bad: blocks.append((images, bad))))
    return [(int(crop[0, 0, 0]), int(crop[0, 0, 1])) for crop in crops], blocks


def rows_of(boxes: TableBoxes, labels: list[int]) -> dict[str, dict[str, Any]]:
    table = pa.concat_tables(list(boxes.labelled(np.array(labels))))
    assert table.schema.equals(SCHEMA)
    return {row["image_id"]: row for row in table.to_pylist()}


def test_boxes_come_in_the_tables_order_and_labels_go_back_there(labels: Location) -> None:
    boxes = TableBoxes(labels, decode)
    assert (boxes.num_images, boxes.num_boxes) == (5, 9)
    crops, blocks = told(boxes)
    wanted = [(1, 0), (2, 0), (2, 10), (2, 20), (4, 0), (4, 10), (5, 0), (6, 0), (6, 10)]
    assert crops == wanted
    assert [sum(column) for column in zip(*blocks, strict=True)] == [5, 0]
    rows = rows_of(boxes, list(range(1, 10)))
    assert [rows[name]["labels"] for name in "abcdefgh"] == [
        [1],
        [2, 3, 4],
        [],
        [5, 6],
        [7],
        [8, 9],
        [],
        None,
    ]
    before = read_labels(labels).drop_columns("labels").to_pylist()
    after = [{k: v for k, v in rows[row["image_id"]].items() if k != "labels"} for row in before]
    assert after == before


def test_images_that_have_gone_get_rows_that_say_so_and_shift_no_label(
    labels: Location, tmp_path: Path
) -> None:
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    (tmp_path / "d.png").write_text("<html>")
    write_image(tmp_path / "e.png", 99)
    boxes = TableBoxes(labels, decode)
    crops, blocks = told(boxes)
    assert crops == [(6, 0), (6, 10)]
    assert [sum(column) for column in zip(*blocks, strict=True)] == [5, 4]
    rows = rows_of(boxes, [3, 7])
    assert rows["f"]["labels"] == [3, 7]
    status = {name: (rows[name]["status"], rows[name]["error"]) for name in "abde"}
    assert status["a"] == ("error_read", "not found")
    assert status["b"][0] == status["d"][0] == "error_decode"
    assert status["b"][1].startswith("truncated PNG")
    assert "HTML" in status["d"][1]
    assert status["e"] == ("error_read", "another file than the one that was labelled")
    for name in "abde":
        nulls = ("boxes", "scores", "labels", "seed_xy", "area_fraction")
        assert [rows[name][column] for column in nulls] == [None] * 5
        assert rows[name]["uri"] == str(tmp_path / f"{name}.png")
    assert (rows["a"]["content_sha256"], rows["a"]["width"]) == (None, None)
    data = (tmp_path / "d.png").read_bytes()
    assert rows["d"]["content_sha256"] == hashlib.sha256(data).hexdigest()
    assert rows["d"]["size_bytes"] == len(data)


def test_another_size_is_another_file_also_where_no_hash_is_known(tmp_path: Path) -> None:
    rows = [row | {"content_sha256": None} for row in rows_in(tmp_path)]
    Image.new("RGB", (61, 40)).save(tmp_path / "a.png")
    boxes = TableBoxes(write_table(tmp_path / "table", rows), decode)
    crops, _ = told(boxes)
    assert len(crops) == 8
    assert list(boxes.failures) == [0]


def test_boxes_of_an_image_that_is_scaled_down_are_scaled_with_it(tmp_path: Path) -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[40:80, 120:160] = 255
    Image.fromarray(pixels).save(tmp_path / "large.png")
    row = label_row(
        "large",
        uri=str(tmp_path / "large.png"),
        width=200,
        height=100,
        boxes=[[120.0, 40.0, 160.0, 80.0]],
        labels=[1],
    )
    (crop,) = TableBoxes(write_table(tmp_path / "table", [row]), decode).crops(lambda *_: None)
    # At most 64 pixels a side: 200 to 64.
    assert crop.shape in ((13, 13, 3), (12, 13, 3), (13, 12, 3), (12, 12, 3))
    assert np.median(crop) == 255


def test_numbers_are_found_again_as_they_were_counted(labels: Location, tmp_path: Path) -> None:
    (tmp_path / "b.png").unlink()
    boxes = TableBoxes(labels, decode)
    crops, _ = told(boxes)
    (tmp_path / "e.png").unlink()
    found = boxes.find({0, 2, 3, 5})
    assert sorted(found) == [0, 2, 3, 5]
    for number in (0, 2, 5):
        crop = found[number].crop
        assert crop is not None
        assert (int(crop[0, 0, 0]), int(crop[0, 0, 1])) == crops[number]
    assert found[3].crop is None
    assert found[3].uri.endswith("e.png")


@pytest.mark.parametrize("edge", [float("nan"), float("inf")])
def test_impossible_boxes_are_refused_before_an_image_is_read(tmp_path: Path, edge: float) -> None:
    box = [0.0, 0.0, edge, 5.0]
    labels = write_table(tmp_path / "table", [label_row("a", boxes=[[0.0, 0.0, 1.0, 1.0], box])])
    with pytest.raises(DataError, match=r"boxes must be finite, /photos/a in .* has another"):
        TableBoxes(labels, decode)
