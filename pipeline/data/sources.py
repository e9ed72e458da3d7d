"""The bytes behind URIs: local files, objects of a store, images inside Parquet tables.

| form | names |
|---|---|
| ``/data/a b#1.jpg`` | a local file, letter by letter |
| ``file:///data/%FF.jpg`` | a local file, percent-decoded: for names that are not UTF-8 |
| ``s3://bucket/key``, ``gs://bucket/key`` | an object, the key letter by letter |
| ``/data/x.parquet#7``, ``s3://bucket/x.parquet#7/cat.jpg`` | row 7 (from 0) of a table of |
| | images; the name behind it is for people and plays no part in the reading |

A bad URI costs its own image only: ``fetch_bytes`` answers with a ``ReadFault`` in its place.

To read another kind of place: a form in ``_read_file`` and a line above. To accept another column
of image bytes: ``IMAGE_COLUMNS``.
"""

import bisect
import itertools
import os
import random
import re
import stat
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import PatchseedError, one_line, without_secrets
from pipeline.storage import Location, file_uri

IMAGE_COLUMNS = ("image", "img", "bytes")
"""Columns in which a Parquet table may hold encoded images: binary, or Hugging Face's struct
``{bytes, path}``; the first that is there counts."""

_ROW = re.compile(r"(?P<table>.+?\.parquet)#(?P<row>\d+)(?:/.*)?", re.IGNORECASE | re.DOTALL)
_READS_AS_ROW = re.compile(r"\.parquet#\d", re.IGNORECASE)
_TRIES = 3
# Requests in flight to a store: a small object costs a round trip, not bandwidth.
_NUM_READERS = 16
_NOT_TEXT = re.compile(r"[\x00-\x1f\x7f]")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class ReadFault:
    """Why there are no bytes, in a few words without a path: ``"not found"``, ``"empty file"``."""

    reason: str


def fetch_bytes(uris: Sequence[str], *, wait_seconds: float = 0.5) -> list[bytes | ReadFault]:
    """The bytes of every URI, in the same order; a fault takes the place of what cannot be read.

    Stores are read by a few threads at once, and asked again (3 tries, each wait twice the one
    before) unless they say that the object is missing or forbidden. A Parquet table is opened once
    per call and each of its row groups that holds a wanted row is read once.
    """
    found: dict[int, bytes | ReadFault] = {}
    remote: dict[int, Location] = {}
    rows: dict[str, list[tuple[int, int]]] = {}
    for index, uri in enumerate(uris):
        row = split_row(uri)
        if row is not None:
            rows.setdefault(row[0], []).append((index, row[1]))
            continue
        place = _parse(uri)
        if isinstance(place, ReadFault):
            found[index] = place
        elif place.is_local:
            found[index] = _patiently(partial(_read_file, place), tries=1, wait_seconds=0)
        else:
            remote[index] = place
    found |= _read_remote(remote, wait_seconds)
    for table_uri, wanted in rows.items():
        answers = _read_rows(table_uri, [row for _, row in wanted], wait_seconds)
        found |= {index: answers[row] for index, row in wanted}
    return [found[index] for index in range(len(uris))]


def place_uri(place: Location) -> str:
    """The URI from which ``fetch_bytes`` finds ``place`` again, plain wherever that is possible."""
    if place.is_local and _READS_AS_ROW.search(place.path):
        return file_uri(place.path)
    return str(place)


def row_uri(table_uri: str, row: int, name: str | None = None) -> str:
    """The URI of an image in a table; ``name`` is cut down to a harmless file name.

    Names come from whoever made the table: ``../../etc/x.jpg`` ends as ``x.jpg``.
    """
    base = (name or "").replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    base = _NOT_TEXT.sub("_", base)[:255]
    return f"{table_uri}#{row}" + (f"/{base}" if base not in ("", ".", "..") else "")


def split_row(uri: str) -> tuple[str, int] | None:
    """Table and row number of a ``row_uri``; None for any other URI."""
    found = _ROW.fullmatch(uri)
    return (found["table"], int(found["row"])) if found else None


def image_column(schema: pa.Schema) -> pa.Field | None:
    """The field of ``schema`` that holds encoded images, None where there is none."""
    for name in IMAGE_COLUMNS:
        index = schema.get_field_index(name)
        if index >= 0 and _holds_bytes(schema.field(index).type):
            return schema.field(index)
    return None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(holds(kind) for holds in binary)


def _parse(uri: str) -> Location | ReadFault:
    try:
        return Location.parse(uri)
    except (PatchseedError, ValueError) as fault:
        return ReadFault(one_line(fault))


def _read_file(place: Location) -> bytes | ReadFault:
    _refuse_endless(place)
    return place.read_bytes() or ReadFault("empty file")


def _refuse_endless(place: Location) -> None:
    """Raise OSError for a pipe or a device, which would be read for ever."""
    if place.is_local and not stat.S_ISREG(mode := os.stat(place.path).st_mode):
        raise OSError("a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")


def _read_remote(places: dict[int, Location], wait_seconds: float) -> dict[int, bytes | ReadFault]:
    """What the stores hold at ``places``, under the same keys."""
    if not places:
        return {}

    def read(place: Location) -> bytes | ReadFault:
        return _patiently(partial(_read_file, place), tries=_TRIES, wait_seconds=wait_seconds)

    with ThreadPoolExecutor(min(_NUM_READERS, len(places))) as readers:
        return dict(zip(places, readers.map(read, places.values()), strict=True))


def _read_rows(
    table_uri: str, rows: Sequence[int], wait_seconds: float
) -> dict[int, bytes | ReadFault]:
    """What each of ``rows`` of the table holds; a damaged row group costs its own rows only."""
    place = _parse(table_uri)
    if isinstance(place, ReadFault):
        return dict.fromkeys(rows, place)
    tries = 1 if place.is_local else _TRIES
    file = _patiently(partial(_open_table, place), tries=tries, wait_seconds=wait_seconds)
    if isinstance(file, ReadFault):
        return dict.fromkeys(rows, file)
    try:
        return _read_open_table(file, rows, tries, wait_seconds)
    finally:
        file.close(force=True)


def _read_open_table(
    file: pq.ParquetFile, rows: Sequence[int], tries: int, wait_seconds: float
) -> dict[int, bytes | ReadFault]:
    sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    starts = [0, *itertools.accumulate(sizes)]
    beyond = ReadFault(f"the table has only {starts[-1]} rows")
    found: dict[int, bytes | ReadFault] = {row: beyond for row in rows if row >= starts[-1]}
    inside = sorted(set(rows) - found.keys())
    for group, members in itertools.groupby(inside, lambda row: bisect.bisect(starts, row) - 1):
        read = partial(_read_row_group, file, group)
        images = _patiently(read, tries=tries, wait_seconds=wait_seconds)
        for row in members:
            if isinstance(images, ReadFault):
                found[row] = images
            else:
                image = images[row - starts[group]].as_py()
                found[row] = image or ReadFault("no bytes in the row")
    return found


def _read_row_group(file: pq.ParquetFile, index: int) -> pa.ChunkedArray:
    """The encoded images of one row group."""
    field = image_column(file.schema_arrow)
    if field is None:
        raise ValueError(f"the table has no column of bytes named {', '.join(IMAGE_COLUMNS)}")
    leaf = f"{field.name}.bytes" if pa.types.is_struct(field.type) else field.name
    column = file.read_row_group(index, columns=[leaf]).column(0)
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _open_table(place: Location) -> pq.ParquetFile:
    """The opened Parquet file; its ``close(force=True)`` closes the stream below it too."""
    _refuse_endless(place)
    stream = place.open()
    try:
        return pq.ParquetFile(stream)
    except BaseException:
        stream.close()
        raise


def _patiently(
    action: Callable[[], _Value], *, tries: int, wait_seconds: float
) -> _Value | ReadFault:
    """What ``action`` returns; after the last try, or where trying again is useless, the fault."""
    attempt = 1
    while True:
        try:
            return action()
        except (OSError, ValueError, pa.ArrowException) as fault:
            reason = _final_reason(fault)
            if reason is not None or attempt >= tries:
                return ReadFault(reason or without_secrets(one_line(fault)))
        # Spread out, or all the workers that a store has just turned away would be back at once;
        # from the system's generator, so that the seeded ones stay where they are.
        spread = random.SystemRandom().uniform(0.5, 1.0)
        time.sleep(wait_seconds * 2 ** (attempt - 1) * spread)
        attempt += 1


def _final_reason(fault: Exception) -> str | None:
    """The fault in a few words if another try cannot help, else None."""
    if isinstance(fault, FileNotFoundError | NotADirectoryError):
        return "not found"
    if isinstance(fault, PermissionError) or "ACCESS_DENIED" in str(fault):
        return "permission denied"
    # S3 answers a HEAD without a body: the number is all it says of an expired token.
    if "HTTP status 400" in str(fault):
        return "the store refused the request (HTTP 400): expired credentials or wrong region?"
    return None
