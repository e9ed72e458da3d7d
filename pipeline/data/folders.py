"""Which files of a folder or a glob are images, and a count of everything that is not.

The walk is sorted, so that the same tree always gives the same list, and holds the names of one
folder at a time. Links are followed where they lead to something inside the root that the walk
would not list anyway; an image that several paths lead to is listed once, under its real name if
that fits.

To let the walk leave out more (or less): ``EXCLUDED_FORMATS`` and ``_HIDDEN``.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from PIL import Image
from pyarrow import fs

from pipeline.data.sources import place_uri
from pipeline.errors import StorageError, one_line
from pipeline.storage import Location, file_uri

EXCLUDED_FORMATS = frozenset(
    {
        # Documents that Pillow hands to another program, writes only, or draws on Windows only.
        *("EPS", "PDF", "WMF", "PALM"),
        # A film, and scientific containers that Pillow recognises and cannot read.
        *("MPEG", "BUFR", "GRIB", "HDF5"),
    }
)
NUM_EXAMPLES = 20
EVERYTHING = ("**",)
"""The pattern of a whole folder."""

_HIDDEN = "."
_MAX_SUFFIXES = 100


@dataclass
class Examples:
    """How many there are, and the first few by name."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < NUM_EXAMPLES:
            self.first.append(text)


@dataclass
class Tally:
    """What a listing met on its way; filled while it runs."""

    num_images: int = 0
    num_duplicates: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    unreadable: Examples = field(default_factory=Examples)
    refused: Examples = field(default_factory=Examples)

    def ignore(self, name: str) -> None:
        """Count a file that is no image under its extension."""
        suffix = os.path.splitext(name)[1].lower() or "(none)"
        # Numbered or random endings must not make the count as long as the collection.
        crowded = suffix not in self.ignored and len(self.ignored) >= _MAX_SUFFIXES
        ugly = len(suffix) > 16 or not suffix.isprintable()
        self.ignored["(other)" if crowded or ugly else suffix] += 1


@dataclass
class _Folder:
    """The names in one folder, sorted, by what they are."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


def readable_extensions() -> frozenset[str]:
    """Every extension of a format that Pillow decodes by itself, in lower case, with the dot."""
    Image.init()
    found = {
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind not in EXCLUDED_FORMATS
    }
    return frozenset(found)


def fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a relative path's parts match a glob's; ``**`` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        tails = range(len(parts) + 1)
        return pattern == EVERYTHING or any(fits(parts[cut:], pattern[1:]) for cut in tails)
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and fits(parts[1:], pattern[1:])


def may_hold(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether something below the folder ``parts`` may match ``pattern``."""
    if not parts or not pattern or pattern[0] == "**":
        return bool(pattern)
    return fnmatchcase(parts[0], pattern[0]) and may_hold(parts[1:], pattern[1:])


class FolderWalk:
    """The images below ``root`` whose path matches ``pattern``, as paths relative to the root."""

    def __init__(self, root: Location, pattern: tuple[str, ...], tally: Tally) -> None:
        self.root = root
        self.pattern = pattern
        self.tally = tally
        self.tables: list[str] = []
        """Parquet files met on the way; the caller decides what they are."""
        self._extensions = readable_extensions()
        self._real_root = os.path.realpath(root.path) if root.is_local else root.path
        # 16-byte digests of what was reached through links: the only memory that grows.
        self._reached: set[bytes] = set()

    def images(self) -> Iterator[str]:
        """Relative paths in a fixed order.

        Raises:
            StorageError: a store cannot be listed. (An unreadable local folder is counted.)
        """
        # Arrow shows no folder of a Google bucket that has no marker object: they are never walked.
        yield from self._flat() if self.root.scheme == "gs" else self._by_folders()

    def _flat(self) -> Iterator[str]:
        """The images by one listing of everything, which has to fit into memory."""
        selector = fs.FileSelector(self.root.path, recursive=True)
        try:
            found = self.root.filesystem.get_file_info(selector)
        except OSError as fault:
            raise StorageError(f"cannot list {self.root}: {one_line(fault)}") from fault
        prefix = self.root.path + "/"
        names = [info.path.removeprefix(prefix) for info in found if info.type == fs.FileType.File]
        for relative in sorted(names):
            if _is_hidden(relative):
                self.tally.ignored["(hidden)"] += 1
            elif self._is_wanted(relative, None):
                yield relative

    def _by_folders(self) -> Iterator[str]:
        # Each folder by the name it is listed under, and its real one if a link led there.
        waiting: list[tuple[str, str | None]] = [("", None)]
        while waiting:
            folder, real = waiting.pop()
            found = self._scan(folder)
            for name in sorted(found.files):
                if self._is_wanted(_join(folder, name), real and _join(real, name)):
                    yield _join(folder, name)
            below = [(_join(folder, n), real and _join(real, n)) for n in found.folders]
            for name in sorted(found.links):
                target = self._resolve(_join(folder, name))
                if target is None:
                    continue
                if os.path.isdir(os.path.join(self._real_root, target)):
                    below.append((_join(folder, name), target))
                elif self._is_wanted(_join(folder, name), target):
                    yield _join(folder, name)
            waiting += [entry for entry in sorted(below, reverse=True) if self._enters(*entry)]

    def _scan(self, folder: str) -> _Folder:
        place = self.root.child(folder) if folder else self.root
        found = _Folder()
        try:
            if place.is_local:
                self._scan_local(place.path, found)
            else:
                self._scan_store(place, found)
        except OSError as fault:
            if not place.is_local:
                raise StorageError(f"cannot list {place}: {one_line(fault)}") from fault
            self.tally.unreadable.add(f"{place_uri(place)} ({fault.strerror})")
            return _Folder()
        return found

    def _scan_local(self, path: str, found: _Folder) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(_HIDDEN):
                    self.tally.ignored["(hidden)"] += 1
                elif entry.is_symlink():
                    found.links.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    found.folders.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    found.files.append(entry.name)
                else:
                    # A pipe, a socket or a device: reading it might never end.
                    self.tally.ignored["(special)"] += 1

    def _scan_store(self, place: Location, found: _Folder) -> None:
        for info in place.filesystem.get_file_info(fs.FileSelector(place.path)):
            if info.path.rstrip("/") == place.path:
                # A key such as a//b.jpg: Arrow shows the folder inside itself, for ever.
                self.tally.unreadable.add(f"{place}// (keys with an empty name between slashes)")
            elif info.base_name.startswith(_HIDDEN):
                self.tally.ignored["(hidden)"] += 1
            elif info.type == fs.FileType.Directory:
                found.folders.append(info.base_name)
            else:
                found.files.append(info.base_name)

    def _is_wanted(self, relative: str, real: str | None) -> bool:
        """Whether to list a file; ``real`` is where the link that led to it (if any) ended."""
        if not fits(relative.split("/"), self.pattern):
            return False
        if not self._is_image(relative):
            if real is None and relative.lower().endswith(".parquet"):
                self.tables.append(relative)
            self.tally.ignore(relative)
            return False
        if real is not None and (self._is_listed(real) or not self._is_first(real)):
            self.tally.num_duplicates += 1
            return False
        return True

    def _is_image(self, relative: str) -> bool:
        return os.path.splitext(relative)[1].lower() in self._extensions

    def _is_listed(self, real: str) -> bool:
        """Whether the walk lists this real file anyway, under its own name."""
        return not _is_hidden(real) and self._is_image(real) and fits(real.split("/"), self.pattern)

    def _is_first(self, real: str) -> bool:
        digest = hashlib.sha256(os.fsencode(real)).digest()[:16]
        is_first = digest not in self._reached
        self._reached.add(digest)
        return is_first

    def _enters(self, relative: str, real: str | None) -> bool:
        """Whether to walk a folder: each real one once, however many links lead to it."""
        if not may_hold(relative.split("/"), self.pattern):
            return False
        if real is None:
            return True
        # A whole folder's own walk comes by there anyway.
        if self.pattern == EVERYTHING and not _is_hidden(real):
            return False
        return self._is_first(real + "/")

    def _resolve(self, relative: str) -> str | None:
        """Where a link leads, relative to the root; None (and a note) if out of it or nowhere."""
        path = os.path.join(self.root.path, relative)
        try:
            real = os.path.realpath(path, strict=True)
        except OSError as fault:
            self.tally.refused.add(f"{_shown(path)} (dangling: {fault.strerror})")
            return None
        if real != self._real_root and not real.startswith(self._real_root.rstrip("/") + "/"):
            self.tally.refused.add(f"{_shown(path)} -> {_shown(real)} (out of the collection)")
            return None
        return os.path.relpath(real, self._real_root)


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(_HIDDEN) for part in relative.split("/") if part != ".")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder not in ("", ".") else name


def _shown(path: str) -> str:
    return path if path.isprintable() else file_uri(path)
