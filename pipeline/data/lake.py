"""The images of a collection, however it is named: one stable id and one URI for each.

A collection is a folder, a glob, one image, a ``.txt`` or ``.parquet`` list of URIs, or Parquet
tables with image bytes (a file, or a folder of nothing else), on a disk or in a store. An image's
id is made of its path below the collection's root, so that a copy of the tree elsewhere has the
same ids and equal names in two folders stay two images. ``TableImages`` are those of a pseudo-label
table once more, under the ids they have there: a second table about the same images must not make
new ones, or their rows would not match.

To read another kind of collection: a generator of entries like those in ``uri_lists.py``, its name
in ``CollectionKind`` and a branch in ``Collection``. ``folders.py`` walks, ``sources.py`` reads the
bytes.
"""

import hashlib
import itertools
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipeline.data import uri_lists
from pipeline.data.folders import EVERYTHING, FolderWalk, Tally, readable_extensions
from pipeline.data.pseudo_labels import iterate_labels, read_manifest
from pipeline.data.sources import place_uri
from pipeline.data.uri_lists import Entry
from pipeline.errors import DataError
from pipeline.storage import Location

INPUT_SCHEMA = pa.schema(
    [pa.field("image_id", pa.string(), False), pa.field("uri", pa.string(), False)]
)

CollectionKind = Literal["folder", "glob", "file", "list", "table", "labels"]
_WILDCARD = re.compile(r"[*?\[]")


class Listing(BaseModel):
    """What was found where, and what was not taken; ``model_dump`` gives JSON values."""

    model_config = ConfigDict(frozen=True)
    root: str
    kind: CollectionKind
    num_images: int
    num_duplicates: int
    """Images that came up again: a URI repeated in a list, a second link to a file."""
    ignored_by_extension: dict[str, int]
    """Files that are no images by their extension, most frequent first."""
    num_unreadable_folders: int
    unreadable_folders: list[str]
    """The first few; so for the links."""
    num_refused_links: int
    refused_links: list[str]
    """Links out of the collection, and links to nothing."""


class Collection:
    """The images that a user's text names; ``chunks`` lists them, ``report`` says what it met.

    Raises:
        ConfigError: the text is no path or URI we read, or carries credentials.
        DataError: nothing is there, or it is of no kind we know.
    """

    def __init__(self, images: str) -> None:
        place = Location.parse(images)
        self._tally = Tally()
        self._root = place
        self._kind: CollectionKind = "folder"
        self._pattern: tuple[str, ...] = EVERYTHING
        self._entries: Callable[[], Iterator[Entry]] = self._walk
        kind = place.kind()
        if kind == "file":
            self._open_file(place)
        elif kind == "missing":
            self._open_glob(place)

    def _open_file(self, place: Location) -> None:
        self._root = Location(place.filesystem, posixpath.dirname(place.path), place.scheme)
        suffix = os.path.splitext(place.name)[1].lower()
        if suffix == ".txt":
            self._kind = "list"
            self._entries = partial(self._lists, [place.name], uri_lists.text_list)
        elif suffix == ".parquet":
            self._kind = "table"
            self._entries = partial(self._parquet, [place.name])
        elif suffix in readable_extensions():
            self._kind = "file"
            self._entries = lambda: iter([Entry(place.name, place_uri(place))])
        else:
            raise DataError(
                f"{place} must be a folder, an image, a .txt or .parquet list, or a .parquet "
                f"table, got {suffix or 'a file without extension'}"
            )

    def _open_glob(self, place: Location) -> None:
        parts = place.path.split("/")
        wild = [index for index, part in enumerate(parts) if _WILDCARD.search(part)]
        if not wild:
            raise DataError(
                f"{place} does not exist: give a folder, a glob in quotes, a .txt or .parquet "
                "list, or a .parquet table with image bytes"
            )
        self._kind = "glob"
        self._root = Location(place.filesystem, "/".join(parts[: wild[0]]) or "/", place.scheme)
        self._pattern = tuple(parts[wild[0] :])
        if self._root.kind() != "folder":
            raise DataError(f"{self._root} is no folder, so {place} matches nothing: check it")

    @property
    def report(self) -> Listing:
        """What the listing has met so far; complete once ``chunks`` is exhausted."""
        tally = self._tally
        return Listing(
            root=str(self._root),
            kind=self._kind,
            num_images=tally.num_images,
            num_duplicates=tally.num_duplicates,
            ignored_by_extension=dict(tally.ignored.most_common()),
            num_unreadable_folders=tally.unreadable.count,
            unreadable_folders=tally.unreadable.first,
            num_refused_links=tally.refused.count,
            refused_links=tally.refused.first,
        )

    def chunks(self, num_rows: int = 50_000) -> Iterator[pa.Table]:
        """Tables of ``INPUT_SCHEMA`` with at most ``num_rows`` rows; every image_id once.

        Raises:
            DataError: there is no image at all, or a list or table cannot be read.
            StorageError: a store cannot be listed.
        """
        self._tally = Tally()
        entries = self._entries()
        while batch := list(itertools.islice(entries, num_rows)):
            self._tally.num_images += len(batch)
            ids = pa.array([image_id(entry.identity) for entry in batch], pa.string())
            uris = pa.array([entry.uri for entry in batch], pa.string())
            yield pa.Table.from_arrays([ids, uris], schema=INPUT_SCHEMA)
        if self._tally.num_images == 0:
            raise DataError(self._nothing())

    def _walk(self) -> Iterator[Entry]:
        walk = FolderWalk(self._root, self._pattern, self._tally)
        found = False
        for relative in walk.images():
            found = True
            yield Entry(relative, place_uri(self._root.child(relative)))
        if walk.tables and not found:
            del self._tally.ignored[".parquet"]
            yield from self._parquet(walk.tables)

    def _parquet(self, names: Sequence[str]) -> Iterator[Entry]:
        """The images of Parquet files below the root, which are all tables or all lists."""
        if uri_lists.holds_images(self._root.child(names[0])):
            self._kind = "table"
            for name in names:
                yield from uri_lists.image_table(self._root.child(name), self._root)
        else:
            self._kind = "list"
            yield from self._lists(names, uri_lists.parquet_list)

    def _lists(
        self, names: Sequence[str], read: Callable[[Location, Location], Iterable[Entry]]
    ) -> Iterator[Entry]:
        """The entries of lists below the root without the repeated ones, which are counted."""
        # 16 bytes for each image: the only memory of a listing that grows with the collection.
        seen: set[bytes] = set()
        for name in names:
            for entry in read(self._root.child(name), self._root):
                digest = _digest(entry.identity)
                if digest in seen:
                    self._tally.num_duplicates += 1
                else:
                    seen.add(digest)
                    yield entry

    def _nothing(self) -> str:
        """Why the collection is empty, as far as it can be told."""
        report = self.report
        where = "/".join(self._pattern) if self._kind == "glob" else "all of it"
        ignored = [f"{count} {name}" for name, count in report.ignored_by_extension.items()]
        met = [f"ignored: {', '.join(ignored[:8])}"] if ignored else []
        if report.num_unreadable_folders:
            first = report.unreadable_folders[0]
            met.append(f"{report.num_unreadable_folders} unreadable folders such as {first}")
        if report.num_refused_links:
            met.append(
                f"{report.num_refused_links} refused links such as {report.refused_links[0]}"
            )
        return (
            f"no images in {report.root} ({report.kind}; searched {where}; "
            f"{'; '.join(met) or 'it is empty'}): give files that Pillow reads (.jpg, .png, .webp, "
            ".tif...), a list of URIs, or Parquet with image bytes"
        )


def image_id(identity: str) -> str:
    """32 hex digits that stand for a path below the collection's root (or for a whole URI)."""
    return _digest(identity).hex()


def _digest(identity: str) -> bytes:
    # The very bytes of a name that is not UTF-8, so that the id does not depend on the reader.
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()[:16]


class TableImages:
    """All images of a finished table, whatever became of them there.

    Raises:
        DataError: there is no finished table.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Location.parse(folder)
        self._num_images = read_manifest(self._folder).rows

    @property
    def report(self) -> Listing:
        """What there is, as of a collection."""
        return Listing(
            root=str(self._folder),
            kind="labels",
            num_images=self._num_images,
            num_duplicates=0,
            ignored_by_extension={},
            num_unreadable_folders=0,
            unreadable_folders=[],
            num_refused_links=0,
            refused_links=[],
        )

    def chunks(self) -> Iterator[pa.Table]:
        """Tables of ``INPUT_SCHEMA``, one per file of the table.

        Raises:
            DataError: the table is empty or damaged.
        """
        if not self._num_images:
            raise DataError(f"{self._folder} has no rows: label some images first")
        for table in iterate_labels(self._folder, INPUT_SCHEMA.names):
            yield table.replace_schema_metadata(None).cast(INPUT_SCHEMA)
