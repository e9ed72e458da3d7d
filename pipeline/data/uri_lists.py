"""What a list of URIs or a table of images names: text and Parquet files -> entries, streamed.

To accept another column of URIs: ``URI_COLUMNS``. Another file of URIs is a generator like
``text_list``: the list's place and the collection's root in, entries out.
"""

import io
import itertools
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.sources import IMAGE_COLUMNS, image_column, place_uri, row_uri, split_row
from pipeline.errors import ConfigError, DataError, one_line
from pipeline.storage import Location, split_uri

URI_COLUMNS = ("uri", "path", "file_name", "url")
"""Columns in which a Parquet list may hold its URIs, as text; the first that is there counts."""

_ABSOLUTE = re.compile(r"/|[A-Za-z][A-Za-z0-9+.-]*://")


class Entry(NamedTuple):
    """One image of a collection."""

    identity: str
    """What its id is made of: the path below the collection's root, or the whole URI outside it."""

    uri: str
    """From where it can be read: an absolute path or a URI."""


def text_list(place: Location, root: Location) -> Iterator[Entry]:
    """The URIs of a text file, one a line; blank lines and those that begin with # are skipped.

    A relative line is relative to the list's folder. A name that begins or ends with a space, or
    holds a line break, is written as ``file://`` with ``%20`` or ``%0A``.

    Raises:
        DataError: the list cannot be read, or a line is no path or URI we read.
    """
    try:
        with place.open() as stream:
            lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")
            for number, line in enumerate(lines, start=1):
                text = line.strip()
                if text and not text.startswith("#"):
                    yield _entry(text, place, root, f"line {number}")
    except OSError as fault:
        raise DataError(f"{place} cannot be read: {one_line(fault)}") from fault


def parquet_list(place: Location, root: Location) -> Iterator[Entry]:
    """The URIs in a Parquet file's first text column named as in ``URI_COLUMNS``.

    Raises:
        DataError: it cannot be read, has no such column, or a row is no path or URI we read.
    """
    with _opened(place) as file:
        column = _uri_column(file.schema_arrow)
        if column is None:
            raise DataError(
                f"{place} must have a text column {' or '.join(URI_COLUMNS)}, or image bytes in "
                f"{' or '.join(IMAGE_COLUMNS)}, got {', '.join(file.schema_arrow.names)}"
            )
        number = 0
        for batch in file.iter_batches(columns=[column]):
            for text in batch.column(0).cast(pa.string()).to_pylist():
                yield _entry(text or "", place, root, f"row {number}")
                number += 1


def image_table(place: Location, root: Location) -> Iterator[Entry]:
    """A URI for each row of a Parquet table of images; the images themselves are not read.

    Raises:
        DataError: it cannot be read, or has no image bytes.
    """
    base = place_uri(place)
    relative = _below(place.path, root) or base
    with _opened(place) as file:
        field = image_column(file.schema_arrow)
        if field is None:
            raise DataError(
                f"{place} must hold image bytes in {' or '.join(IMAGE_COLUMNS)} like the table "
                f"before it, got {', '.join(file.schema_arrow.names)}"
            )
        for row, name in enumerate(_names_of_rows(file, field)):
            yield Entry(row_uri(relative, row, name), row_uri(base, row, name))


def holds_images(place: Location) -> bool:
    """Whether a Parquet file has image bytes.

    Raises:
        DataError: it cannot be read.
    """
    with _opened(place) as file:
        return image_column(file.schema_arrow) is not None


@contextmanager
def _opened(place: Location) -> Iterator[Any]:
    """``place`` as a ``pq.ParquetFile``; damage in it becomes a DataError."""
    try:
        with place.open() as stream, pq.ParquetFile(stream) as file:
            yield file
    except (OSError, pa.ArrowException) as fault:
        raise DataError(f"{place} cannot be read as Parquet: {one_line(fault)}") from fault


def _uri_column(schema: pa.Schema) -> str | None:
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    for name in URI_COLUMNS:
        index = schema.get_field_index(name)
        kind = schema.field(index).type if index >= 0 else pa.null()
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if any(is_text(kind) for is_text in text):
            return name
    return None


def _names_of_rows(file: Any, field: pa.Field) -> Iterator[str | None]:
    """What the rows' images are called in Hugging Face's struct; None where there are no names."""
    if not pa.types.is_struct(field.type) or field.type.get_field_index("path") < 0:
        yield from itertools.repeat(None, file.metadata.num_rows)
        return
    for batch in file.iter_batches(columns=[f"{field.name}.path"]):
        yield from pc.struct_field(batch.column(0), "path").cast(pa.string()).to_pylist()


def _entry(text: str, place: Location, root: Location, where: str) -> Entry:
    """The image that a line of the list at ``place`` names."""
    row = split_row(text)
    base = row[0] if row else text
    tail = text[len(base) :]
    try:
        if not base:
            raise ConfigError("a URI must not be empty")
        if _ABSOLUTE.match(base):
            scheme, path = split_uri(base)
        else:
            scheme = place.scheme
            path = posixpath.normpath(f"{place.path.rpartition('/')[0]}/{base}")
        # Only to be written down: no store is asked about the millions of lines of a list.
        uri = place_uri(Location(None, path, scheme)) + tail
        uri.encode()
    except (ConfigError, UnicodeEncodeError) as fault:
        raise DataError(f"{place}, {where}: {one_line(fault)}") from fault
    relative = _below(path, root) if scheme == root.scheme else None
    return Entry(uri if relative is None else relative + tail, uri)


def _below(path: str, root: Location) -> str | None:
    """``path`` relative to the root, None where it lies elsewhere."""
    prefix = root.path.rstrip("/") + "/"
    return path.removeprefix(prefix) if path.startswith(prefix) else None
