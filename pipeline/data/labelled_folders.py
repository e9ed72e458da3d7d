"""A folder per class, and perhaps one per split above them, on a disk or in a tar archive.

| layout | becomes |
|---|---|
| ``root/train/<class>/...`` and one of ``val``, ``valid``, ``validation``; ``test/`` | as named |
| ``root/<class>/...`` | training images only |
| a ``.tar``, ``.tar.gz`` or ``.tgz`` of either | the same, also below one folder of its own |

Classes are the train folders in the order of their names as strings, like torchvision's
ImageFolder ("1", "10", "2"), and splits are matched by name, never by position. Images may lie
deeper than their class folder. Links are followed, a loop of links is walked once; hidden files and
files that are no images by their extension (in any case) are left out and counted. Listing asks the
disk for names only: no file is opened.

An archive is read into memory, and nothing is unpacked to a disk: meant for many small files
(60,000 images of 32 pixels take 55 MB); a large one is better unpacked.

To take another extension for an image: ``image_headers.FORMATS``. Another split's name: ``ROLES``.
Another kind of archive: a generator like `archive_members`, and its ending in ``ENDINGS``.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import image_headers
from pipeline.data.labelled_images import ROLES, EncodedImages, FileImages, Parts, Role, printable
from pipeline.errors import DataError, one_line

FolderListing = dict[Role, dict[str, list[str]]]
"""The images of each class of each split, sorted, as paths relative to the root."""

_NUM_SHOWN: Final = 3


def read_folder(
    root: str,
    *,
    roles: Sequence[Role] = ("train", "validation", "test"),
    wanted: Sequence[str] | None = None,
) -> Parts:
    """The labelled images below ``root``.

    Args:
        root: An absolute path.
        roles: The splits to read; others are passed by.
        wanted: Only these classes; None takes every folder.

    Raises:
        DataError: the layout is none of the above, a class is empty, absent or unknown to train,
            or a folder cannot be listed.
    """
    skipped: Counter[str] = Counter()
    listing: FolderListing = {}
    for role, folder in _split_folders(root, roles).items():
        below = os.path.join(root, folder)
        names = class_folders(below, skipped) if wanted is None else _present(below, wanted)
        listing[role] = {name: _images_below(root, folder, name, skipped) for name in names}
    classes = check_listing(listing, printable(root))
    images: dict[Role, FileImages] = {}
    for role, by_class in listing.items():
        paths, targets = flatten(by_class, classes)
        images[role] = FileImages(root, paths, targets)
    return Parts(
        tuple(printable(name) for name in classes),
        images["train"],
        images.get("validation"),
        images.get("test"),
        describe_skipped(skipped),
    )


def class_folders(folder: str, skipped: Counter[str]) -> list[str]:
    """The names of the folders in ``folder``, sorted; whatever else lies there is counted.

    Raises:
        DataError: there are none, or the folder cannot be listed.
    """
    folders, files = [], 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    skipped["(hidden)"] += 1
                elif entry.is_dir():
                    folders.append(entry.name)
                else:
                    files += 1
                    skipped[suffix_of(entry.name)] += 1
    except OSError as fault:
        raise DataError(
            f"cannot list {printable(folder)}: {one_line(fault)}; give a folder of class folders"
        ) from fault
    if not folders:
        raise DataError(
            f"{printable(folder)} must hold one folder for each class, got none ({files} files): "
            "move every image into a folder named after its class"
        )
    return sorted(folders)


def check_listing(listing: FolderListing, where: str) -> tuple[str, ...]:
    """The classes of a listing that has images for each of them.

    Raises:
        DataError: a class is empty, or a later split has one that train lacks.
    """
    classes = tuple(sorted(listing["train"]))
    for role, by_class in listing.items():
        empty = [name for name, paths in by_class.items() if not paths]
        if empty:
            raise DataError(
                f"{where}: every class folder must hold images, got none in {_first(empty)} of the "
                f"{role} split: fill or remove these folders"
            )
        unknown = sorted(set(by_class) - set(classes))
        if unknown:
            raise DataError(
                f"{where}: the {role} split must have the classes of the train split, got "
                f"{_first(unknown)} besides: rename or remove these folders"
            )
    return classes


def flatten(
    by_class: Mapping[str, Sequence[str]], classes: Sequence[str]
) -> tuple[list[str], NDArray[np.int64]]:
    """All paths, class after class, and their ``(N,)`` targets."""
    present = [(target, name) for target, name in enumerate(classes) if name in by_class]
    paths = [path for _, name in present for path in by_class[name]]
    targets = np.array([target for target, _ in present], np.int64)
    return paths, np.repeat(targets, [len(by_class[name]) for _, name in present])


def image_extensions() -> frozenset[str]:
    """Lower-case extensions, with the dot, of the formats we decode."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in image_headers.FORMATS)


def suffix_of(name: str) -> str:
    """A file's extension in lower case with the dot, or ``(none)``."""
    return os.path.splitext(name)[1].lower() or "(none)"


def describe_skipped(skipped: Counter[str]) -> tuple[str, ...]:
    """A note about files that were left out, if there were any."""
    kinds = [f"{count} {printable(kind)}" for kind, count in skipped.most_common(8)]
    return (f"files left out: {', '.join(kinds)}",) if kinds else ()


def _split_folders(root: str, roles: Sequence[Role]) -> dict[Role, str]:
    """Which folder of ``root`` holds which split; ``""`` for train where there are no splits."""
    found: dict[Role, str] = {}
    for name in class_folders(root, Counter()):
        role = ROLES.get(name.lower())
        if role is None or role not in roles:
            continue
        if role in found:
            raise DataError(
                f"{printable(root)} must have one folder for the {role} split, got {found[role]} "
                f"and {name}: remove one"
            )
        found[role] = name
    if found and "train" not in found:
        raise DataError(
            f"{printable(root)} must hold a folder train, got only {', '.join(found.values())}"
        )
    # Train comes first: the others are checked against it.
    return {role: found[role] for role in roles if role in found} or {"train": ""}


def _present(folder: str, wanted: Sequence[str]) -> list[str]:
    """``wanted``, all of which are in ``folder``."""
    missing = [name for name in wanted if not os.path.isdir(os.path.join(folder, name))]
    if missing:
        raise DataError(
            f"{printable(folder)} must hold a folder for each of {len(wanted)} classes, got "
            f"{len(wanted) - len(missing)}; missing: {_first(missing)}"
        )
    return sorted(wanted)


def _images_below(root: str, split: str, name: str, skipped: Counter[str]) -> list[str]:
    """The images of one class, at any depth, sorted."""
    endings = tuple(image_extensions())
    found: list[str] = []
    folders, links = [f"{split}/{name}" if split else name], list[str]()
    walked: set[tuple[int, int]] = set()
    # Links last and in order: what is reached twice keeps its real name.
    while folders or links:
        folder = folders.pop() if folders else links.pop(links.index(min(links)))
        where = os.path.join(root, folder)
        try:
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in walked:
                continue
            walked.add((status.st_dev, status.st_ino))
            for entry in os.scandir(where):
                path = f"{folder}/{entry.name}"
                # is_dir and is_file know the answer from the listing, except for a link.
                if entry.name.startswith("."):
                    skipped["(hidden)"] += 1
                elif entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif entry.name.lower().endswith(endings) and entry.is_file():
                    found.append(path)
                else:
                    kind = "(broken link)" if entry.is_symlink() else suffix_of(entry.name)
                    skipped[kind] += 1
        except OSError as fault:
            raise DataError(f"cannot list {printable(where)}: {one_line(fault)}") from fault
    return sorted(found)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(printable(name) for name in names[:_NUM_SHOWN]) + more


ENDINGS: Final = (".tar", ".tar.gz", ".tgz")
MAX_BYTES: Final = 4 << 30


def is_archive(path: str) -> bool:
    """Whether ``path`` names an archive that `read_archive` reads."""
    return path.lower().endswith(ENDINGS)


def read_archive(path: str, *, max_bytes: int = MAX_BYTES) -> Parts:
    """The labelled images in a tar archive, as `labelled_folders.read_folder` gives them unpacked.

    Raises:
        DataError: the archive cannot be read, is larger than ``max_bytes`` of images, or is not
            laid out in class folders.
    """
    skipped: Counter[str] = Counter()
    files = dict(archive_members(path, skipped, max_bytes))
    listing = _arrange(sorted(files), skipped)
    if not listing.get("train"):
        raise DataError(
            f"{path} must hold train/<class>/<image> or <class>/<image>, got {len(files)} images "
            "laid out otherwise"
        )
    classes = check_listing(listing, path)
    images: dict[Role, EncodedImages] = {}
    for role, by_class in listing.items():
        names, targets = flatten(by_class, classes)
        images[role] = EncodedImages(path, names, (files[name] for name in names), targets)
    notes = (*describe_skipped(skipped), f"read into memory from {path.rsplit('/', 1)[-1]}")
    return Parts(classes, images["train"], images.get("validation"), images.get("test"), notes)


def archive_members(
    path: str, skipped: Counter[str], max_bytes: int = MAX_BYTES
) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every image in the archive; what is none is counted in ``skipped``.

    Raises:
        DataError: the archive cannot be read, or is larger than ``max_bytes`` of images.
    """
    extensions, total = image_extensions(), 0
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if any(part.startswith(".") for part in name.split("/")):
                    skipped["(hidden)"] += not member.isdir()
                elif not member.isfile() or suffix_of(name) not in extensions:
                    skipped[suffix_of(name)] += not member.isdir()
                else:
                    total += member.size
                    if total > max_bytes:
                        raise DataError(
                            f"{path} must hold at most {max_bytes:,} bytes of images to be read "
                            "into memory: unpack it and give the folder"
                        )
                    stream = archive.extractfile(member)
                    yield name, stream.read() if stream else b""
    except (OSError, EOFError, tarfile.TarError) as fault:
        raise DataError(f"cannot read {path} as a tar archive: {one_line(fault)}") from fault


def _arrange(names: list[str], skipped: Counter[str]) -> FolderListing:
    """Sorted names by split and class."""
    parts = [name.split("/") for name in names]
    # One folder around everything, as most archives have it.
    around = {part[0] for part in parts}
    depth = 1 if len(around) == 1 and not around & set(ROLES) else 0
    heads = {part[depth].lower() for part in parts if len(part) > depth + 1}
    is_split = "train" in heads
    listing: FolderListing = {}
    for name, part in zip(names, parts, strict=True):
        role = ROLES.get(part[depth].lower()) if is_split and len(part) > depth else "train"
        below = depth + is_split
        if role is None or len(part) < below + 2:
            skipped["(outside the class folders)"] += 1
            continue
        listing.setdefault(role, {}).setdefault(part[below], []).append(name)
    # A Counter keeps entries at zero, which would show in the note.
    for kind in [kind for kind, count in skipped.items() if not count]:
        del skipped[kind]
    return {role: listing[role] for role in ("train", "validation", "test") if role in listing}
