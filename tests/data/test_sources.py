"""The bytes behind a URI, or a fault in their place that costs no neighbour anything."""

import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import sources
from pipeline.data.sources import ReadFault, fetch_bytes, row_uri, split_row
from tests.data.conftest import plant


def test_fetch_answers_in_order_and_puts_a_fault_for_each_bad_file(tree: Path) -> None:
    plant(tree, "empty.jpg").joinpath("empty.jpg").write_bytes(b"")
    os.mkfifo(tree / "pipe.jpg")
    names = ["a/cat.jpg", "gone.jpg", "empty.jpg", "b", "pipe.jpg", "a/cat.jpg/x.jpg", "top.webp"]
    faults = ["not found", "empty file", "a folder, not a file", "not a regular file", "not found"]
    expected = [b"a/cat.jpg", *map(ReadFault, faults), b"top.webp"]
    assert fetch_bytes([f"{tree}/{name}" for name in names]) == expected


@pytest.mark.parametrize("uri", ["/x\0y.jpg", "", "http://169.254.169.254/x", "s3://", "/dev/zero"])
def test_fetch_never_raises_for_a_bad_uri(uri: str) -> None:
    assert isinstance(fetch_bytes([uri])[0], ReadFault)


def test_fetching_nothing_gives_nothing() -> None:
    assert fetch_bytes([]) == []


def test_each_row_group_is_read_once_in_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "x.parquet"
    pq.write_table(pa.table({"bytes": [b"x"] * 6}), place, row_group_size=2)
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, index: int, **options: object) -> pa.Table:
        read.append(index)
        return original(self, index, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    fetch_bytes([f"{place}#{row}" for row in (5, 0, 1, 4, 0)])
    assert read == [0, 2]


def test_faults_in_a_table_stay_in_their_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"bytes": [b"x", None, b""]}), tmp_path / "x.parquet")
    rows = fetch_bytes([f"{tmp_path}/x.parquet#{row}" for row in range(4)])
    nothing = ReadFault("no bytes in the row")
    assert rows == [b"x", nothing, nothing, ReadFault("the table has only 3 rows")]


def test_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    place = tmp_path / "x.parquet"
    table = pa.table({"bytes": [bytes([row]) * 5000 for row in range(4)]})
    pq.write_table(table, place, row_group_size=2, compression="none", use_dictionary=False)
    start = pq.ParquetFile(place).metadata.row_group(0).column(0).data_page_offset
    damaged = bytearray(place.read_bytes())
    damaged[start : start + 40] = b"\xff" * 40
    place.write_bytes(damaged)
    found = fetch_bytes([f"{place}#{row}" for row in range(4)])
    assert [type(answer) for answer in found] == [ReadFault, ReadFault, bytes, bytes]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gone.parquet#0", "not found"), ("list.parquet#0", "the table has no column of bytes named")],
)
def test_row_of_what_is_no_table_of_images_is_a_fault(
    tmp_path: Path, name: str, reason: str
) -> None:
    pq.write_table(pa.table({"uri": ["x"]}), tmp_path / "list.parquet")
    fault = fetch_bytes([f"{tmp_path}/{name}"])[0]
    assert isinstance(fault, ReadFault)
    assert fault.reason.startswith(reason)


@pytest.mark.parametrize("name", [None, "a.jpg", "y.parquet#4", "x" * 300, "a\nb/c\td.jpg", "/"])
def test_row_uris_come_apart_again(name: str | None) -> None:
    assert split_row(row_uri("s3://b/x.parquet", 7, name)) == ("s3://b/x.parquet", 7)


@pytest.mark.parametrize("uri", ["/x/y.jpg", "/x.parquet", "/x.parquet#", "/x.parquet#a/1", "/x#1"])
def test_other_uris_are_no_rows(uri: str) -> None:
    assert split_row(uri) is None


def test_waits_between_tries_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fail() -> bytes:
        raise OSError("slow down")

    assert sources._patiently(fail, tries=3, wait_seconds=1.0) == ReadFault("slow down")
    assert len(waits) == 2
    assert 0.5 <= waits[0] <= 1.0 <= waits[1] <= 2.0
