"""The data set a classifier is trained on, by its name: training, validation and test images.

| name | root holds |
|---|---|
| ``imagenet``, ``imagenet100`` | ``train/<wnid>/`` and ``val/<wnid>/``; the 100 are picked out |
| ``cifar10``, ``cifar100``, ``svhn``, ``flowers102`` | torchvision's files; can be downloaded |
| ``domainnet-clipart`` ... ``-sketch`` | the unpacked domain and its two official lists |
| ``folder`` | any layout of `labelled_folders`, or a tar archive of one |
| ``parquet`` | a table or tables, see `labelled_parquet`; the only one that may be a URI |

Every named set may also be a folder or archive of class folders. Its counts must be those of the
DRLoc paper's Table 1 (Liu et al., NeurIPS 2021): a number means nothing if it was not measured on
the set whose name it carries.

Where a set has a validation split but no test split, the former IS the test set, as in ImageNet and
in all folders of the paper. Validation images are then carved from the training images; so they are
where there is neither. Where there are both, both are used as they are.

To add a set: a reader of `Parts`, a line in ``SIZES`` and a case in ``_read``.
"""

import difflib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from torchvision import datasets

from pipeline.data import domainnet, imagenet100, torchvision_sets
from pipeline.data.label_splits import SplitRule, carve
from pipeline.data.labelled_archives import is_archive, read_archive
from pipeline.data.labelled_folders import read_folder
from pipeline.data.labelled_images import LabelledImages, Parts, Selection
from pipeline.data.labelled_parquet import read_parquet
from pipeline.errors import ConfigError, DataError
from pipeline.storage import split_uri

SIZES: Final = {
    "imagenet": (1_281_167, 50_000, 1000),
    "imagenet100": (126_689, 5_000, 100),
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "svhn": (73_257, 26_032, 10),
    "flowers102": (2_040, 6_149, 102),
    "domainnet-clipart": (33_525, 14_604, 345),
    "domainnet-infograph": (36_023, 15_582, 345),
    "domainnet-painting": (50_416, 21_850, 345),
    "domainnet-quickdraw": (120_750, 51_750, 345),
    "domainnet-real": (120_906, 52_041, 345),
    "domainnet-sketch": (48_212, 20_916, 345),
}
"""Training images, test images and classes: Table 1. (For ImageNet it says 100,000 test images; the
published code evaluates on the 50,000 of the validation split, and so do we.)"""

NAMES: Final = (*SIZES, "folder", "parquet")
DOWNLOADABLE: Final = ("cifar10", "cifar100", "svhn", "flowers102")

_SMALL: Final = ("cifar10", "cifar100", "svhn")
_PHOTO_SIDE: Final = 224
_SIDE_STEP: Final = 32
_NUM_MEASURED: Final = 9


@dataclass(frozen=True)
class Fingerprint:
    """What tells two data sets apart: two runs compare only if these agree."""

    num_train: int
    num_validation: int
    num_test: int
    classes_sha256: str
    """Of the class names in their order."""

    images_sha256: str
    """Of the names and labels of all images, split by split; not of their pixels."""


@dataclass(frozen=True)
class ClassificationData:
    """A data set ready to be trained on; it pickles."""

    name: str
    train: LabelledImages
    validation: LabelledImages
    """The images the best epoch is chosen by; the test images where ``selected_on`` is "test"."""

    test: LabelledImages | None
    classes: tuple[str, ...]
    """Names by label."""

    native_size: int
    """The side, in pixels, that suits the images: 32 or 224 for a set of the paper, else the median
    shorter side of a few images, to the next multiple of 32, at most 224."""

    mirror_safe: bool
    """Whether a mirrored image keeps its class; False for digits."""

    selected_on: Literal["validation", "test"]
    fingerprint: Fingerprint
    notes: tuple[str, ...]
    """What a user should know of the reading, such as files that were left out."""

    def describe(self) -> dict[str, Any]:
        """What to write down about the data of a run, as JSON values."""
        return {
            "name": self.name,
            "num_classes": len(self.classes),
            "native_size": self.native_size,
            "mirror_safe": self.mirror_safe,
            "selected_on": self.selected_on,
            "notes": list(self.notes),
            **asdict(self.fingerprint),
        }


def load_classification(
    name: str, root: str, *, download: bool = False, rule: SplitRule | None = None
) -> ClassificationData:
    """The data set ``name`` in ``root``, divided by ``rule`` (by default a tenth for validation).

    No image is decoded, but for a few of a ``folder`` or ``parquet`` to learn their size.

    Raises:
        ConfigError: the name is unknown, the set cannot be downloaded, a URI is given for a set
            that must lie on a disk, or there would be no validation images.
        DataError: the data is absent, damaged, laid out otherwise, not of the paper's size, has one
            class only, or too few images of a class.
    """
    rule = rule or SplitRule()
    _check_name(name, download=download)
    parts = _read(name, root, download=download)
    if parts.test is None:
        parts = replace(parts, validation=None, test=parts.validation)
    _check_parts(name, root, parts)
    return _divide(name, root, parts, rule)


def check_sizes(name: str, root: str, parts: Parts) -> None:
    """Raise DataError unless ``parts`` has the counts of the paper's Table 1."""
    num_test = 0 if parts.test is None else len(parts.test)
    found = len(parts.train), num_test, len(parts.classes)
    if found != SIZES[name]:
        expected, got = (
            "{:,} training images, {:,} test images, {:,} classes".format(*counts)
            for counts in (SIZES[name], found)
        )
        raise DataError(
            f"{name} must have {expected} (Table 1 of the DRLoc paper), got {got} in {root}: "
            "complete it, or call it by the name 'folder' if it is another set"
        )


def _check_name(name: str, *, download: bool) -> None:
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f": did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"data.name must be one of {', '.join(NAMES)}, got '{name}'{hint}")
    if download and name not in DOWNLOADABLE:
        raise ConfigError(
            f"data.download must be false for '{name}' (only {', '.join(DOWNLOADABLE)} can be "
            "downloaded), got true: get the data from its publisher"
        )


def _read(name: str, root: str, *, download: bool) -> Parts:
    if name == "parquet":
        return read_parquet(root)
    scheme, path = split_uri(root)
    if scheme:
        raise ConfigError(
            f"data.root must be on a disk of this machine for '{name}', got {root}: copy it, or "
            "write it as Parquet and use 'parquet'"
        )
    if is_archive(path):
        return read_archive(path)
    if name == "imagenet":
        return read_folder(path, roles=("train", "validation"))
    if name == "imagenet100":
        return read_folder(path, roles=("train", "validation"), wanted=imagenet100.WNIDS)
    if name == "folder" or os.path.isdir(os.path.join(path, "train")):
        return read_folder(path)
    if name.startswith("domainnet-"):
        return domainnet.read_domain(path, name.removeprefix("domainnet-"))
    return _read_with_torchvision(name, path, download=download)


def _read_with_torchvision(name: str, path: str, *, download: bool) -> Parts:
    if name == "svhn":
        return torchvision_sets.read_svhn(path, download=download)
    if name == "flowers102":
        return torchvision_sets.read_flowers(path, download=download)
    source = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    return torchvision_sets.read_cifar(path, download=download, source=source)


def _check_parts(name: str, root: str, parts: Parts) -> None:
    if name in SIZES:
        check_sizes(name, root, parts)
    if len(parts.classes) < 2:
        raise DataError(
            f"{root} must have at least 2 classes, got {len(parts.classes)} "
            f"({', '.join(parts.classes)}): is it one level too deep?"
        )
    if not len(parts.train):
        raise DataError(f"{root} must have training images, got none")


def _divide(name: str, root: str, parts: Parts, rule: SplitRule) -> ClassificationData:
    validation, test = parts.validation, parts.test
    if rule.select_on_test:
        if test is None:
            raise DataError(
                f"select_on_test must be false for {root}, which has no test split, got true: add "
                "a folder (or table) named test"
            )
        validation = test
    taken, held = carve(
        parts.train.labels, parts.classes, rule, has_validation=validation is not None
    )
    train = Selection(parts.train, taken)
    notes = parts.notes
    if validation is None:
        validation = Selection(parts.train, held)
        notes += _not_validated(parts.classes, train, validation)
    looks_like_digits = name != "parquet" and set(parts.classes) == set(torchvision_sets.DIGITS)
    return ClassificationData(
        name=name,
        train=train,
        validation=validation,
        test=test,
        classes=parts.classes,
        native_size=_native_size(name, parts.train),
        mirror_safe=name != "svhn" and not looks_like_digits,
        selected_on="test" if rule.select_on_test else "validation",
        fingerprint=_fingerprint(parts.classes, (train, validation, test)),
        notes=notes,
    )


def _not_validated(
    classes: Sequence[str], train: LabelledImages, validation: LabelledImages
) -> tuple[str, ...]:
    """A note on the classes that can be learnt and not judged."""
    lone = sorted(set(train.labels.tolist()) - set(validation.labels.tolist()))
    if not lone:
        return ()
    count = f"{len(lone)} of {len(classes)} classes"
    return (f"{count} have a single image, which is trained on: {classes[lone[0]]}, ...",)


def _native_size(name: str, images: LabelledImages) -> int:
    if name in SIZES:
        return 32 if name in _SMALL else _PHOTO_SIDE
    # A table reads whole row groups, so its images are neighbours; a folder's are of many classes.
    stride = 1 if name == "parquet" else max(1, len(images) // _NUM_MEASURED)
    sides = []
    for index in range(0, min(len(images), stride * _NUM_MEASURED), stride):
        try:
            sides.append(min(images.image(index).size))
        except DataError:
            # It will be named when it is trained on; here any other image serves.
            continue
    median = float(np.median(sides)) if sides else _PHOTO_SIDE
    return min(_PHOTO_SIDE, max(1, round(median / _SIDE_STEP)) * _SIDE_STEP)


def _fingerprint(
    classes: Sequence[str], splits: tuple[LabelledImages, LabelledImages, LabelledImages | None]
) -> Fingerprint:
    digest = hashlib.sha256()
    for images in splits:
        labels = [] if images is None else images.labels.tolist()
        digest.update(f"{len(labels)}\n".encode())
        for index, label in enumerate(labels):
            digest.update(f"{label}\t{images.name(index) if images else ''}\n".encode())
    classes_sha256 = hashlib.sha256("\n".join(classes).encode()).hexdigest()
    train, validation, test = (0 if images is None else len(images) for images in splits)
    return Fingerprint(train, validation, test, classes_sha256, digest.hexdigest())
