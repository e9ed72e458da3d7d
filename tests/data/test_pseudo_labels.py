"""The table: what is written is what is read, and nothing that the manifest does not vouch for."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import pseudo_labels
from pipeline.data.pseudo_labels import (
    LATER_COLUMNS,
    MANIFEST_NAME,
    SCHEMA,
    config_hash,
    describe_file,
    encode_table,
    iterate_labels,
    read_labels,
    read_manifest,
)
from pipeline.errors import DataError
from pipeline.storage import Location
from tests import tables
from tests.tables import Row, label_row

CONFIG = {"localization.rule": "solost", "localization.keep_fraction": 0.5}


def row(image_id: str, **columns: Any) -> Row:
    """A complete row; a failed one has nulls where nothing was measured."""
    found = {"boxes": [[1.5, 2.0, 30.0, 40.0]], "scores": [0.25], "labels": [1]}
    return label_row(image_id, **({"uri": f"/photos/{image_id}.jpg"} | found | columns))


def write_table(folder: Path, *parts: list[Row]) -> Location:
    return tables.write_table(folder, *parts, config=CONFIG)


def test_rows_come_back_as_they_went_in_sorted_by_id(tmp_path: Path) -> None:
    rows = [row("c"), row("a", status="error_decode", boxes=None, scores=None, labels=None)]
    place = write_table(tmp_path, rows, [row("b", boxes=[], scores=[], status="no_object")])
    table = read_labels(place)
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist() == [
        rows[1],
        row("b", boxes=[], scores=[], status="no_object"),
        rows[0],
    ]


def test_seed_survives_parquet_beside_a_row_without_one(tmp_path: Path) -> None:
    place = write_table(tmp_path, [row("a", seed_xy=[8.0, 24.5]), row("b"), row("c")])
    assert read_labels(place)["seed_xy"].to_pylist() == [[8.0, 24.5], None, None]


def test_any_parquet_reader_sees_plain_columns_and_the_metadata(tmp_path: Path) -> None:
    write_table(tmp_path, [row("a")])
    table = pq.read_table(tmp_path / "part-00000.parquet")
    assert table.schema.field("boxes").type == pa.list_(pa.list_(pa.float32(), 4))
    assert table.schema.metadata[b"patchseed.box_format"] == b"xyxy_abs"
    assert table.schema.metadata[b"patchseed.schema_version"] == b"1"
    assert json.loads(table.schema.metadata[b"patchseed.config"]) == CONFIG


def test_file_is_the_same_bytes_whenever_it_is_encoded() -> None:
    table = pa.Table.from_pylist([row("a"), row("b")], schema=SCHEMA)
    assert encode_table(table, CONFIG) == encode_table(table, CONFIG)


def test_chosen_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    place = write_table(tmp_path, [row("b")], [row("a")])
    assert read_labels(place, ["status", "image_id"]).column_names == ["status", "image_id"]
    assert [table["uri"][0].as_py() for table in iterate_labels(place, ["uri"])] == [
        "/photos/b.jpg",
        "/photos/a.jpg",
    ]


@pytest.mark.parametrize("columns", [None, ["uri", "boxes"]])
def test_table_without_files_is_empty_but_has_its_columns(
    tmp_path: Path, columns: list[str] | None
) -> None:
    table = read_labels(write_table(tmp_path), columns)
    assert table.num_rows == 0
    assert table.column_names == (columns or SCHEMA.names)


def test_stray_files_of_a_killed_run_are_invisible(tmp_path: Path) -> None:
    place = write_table(tmp_path, [row("a")])
    (tmp_path / "part-00001.parquet").write_bytes(b"half a file")
    assert read_labels(place).num_rows == 1


def test_row_without_a_status_cannot_be_written() -> None:
    table = pa.Table.from_pylist([row("a")], schema=pa.schema(list(SCHEMA)))
    broken = table.set_column(SCHEMA.get_field_index("status"), "status", pa.nulls(1, pa.string()))
    with pytest.raises(ValueError, match="null"):
        encode_table(broken, CONFIG)


def test_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    place = write_table(tmp_path, [row("a")])
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(DataError, match=r"holds no _MANIFEST\.json.*--resume"):
        read_labels(place)


def change_manifest(folder: Path, **fields: Any) -> None:
    place = folder / MANIFEST_NAME
    place.write_text(json.dumps(json.loads(place.read_text()) | fields))


def test_later_version_is_told_as_such_even_if_its_fields_are_others(tmp_path: Path) -> None:
    place = write_table(tmp_path, [row("a")])
    change_manifest(tmp_path, schema_version=2, files="now in a database")
    with pytest.raises(DataError, match="of version 2, this code reads version 1"):
        read_manifest(place)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 1}', "\x00"])
def test_damaged_manifest_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(DataError, match=r"_MANIFEST\.json (is damaged|cannot be read)") as fault:
        read_manifest(Location.parse(str(tmp_path)))
    assert "\n" not in str(fault.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    place = write_table(tmp_path, [row("a")], [row("b")])
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00001\.parquet cannot be read"):
        read_labels(place)


def test_single_flipped_bit_is_noticed(tmp_path: Path) -> None:
    place = write_table(tmp_path, [row("a")])
    file = tmp_path / "part-00000.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="is not the file its manifest describes"):
        read_labels(place)


def test_other_number_of_rows_is_noticed(tmp_path: Path) -> None:
    place = write_table(tmp_path, [row("a")])
    files = [file.model_dump() | {"rows": 5} for file in read_manifest(place).files]
    change_manifest(tmp_path, files=files)
    with pytest.raises(DataError, match="has 1 rows, the manifest says 5"):
        read_labels(place)


@pytest.mark.parametrize("data", [b"", b"PAR1 but no table PAR1"])
def test_vouched_for_but_no_parquet_is_a_data_error(tmp_path: Path, data: bytes) -> None:
    place = write_table(tmp_path, [row("a")])
    (tmp_path / "part-00000.parquet").write_bytes(data)
    change_manifest(tmp_path, files=[describe_file("part-00000.parquet", 1, data).model_dump()])
    with pytest.raises(DataError, match=r"part-00000\.parquet cannot be read"):
        read_labels(place)


def test_foreign_parquet_lacks_columns_by_name(tmp_path: Path) -> None:
    place = write_table(tmp_path, [row("a")])
    pq.write_table(pa.table({"uri": ["a"]}), tmp_path / "other.parquet")
    data = (tmp_path / "other.parquet").read_bytes()
    change_manifest(tmp_path, files=[describe_file("other.parquet", 1, data).model_dump()])
    with pytest.raises(DataError, match="lacks the columns boxes, status"):
        read_labels(place, ["uri", "status", "boxes"])


@pytest.mark.parametrize("columns", [None, ["masks", "uri"]])
def test_what_a_table_is_older_than_is_null(tmp_path: Path, columns: list[str] | None) -> None:
    mask = {"size": [1, 1], "counts": "01", "cell": [8.0, 8.0]}
    place = write_table(tmp_path, [row("a", masks=[mask])], [row("b")])
    file = tmp_path / "part-00001.parquet"
    pq.write_table(pq.read_table(file).drop_columns(list(LATER_COLUMNS)), file)
    files = [one.model_dump() for one in read_manifest(place).files]
    files[1] = describe_file(file.name, 1, file.read_bytes()).model_dump()
    change_manifest(tmp_path, files=files)
    table = read_labels(place, columns)
    assert table.column_names == (columns or SCHEMA.names)
    assert table["masks"].to_pylist() == [[mask], None]
    assert table.schema.field("masks").type == SCHEMA.field("masks").type


def test_config_hash_changes_with_any_value_and_not_with_the_order() -> None:
    assert config_hash(CONFIG) == config_hash(dict(reversed(CONFIG.items())))
    assert config_hash(CONFIG) != config_hash(CONFIG | {"localization.keep_fraction": 0.6})
    assert len(config_hash(CONFIG)) == 16


def test_every_status_fits_the_documented_names() -> None:
    names = pseudo_labels.Status.__args__  # type: ignore[attr-defined]
    assert {"ok", "no_object"} < set(names)
    assert all(name.split("_")[0] in ("ok", "no", "skipped", "error") for name in names)
