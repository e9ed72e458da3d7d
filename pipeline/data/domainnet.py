"""DomainNet by its official lists: six domains of 345 classes, nothing moved or copied.

Peng et al., "Moment Matching for Multi-Source Domain Adaptation", ICCV 2019. The cleaned version is
meant, whose counts are those of the DRLoc paper's Table 1. Expected in one folder: the unpacked
``clipart/`` (and so on) and the lists ``clipart_train.txt`` and ``clipart_test.txt``, a path and a
label on each line. Labels are the lists' own, so that predictions compare with anybody's; their
order is alphabetical but for letter case and hyphens, not that of a sorted folder.

Another domain is a name in ``DOMAINS``.
"""

import os
from pathlib import Path
from typing import Final

import numpy as np

from pipeline.data.labelled_images import FileImages, Parts, printable
from pipeline.errors import DataError
from pipeline.storage import one_line

DOMAINS: Final = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
PUBLISHED: Final = "csr.bu.edu/ftp/visda/2019/multi-source"

_Entries = list[tuple[str, int]]


def read_domain(root: str, domain: str) -> Parts:
    """The train and test images of one domain.

    A class may lack training images ("t-shirt" does in some versions of painting's list).

    Raises:
        DataError: a list is missing or no such list, the two disagree, or images are missing.
    """
    train = _read_list(root, f"{domain}_train.txt")
    test = _read_list(root, f"{domain}_test.txt")
    classes = _class_names(root, domain, train + test)
    _check_present(root, domain, train + test)
    return Parts(classes, _images(root, train), test=_images(root, test))


def _read_list(root: str, name: str) -> _Entries:
    path = os.path.join(root, name)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(
            f"cannot read {printable(path)} ({one_line(fault)}): get it from "
            f"{PUBLISHED}/domainnet/txt/{name} and put it beside the image folder"
        ) from fault
    entries: _Entries = []
    for number, line in enumerate(lines, 1):
        image, _, label = line.rpartition(" ")
        if not line.strip():
            continue
        if not label.isdecimal() or image.count("/") < 2:
            raise DataError(
                f"{printable(path)}, line {number}: must be domain/class/image and a label, got "
                f"'{line[:80]}'"
            )
        entries.append((image, int(label)))
    return entries


def _class_names(root: str, domain: str, entries: _Entries) -> tuple[str, ...]:
    """Names by label, from the folders the images lie in."""
    names: dict[int, str] = {}
    for path, label in entries:
        name = path.split("/")[-2]
        if names.setdefault(label, name) != name:
            raise DataError(
                f"{printable(root)}: the lists of {domain} must agree on the classes, got label "
                f"{label} for '{names[label]}' and '{name}': get both lists again"
            )
    if sorted(names) != list(range(len(names))) or len(set(names.values())) != len(names):
        raise DataError(
            f"{printable(root)}: the lists of {domain} must number their classes from 0 without a "
            f"gap, got {len(names)} labels up to {max(names, default=-1)}: get both lists again"
        )
    return tuple(names[label] for label in range(len(names)))


def _check_present(root: str, domain: str, entries: _Entries) -> None:
    """Raise DataError if listed images are missing; folders are listed, no image is touched."""
    there: dict[str, set[str]] = {}
    missing = []
    for path, _ in entries:
        folder, name = path.rsplit("/", 1)
        if folder not in there:
            try:
                there[folder] = set(os.listdir(os.path.join(root, folder)))
            except OSError:
                there[folder] = set()
        if name not in there[folder]:
            missing.append(path)
    if missing:
        cleaned = "groundtruth/" if domain in ("clipart", "painting") else ""
        raise DataError(
            f"{printable(root)} must hold the {len(entries):,} images of the {domain} lists, "
            f"{len(missing):,} are missing, such as {missing[0]}: unpack "
            f"{PUBLISHED}/{cleaned}{domain}.zip there"
        )


def _images(root: str, entries: _Entries) -> FileImages:
    labels = np.array([label for _, label in entries], np.int64)
    return FileImages(root, (path for path, _ in entries), labels)
