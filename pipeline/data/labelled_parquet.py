"""Parquet tables of encoded images and labels: one file, or a folder of them, on a disk or a store.

Columns: the first of ``sources.IMAGE_COLUMNS`` that is there, binary or Hugging Face's struct
``{bytes, path}``, and the first of ``LABEL_COLUMNS``, integers or strings. Names of integer classes
come from Hugging Face's note in the file, if there is one. Splits are told by file name
(``train-00000-of-00003.parquet``, ``test.parquet``) or by a folder (``val/0.parquet``); without
either, all rows are training images.

Labels are read at the start and images when they are asked for, a whole row group at a time. The
groups last read are kept, up to ``CACHE_BYTES`` in each process, so a set of that size is read
once; a larger one wants small row groups (100 images, as Hugging Face writes them), because
training asks for images in random order.

To accept another column: the two tuples. To keep more in memory: ``CACHE_BYTES``.

Shape letters:  N images   G row groups
"""

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.labelled_images import ROLES, Parts, Role, decode_rgb
from pipeline.data.sources import IMAGE_COLUMNS
from pipeline.errors import DataError, one_line
from pipeline.storage import Location

LABEL_COLUMNS: Final = ("label", "labels", "fine_label", "class", "target")
CACHE_BYTES: Final = 256 << 20

_SPLIT_NAME = re.compile(r"(train|test|val|valid|validation)(?![a-z])", re.IGNORECASE)


class ParquetImages:
    """Images in the rows of Parquet files, called ``file#row``; pickled without what it keeps."""

    def __init__(
        self, root: Location, paths: Sequence[str], column: str, targets: NDArray[np.int64]
    ) -> None:
        self.targets = targets
        self._places = [_place(root, path) for path in paths]
        self._names = [path or root.name for path in paths]
        self._column = column
        self._footers = []
        for place in self._places:
            with _opened(place) as file:
                self._footers.append(file.metadata)
        groups = [
            (table, group, footer.row_group(group).num_rows)
            for table, footer in enumerate(self._footers)
            for group in range(footer.num_row_groups)
        ]
        self._group_G2 = np.array([group[:2] for group in groups], np.int64).reshape(-1, 2)
        self._end_G = np.cumsum([group[2] for group in groups], dtype=np.int64)
        self._first_row = np.cumsum([0] + [footer.num_rows for footer in self._footers])
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        group = int(np.searchsorted(self._end_G, index, side="right"))
        start = int(self._end_G[group - 1]) if group else 0
        cell = self._cells(group)[index - start].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        table, row = self._find(index)
        return decode_rgb(data or b"", f"{self._places[table]}#{row}")

    def name(self, index: int) -> str:
        table, row = self._find(index)
        return f"{self._names[table]}#{row}"

    def _find(self, index: int) -> tuple[int, int]:
        """The table and the row in it."""
        table = int(np.searchsorted(self._first_row, index, side="right")) - 1
        return table, index - int(self._first_row[table])

    def _cells(self, group: int) -> pa.ChunkedArray:
        """The image column of one row group."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        table, inner = map(int, self._group_G2[group])
        # Opened anew, because forked loaders would share one file's position; without threads,
        # because a fork does not inherit them.
        with _opened(self._places[table], self._footers[table]) as file:
            found = file.read_row_group(inner, columns=[self._column], use_threads=False)
        cells = found.column(self._column)
        self._kept[group] = cells
        while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > CACHE_BYTES:
            self._kept.popitem(last=False)
        return cells


def read_parquet(uri: str) -> Parts:
    """The labelled images of the table or tables that ``uri`` names.

    Raises:
        ConfigError: ``uri`` is no path or URI we read.
        DataError: there is no table, a column is missing or of another type, or a label is null,
            negative, or unknown to the training rows.
        StorageError: the store cannot be reached.
    """
    root = Location.parse(uri)
    by_role = _tables(root)
    values = {role: _labels(root, paths) for role, paths in by_role.items()}
    with _opened(_place(root, by_role["train"][0])) as file:
        schema = file.schema_arrow
    image_column = _image_column(schema, root)
    classes, known = _classes(schema, values["train"], root)
    images = {
        role: ParquetImages(
            root, paths, image_column, _targets(values[role], known, f"{root} ({role})")
        )
        for role, paths in by_role.items()
    }
    return Parts(classes, images["train"], images.get("validation"), images.get("test"))


def _tables(root: Location) -> dict[Role, list[str]]:
    """Paths below ``root`` by split; ``""`` is ``root`` itself."""
    if root.kind() == "file":
        return {"train": [""]}
    prefix = root.path.rstrip("/") + "/"
    paths = [place.path.removeprefix(prefix) for place in root.files(recursive=True)]
    paths = [path for path in paths if path.lower().endswith(".parquet") and "/." not in f"/{path}"]
    if not paths:
        raise DataError(f"{root} must be a .parquet file or a folder of them, got none")
    found: dict[Role, list[str]] = {}
    for path in paths:
        role = _role(path)
        if role:
            found.setdefault(role, []).append(path)
    if not found:
        return {"train": paths}
    stray = [path for path in paths if _role(path) is None]
    if stray or "train" not in found:
        raise DataError(
            f"{root}: every table must be named train, val or test, and one train, got "
            f"{(stray or paths)[0]}: rename or remove it"
        )
    return found


def _place(root: Location, path: str) -> Location:
    return root.child(path) if path else root


def _role(path: str) -> Role | None:
    *folders, name = path.split("/")
    named = _SPLIT_NAME.match(name)
    if named:
        return ROLES[named[1].lower()]
    return next((ROLES[part.lower()] for part in folders if part.lower() in ROLES), None)


@contextmanager
def _opened(place: Location, footer: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """The file while the block runs; what goes wrong in it becomes a DataError that names it."""
    try:
        with place.open() as stream:
            yield pq.ParquetFile(stream, metadata=footer, pre_buffer=False)
    except (OSError, pa.ArrowException) as fault:
        raise DataError(f"cannot read {place} as Parquet: {one_line(fault)}") from fault


def _image_column(schema: pa.Schema, root: Location) -> str:
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name
    raise DataError(
        f"{root} must have encoded images (binary, or a struct with bytes) in a column "
        f"{' or '.join(IMAGE_COLUMNS)}, got {_shown(schema)}"
    )


def _label_column(schema: pa.Schema, root: Location) -> str:
    for name in LABEL_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if (
                pa.types.is_integer(kind)
                or pa.types.is_string(kind)
                or pa.types.is_large_string(kind)
            ):
                return name
    raise DataError(
        f"{root} must have integer or string labels in a column {' or '.join(LABEL_COLUMNS)}, got "
        f"{_shown(schema)}"
    )


def _shown(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)[:300]


def _labels(root: Location, paths: Sequence[str]) -> NDArray[Any]:
    """``(N,)`` int64 or str, as they are in the tables."""
    found = []
    for path in paths:
        place = _place(root, path)
        with _opened(place) as file:
            name = _label_column(file.schema_arrow, place)
            column = file.read(columns=[name], use_threads=False).column(name)
        if column.null_count:
            raise DataError(f"{place}: labels must not be null, got {column.null_count} nulls")
        is_number = pa.types.is_integer(column.type)
        found.append(column.cast(pa.int64() if is_number else pa.string()).to_numpy())
    if len({part.dtype for part in found}) > 1:
        raise DataError(
            f"{root}: all tables must have labels of one type, got integers and strings"
        )
    return np.concatenate(found)


def _classes(
    schema: pa.Schema, values: NDArray[Any], root: Location
) -> tuple[tuple[str, ...], NDArray[Any]]:
    """Class names, and the ``(K,)`` values, ascending, that stand for them."""
    known = np.unique(values)
    if known.dtype == object:
        return tuple(known.tolist()), known
    if known.size and known[0] < 0:
        raise DataError(
            f"{root}: labels must be at least 0, got {known[0]} (often it means unlabelled): "
            "remove these rows"
        )
    names = _published_names(schema, _label_column(schema, root))
    if names is None:
        return tuple(str(value) for value in known.tolist()), known
    return names, np.arange(len(names))


def _published_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """The names of Hugging Face's ClassLabel, which it notes in the file's metadata."""
    try:
        note = json.loads((schema.metadata or {})[b"huggingface"])
        names = note["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names)


def _targets(values: NDArray[Any], known: NDArray[Any], where: str) -> NDArray[np.int64]:
    """``(N,)`` positions of ``values`` in ``known``."""
    found = np.searchsorted(known, values).clip(max=max(len(known) - 1, 0))
    is_strange = known[found] != values
    if is_strange.any():
        strange = values[is_strange]
        raise DataError(
            f"{where}: labels must be among the {len(known)} classes of the training rows, got "
            f"'{strange[0]}' and {len(np.unique(strange)) - 1} others"
        )
    targets: NDArray[np.int64] = found.astype(np.int64)
    return targets
