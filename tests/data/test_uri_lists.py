"""Lists of URIs and tables of images: each entry once, and a bad one named by its line."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.lake import image_id
from pipeline.data.sources import ReadFault, fetch_bytes
from pipeline.errors import DataError
from tests.data.conftest import below, ids_of, listed, plant


def test_text_list_takes_comments_relative_and_absolute_lines(tree: Path) -> None:
    lines = ["\ufeff# mine", "", "a/cat.jpg\r", f"{tree}/top.webp ", f"file://{tree}/b/c/dog%2EPNG",
             "./b/../a/cat.jpg", f"{tree}/a/cat.jpg", "s3://bucket/k#y?.jpg"]  # fmt: skip
    (tree / "list.txt").write_text("\n".join(lines))
    uris, report = listed(tree / "list.txt")
    expected = [f"{tree}/{name}" for name in ("a/cat.jpg", "top.webp", "b/c/dog.PNG")]
    assert uris == [*expected, "s3://bucket/k#y?.jpg"]
    assert (report.kind, report.num_duplicates) == ("list", 2)


def test_list_at_the_root_gives_the_ids_of_the_folder(tree: Path) -> None:
    (tree / "list.txt").write_text("top.webp\na/cat.jpg\nb/cat.jpg\nb/c/dog.PNG\n")
    assert ids_of(tree / "list.txt") == ids_of(tree)


def test_image_outside_the_lists_folder_has_the_id_of_its_uri(tree: Path) -> None:
    (tree / "b" / "list.txt").write_text("../a/cat.jpg\n")
    assert ids_of(tree / "b" / "list.txt") == [image_id(f"{tree}/a/cat.jpg")]


def test_list_is_not_checked_for_missing_files(tree: Path) -> None:
    (tree / "list.txt").write_text("gone.jpg")
    uris, _ = listed(tree / "list.txt")
    assert fetch_bytes(uris) == [ReadFault("not found")]


def test_list_with_names_that_are_not_utf8(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.jpg")).write_bytes(b"image")
    (tmp_path / "list.txt").write_bytes(b"a\xff.jpg\n")
    assert fetch_bytes(listed(tmp_path / "list.txt")[0]) == [b"image"]
    assert ids_of(tmp_path / "list.txt") == ids_of(tmp_path)


@pytest.mark.parametrize("line", ["http://host/x.jpg", "ftp://host/x.jpg", "s3://k\udcff/x.jpg"])
def test_list_with_a_bad_line_names_it(tmp_path: Path, line: str) -> None:
    text = f"x.jpg\n{line}\n"
    (tmp_path / "list.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"list\.txt, line 2"):
        listed(tmp_path / "list.txt")


@pytest.mark.parametrize("column", ["uri", "path", "file_name", "url"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary("int32", "string")])
def test_parquet_list_has_its_uris_in_one_of_four_columns(
    tree: Path, column: str, kind: pa.DataType
) -> None:
    uris = pa.array(["a/cat.jpg", f"{tree}/top.webp", "a/cat.jpg"]).cast(kind)
    pq.write_table(pa.table({"number": [1, 2, 3], column: uris}), tree / "list.parquet")
    found, report = listed(tree / "list.parquet")
    assert below(tree, found) == ["a/cat.jpg", "top.webp"]
    assert (report.kind, report.num_duplicates) == ("list", 1)


def test_parquet_without_uris_or_bytes_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": [1], "caption": ["x"]}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"uri or path .* got uri, caption"):
        listed(tmp_path / "list.parquet")


def test_parquet_list_with_a_bad_row_names_it(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["x.jpg", None]}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match="row 1: a URI must not be empty"):
        listed(tmp_path / "list.parquet")


def test_damaged_parquet_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "list.parquet").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        listed(tmp_path / "list.parquet")


def test_lists_in_two_folders_keep_equal_names_apart(tree: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({"uri": ["cat.jpg"]}), tree / name / "part.parquet")
    uris, report = listed(tree / "*" / "*.parquet")
    assert below(tree, uris) == ["a/cat.jpg", "b/cat.jpg"]
    assert report.kind == "list"


def hugging_face_table(place: Path, names: Sequence[str | None], rows_per_group: int = 2) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": f"image {row}".encode(), "path": name} for row, name in enumerate(names)]
    table = pa.table({"image": images, "label": list(range(len(names)))})
    pq.write_table(table, place, row_group_size=rows_per_group)
    return place


def test_hugging_face_table_keeps_names_and_reads_its_rows(tmp_path: Path) -> None:
    names = ["dogs/a.jpg", "../../etc/passwd", "C:\\x\\b.png", None, ".."]
    place = hugging_face_table(tmp_path / "x.parquet", names)
    uris, report = listed(place)
    tails = ["0/a.jpg", "1/passwd", "2/b.png", "3", "4"]
    assert uris == [f"{place}#{tail}" for tail in tails]
    assert report.kind == "table"
    assert fetch_bytes(uris[::-1]) == [f"image {row}".encode() for row in (4, 3, 2, 1, 0)]
    assert ids_of(place)[0] == image_id("x.parquet#0/a.jpg")


@pytest.mark.parametrize("column", ["bytes", "image", "img"])
def test_plain_binary_columns_are_images(tmp_path: Path, column: str) -> None:
    pq.write_table(pa.table({column: [b"x", b"y"]}), tmp_path / "x.PARQUET")
    uris, report = listed(tmp_path / "x.PARQUET")
    assert report.kind == "table"
    assert fetch_bytes(uris) == [b"x", b"y"]


def test_folder_of_nothing_but_tables_is_a_table(tmp_path: Path) -> None:
    hugging_face_table(tmp_path / "t" / "train-0.parquet", ["a.jpg"])
    hugging_face_table(tmp_path / "t" / "more" / "train-0.parquet", ["a.jpg"])
    plant(tmp_path, "t/README.md")
    uris, report = listed(tmp_path / "t")
    assert below(tmp_path / "t", uris) == [
        "train-0.parquet#0/a.jpg",
        "more/train-0.parquet#0/a.jpg",
    ]
    assert report.kind == "table"
    assert report.ignored_by_extension == {".md": 1}
    assert ids_of(tmp_path / "t") == ids_of(shutil.copytree(tmp_path / "t", tmp_path / "copy"))


def test_table_beside_images_is_ignored_and_counted(tree: Path) -> None:
    hugging_face_table(tree / "x.parquet", ["a.jpg"])
    assert listed(tree)[1].ignored_by_extension[".parquet"] == 1


def test_table_that_differs_from_its_neighbours_is_named(tmp_path: Path) -> None:
    hugging_face_table(tmp_path / "a.parquet", ["a.jpg"])
    pq.write_table(pa.table({"caption": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet must hold image bytes .* got caption"):
        listed(tmp_path)
