"""A tar archive of class folders, read into memory: nothing is unpacked to a disk.

The layouts are those of `labelled_folders`, also below one folder of the archive's own. Meant for
many small files (60,000 images of 32 pixels take 55 MB); a large archive is better unpacked.

To read another kind of archive: a generator like `archive_members`, and its ending in ``ENDINGS``.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Final

from pipeline.data.labelled_folders import (
    Listing,
    check_listing,
    describe_skipped,
    flatten,
    image_extensions,
    suffix_of,
)
from pipeline.data.labelled_images import ROLES, EncodedImages, Parts, Role
from pipeline.errors import DataError
from pipeline.storage import one_line

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
        names, labels = flatten(by_class, classes)
        images[role] = EncodedImages(path, names, (files[name] for name in names), labels)
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


def _arrange(names: list[str], skipped: Counter[str]) -> Listing:
    """Sorted names by split and class."""
    parts = [name.split("/") for name in names]
    # One folder around everything, as most archives have it.
    around = {part[0] for part in parts}
    depth = 1 if len(around) == 1 and not around & set(ROLES) else 0
    heads = {part[depth].lower() for part in parts if len(part) > depth + 1}
    is_split = "train" in heads
    listing: Listing = {}
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
