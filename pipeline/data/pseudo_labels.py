"""THE table in which the stages meet: one row per input image, failures included.

A table is a folder of Parquet files plus ``_MANIFEST.json``, which is written last. Readers trust
only what the manifest lists: stray files of a killed run are invisible, and a folder without a
manifest is a run that has not finished. Columns are plain Arrow types, so DuckDB, pandas and polars
read them as well.

To add a column: add it to ``SCHEMA`` and to ``LATER_COLUMNS`` with a line in ``docs/table.md``;
raise ``SCHEMA_VERSION`` only where an old reader would misunderstand the new table.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import DataError, one_line
from pipeline.storage import Location

SCHEMA_VERSION = 1
MANIFEST_NAME = "_MANIFEST.json"
MAX_ERROR_LENGTH = 512

_PACKAGES = (
    *("patchseed", "torch", "torchvision", "timm", "ray", "pyarrow", "pillow", "numpy", "scipy"),
    "pycocotools",
)

Status = Literal[
    "ok",
    "no_object",
    "skipped_too_small",
    "skipped_too_large",
    "error_read",
    "error_decode",
    "error_bomb",
    "error_memory",
]

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        # After the EXIF transpose, at the original resolution; null where the header is unreadable.
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("exif_orientation", pa.int8()),
        pa.field("num_frames", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        # xyxy absolute pixels, 0 <= x0 < x1 <= width; empty if nothing was found, null if the
        # image was not processed.
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("labels", pa.list_(pa.int32())),
        # What the scores rest on, one per box as they are; null where the method has no such thing.
        pa.field("contrast", pa.list_(pa.float32())),
        pa.field("agreement", pa.list_(pa.float32())),
        # COCO's run lengths of a grid of ``size`` rows and columns, whose cells are ``cell`` pixels
        # of the original wide and high: 1 and 1 where the mask is as fine as the image.
        pa.field(
            "masks",
            pa.list_(
                pa.struct(
                    [
                        pa.field("size", pa.list_(pa.int32())),
                        pa.field("counts", pa.string()),
                        pa.field("cell", pa.list_(pa.float32())),
                    ]
                )
            ),
        ),
        pa.field("method", pa.string(), nullable=False),
        # Centre of the seed patch, in pixels: two numbers, or null. Not a list of fixed size:
        # Arrow 25 writes null ones to Parquet but cannot read them back (apache/arrow#35692).
        pa.field("seed_xy", pa.list_(pa.float32())),
        pa.field("seed_degree", pa.int32()),
        pa.field("area_fraction", pa.float32()),
        pa.field("touches_border", pa.bool_()),
        pa.field("content_sha256", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("config_hash", pa.string(), nullable=False),
        pa.field("weights_sha256", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

LATER_COLUMNS = ("num_frames", "contrast", "agreement", "masks")
"""Tables from before there were these are read as if they held nulls."""


class TableFile(BaseModel):
    """One Parquet file that belongs to the table."""

    model_config = ConfigDict(frozen=True)
    name: str
    rows: int
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What the table consists of and how it was made; the commit point of a labelling run."""

    model_config = ConfigDict(frozen=True)
    schema_version: int = SCHEMA_VERSION
    run_id: str
    created_at: str
    files: list[TableFile]
    rows: int
    counts: dict[str, int]
    config: dict[str, Any]
    config_hash: str
    weights_sha256: str
    passes: int = 1
    collection: dict[str, Any] = {}
    job: dict[str, Any] = {}
    versions: dict[str, str] = {}
    tracking: dict[str, str] = {}


def file_metadata(config: dict[str, Any]) -> dict[str, str]:
    """The key-value metadata every Parquet file of the table carries."""
    return {
        "patchseed.schema_version": str(SCHEMA_VERSION),
        "patchseed.box_format": "xyxy_abs",
        "patchseed.config": json.dumps(config, sort_keys=True),
    }


def config_hash(config: dict[str, Any]) -> str:
    """Sixteen hex digits that change when any setting does."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of what numbers may depend on: python and packages; one that is not installed is absent."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def encode_table(table: pa.Table, config: dict[str, Any], schema: pa.Schema | None = None) -> bytes:
    """``table`` as the bytes of one Parquet file (zstd), with the table's metadata.

    Args:
        table: rows of the schema.
        config: how they are made.
        schema: None is ``SCHEMA``.
    """
    sink = pa.BufferOutputStream()
    schema = (SCHEMA if schema is None else schema).with_metadata(file_metadata(config))
    pq.write_table(table.cast(schema), sink, compression="zstd")
    return bytes(sink.getvalue())


def describe_file(name: str, rows: int, data: bytes) -> TableFile:
    """The manifest's line about a file with these bytes."""
    digest = hashlib.sha256(data).hexdigest()
    return TableFile(name=name, rows=rows, size_bytes=len(data), sha256=digest)


def write_manifest(folder: Location, manifest: Manifest) -> None:
    """Commit the table: from here on readers see exactly ``manifest.files``."""
    text = manifest.model_dump_json(indent=2) + "\n"
    folder.child(MANIFEST_NAME).write_bytes(text.encode())


def read_manifest(folder: Location) -> Manifest:
    """The manifest of a finished table.

    Raises:
        DataError: there is none, it is damaged, or a later version wrote it.
    """
    place = folder.child(MANIFEST_NAME)
    if place.kind() != "file":
        raise DataError(
            f"{folder} holds no {MANIFEST_NAME}: it is no pseudo-label table, or its labelling run "
            "has not finished. Finish it with jobs/label_images.py ... --resume"
        )
    try:
        content = json.loads(place.read_bytes())
    except (OSError, ValueError) as fault:
        raise DataError(f"{place} cannot be read: {one_line(fault)}") from fault
    # Before the other fields: what they are may be just what a later version changed.
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise DataError(
            f"{folder} holds pseudo labels of version {version}, this code reads "
            f"version {SCHEMA_VERSION}. Label the images again with jobs/label_images.py"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as fault:
        raise DataError(f"{place} is damaged: {one_line(fault)}") from fault


def manifest_sha256(folder: Location) -> str:
    """Names a finished table with all it holds: its manifest holds the hashes of its files.

    Raises:
        DataError: it cannot be read.
    """
    place = folder.child(MANIFEST_NAME)
    try:
        return hashlib.sha256(place.read_bytes()).hexdigest()
    except OSError as fault:
        raise DataError(f"{place} cannot be read: {one_line(fault)}") from fault


def iterate_labels(folder: Location, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The table's files one after another, so that memory holds one at a time.

    ``columns`` are those of ``SCHEMA``, all where None; others that a file may have are left out.

    Raises:
        DataError: a listed file is missing, not the one the manifest describes, or lacks a column.
    """
    for file in read_manifest(folder).files:
        yield _read_file(folder.child(file.name), file, columns)


def read_labels(folder: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """The whole table in memory, sorted by image_id."""
    tables = list(iterate_labels(folder, columns))
    if not tables:
        chosen = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
        return chosen.empty_table()
    table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    return table.sort_by("image_id") if "image_id" in table.column_names else table


def _read_file(place: Location, file: TableFile, columns: Sequence[str] | None) -> pa.Table:
    """One listed file, checked against what the manifest says of it."""
    wanted = list(SCHEMA.names if columns is None else columns)
    try:
        data = place.read_bytes()
        # Parquet notices few flipped bits by itself, and a stale cache or a half-copied table is
        # well-formed; the bytes are in memory anyway.
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise DataError(
                f"{place} is not the file its manifest describes: its {len(data)} bytes have "
                f"another sha256 (expected {file.size_bytes} bytes). Copy the table again, or "
                "label the images again"
            )
        parquet = pq.ParquetFile(pa.BufferReader(data))
        absent = sorted(set(wanted) - set(parquet.schema_arrow.names))
        if not set(absent) <= set(LATER_COLUMNS):
            raise DataError(f"{place} lacks the columns {', '.join(absent)}: it is no label table")
        table = parquet.read(columns=[name for name in wanted if name not in absent])
    except (OSError, pa.ArrowException) as fault:
        raise DataError(f"{place} cannot be read: {one_line(fault)}") from fault
    if table.num_rows != file.rows:
        raise DataError(f"{place} has {table.num_rows} rows, the manifest says {file.rows}")
    for name in absent:
        field = SCHEMA.field(name)
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(wanted)
