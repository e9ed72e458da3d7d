"""Finished pseudo-label tables on disk, as the labelling job leaves them.

A test that needs other columns gives them to ``label_row``; one that needs another manifest gives
its fields to ``write_table``.
"""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.pseudo_labels import (
    LATER_COLUMNS,
    SCHEMA,
    Manifest,
    describe_file,
    encode_table,
    read_manifest,
    write_manifest,
)
from pipeline.storage import Location

Row = dict[str, Any]


def label_row(image_id: str, **columns: Any) -> Row:
    """A row with what every image has, and null in the columns that are not given."""
    known = {
        "image_id": image_id,
        "uri": f"/photos/{image_id}",
        "status": "ok",
        "method": "solost",
        "run_id": "r1",
        "config_hash": "c1",
        "weights_sha256": "w1",
        "created_at": datetime(2026, 1, 2, tzinfo=UTC),
    }
    return dict.fromkeys(SCHEMA.names) | known | columns


def write_table(
    folder: Path, *parts: list[Row], config: dict[str, Any] | None = None, **fields: Any
) -> Location:
    """A finished table with one file per part; ``fields`` are the manifest's that differ."""
    place = Location.parse(str(folder))
    files = []
    for number, rows in enumerate(parts):
        data = encode_table(pa.Table.from_pylist(rows, schema=SCHEMA), config or {})
        name = f"part-{number:05}.parquet"
        place.child(name).write_bytes(data)
        files.append(describe_file(name, len(rows), data))
    known: dict[str, Any] = {
        "run_id": "r1",
        "created_at": "2026-01-02T00:00:00+00:00",
        "files": files,
        "rows": sum(map(len, parts)),
        "counts": dict(Counter(row["status"] for rows in parts for row in rows)),
        "config": config or {},
        "config_hash": "c1",
        "weights_sha256": "w1",
    }
    write_manifest(place, Manifest(**(known | fields)))
    return place


def leave_out_later_columns(folder: Path) -> None:
    """Make the table one of Patchseed 0.1, which had less columns."""
    place = Location.parse(str(folder))
    manifest = read_manifest(place)
    files = []
    for file in manifest.files:
        table = pq.read_table(folder / file.name).drop_columns(list(LATER_COLUMNS))
        pq.write_table(table, folder / file.name)
        data = (folder / file.name).read_bytes()
        files.append(describe_file(file.name, table.num_rows, data))
    write_manifest(place, manifest.model_copy(update={"files": files}))
