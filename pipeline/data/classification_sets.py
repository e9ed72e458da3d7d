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

- ImageNet-100 is the random subset of Tian et al., "Contrastive Multiview Coding" (ECCV 2020),
  which the DRLoc paper trains on; its list is published as ``imagenet100.txt`` with that paper's
  code. Other papers draw other hundreds under the same name.
- DomainNet (Peng et al., "Moment Matching for Multi-Source Domain Adaptation", ICCV 2019) is read
  by its official lists, in the cleaned version, whose counts are those of Table 1. Expected in one
  folder: the unpacked ``clipart/`` (and so on) and the lists ``clipart_train.txt`` and
  ``clipart_test.txt``, a path and a class number on each line. The numbers are the lists' own, so
  that predictions compare with anybody's; their order is alphabetical but for letter case and
  hyphens, not that of a sorted folder.
- CIFAR, SVHN and Flowers102 are fetched by torchvision, which compares every file with its
  published MD5 before anything is read from it (the CIFAR files are pickles), so damaged or foreign
  files end here. Its class is an argument of the reader: a subclass with other checksums reads
  other files of the same format.

Where a set has a validation split but no test split, the former IS the test set, as in ImageNet and
in all folders of the paper. Validation images are then carved from the training images; so they are
where there is neither. Where there are both, both are used as they are.

To add a set: a reader of `Parts`, a line in ``SIZES`` and a case in ``_read``.

Shape letters:  N images   H rows   W columns   3 red, green, blue
"""

import difflib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import scipy.io
from torchvision import datasets

from pipeline.config.classification import DataName, SplitConfig
from pipeline.data.labelled_folders import is_archive, read_archive, read_folder
from pipeline.data.labelled_images import (
    ArrayImages,
    FileImages,
    LabelledImages,
    Parts,
    Selection,
    printable,
)
from pipeline.data.labelled_parquet import read_parquet
from pipeline.data.splits import carve
from pipeline.errors import ConfigError, DataError, one_line
from pipeline.storage import split_uri

_IDS: Final = """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455
n01980166 n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867
n02089973 n02090622 n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550
n02107142 n02108089 n02109047 n02113799 n02113978 n02114855 n02116738 n02119022 n02123045
n02138441 n02172182 n02231487 n02259212 n02326432 n02396427 n02483362 n02488291 n02701002
n02788148 n02804414 n02859443 n02869837 n02877765 n02974003 n03017168 n03032252 n03062245
n03085013 n03259280 n03379051 n03424325 n03492542 n03494278 n03530642 n03584829 n03594734
n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032 n03794056 n03837869
n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531 n04127249
n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406
n13040303
"""

WNIDS: Final = tuple(_IDS.split())
"""WordNet ids in string order, which is the order of the labels."""


DIGITS: Final = tuple("0123456789")


def read_cifar(root: str, *, download: bool = False, source: Any = datasets.CIFAR10) -> Parts:
    """CIFAR from ``root/cifar-10-batches-py``, or with ``source=CIFAR100`` from its folder.

    Raises:
        DataError: the files are absent, damaged, or cannot be downloaded.
    """
    train = _open(lambda: source(root, train=True, download=download), root)
    test = _open(lambda: source(root, train=False), root)
    return Parts(
        tuple(train.classes),
        ArrayImages(train.data, np.array(train.targets, np.int64), "train"),
        test=ArrayImages(test.data, np.array(test.targets, np.int64), "test"),
    )


def read_svhn(root: str, *, download: bool = False, source: Any = datasets.SVHN) -> Parts:
    """SVHN's cropped digits from ``root/train_32x32.mat`` and ``test_32x32.mat``, without "extra".

    Raises:
        DataError: the files are absent, damaged, or cannot be downloaded.
    """

    def images(split: str) -> ArrayImages:
        opened = _open(lambda: source(root, split=split, download=download), root)
        pixels_NHW3 = opened.data.transpose(0, 2, 3, 1)
        return ArrayImages(pixels_NHW3, opened.labels.astype(np.int64), split)

    return Parts(DIGITS, images("train"), test=images("test"))


def read_flowers(root: str, *, download: bool = False, source: Any = datasets.Flowers102) -> Parts:
    """Flowers102 from ``root/flowers-102``; trained on are its lists ``trnid`` and ``valid``.

    Both together are the paper's 2,040 training images (Table 1). The publisher's validation set is
    not kept apart.

    Raises:
        DataError: the files are absent, damaged, or cannot be downloaded.
    """
    _open(lambda: source(root, download=download), root)
    folder = os.path.join(root, "flowers-102")
    lists = scipy.io.loadmat(os.path.join(folder, "setid.mat"), squeeze_me=True)
    target_of = scipy.io.loadmat(os.path.join(folder, "imagelabels.mat"), squeeze_me=True)["labels"]

    def images(*names: str) -> FileImages:
        # Numbers and labels count from 1.
        numbers = np.concatenate([lists[name] for name in names])
        paths = [f"jpg/image_{number:05d}.jpg" for number in numbers]
        return FileImages(folder, paths, target_of[numbers - 1].astype(np.int64) - 1)

    return Parts(tuple(source.classes), images("trnid", "valid"), test=images("tstid"))


def _open(make: Callable[[], Any], root: str) -> Any:
    """What ``make`` returns; torchvision's complaints become one line with the remedy."""
    try:
        return make()
    # RuntimeError is torchvision's word for absent or damaged, OSError is the network or the disk.
    except (RuntimeError, OSError) as fault:
        raise DataError(
            f"cannot read the data set in {printable(root)} ({one_line(fault)}): set "
            "data.download to have torchvision fetch it, or unpack the publisher's files there"
        ) from fault


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
    targets = np.array([target for _, target in entries], np.int64)
    return FileImages(root, (path for path, _ in entries), targets)


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

NAMES: Final[tuple[str, ...]] = get_args(DataName)
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
    """Of the names and targets of all images, split by split; not of their pixels."""


@dataclass(frozen=True)
class ClassificationData:
    """A data set ready to be trained on; it pickles."""

    name: str
    train: LabelledImages
    validation: LabelledImages
    """The images the best epoch is chosen by; the test images where ``selected_on`` is "test"."""

    test: LabelledImages | None
    classes: tuple[str, ...]
    """Names by target."""

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
    name: str, root: str, *, split: SplitConfig, seed: int = 0, download: bool = False
) -> ClassificationData:
    """The data set ``name`` in ``root``, divided as ``split`` says, by chance of ``seed``.

    No image is decoded, but for a few of a ``folder`` or ``parquet`` to learn their size.

    Raises:
        ConfigError: the name is unknown, the set cannot be downloaded, a URI is given for a set
            that must lie on a disk, or there would be no validation images.
        DataError: the data is absent, damaged, laid out otherwise, not of the paper's size, has one
            class only, or too few images of a class.
    """
    _check_name(name, download=download)
    parts = _read(name, root, download=download)
    if parts.test is None:
        parts = replace(parts, validation=None, test=parts.validation)
    _check_parts(name, root, parts)
    return _divide(name, root, parts, split, seed)


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
        return read_folder(path, roles=("train", "validation"), wanted=WNIDS)
    if name == "folder" or os.path.isdir(os.path.join(path, "train")):
        return read_folder(path)
    if name.startswith("domainnet-"):
        return read_domain(path, name.removeprefix("domainnet-"))
    return _read_with_torchvision(name, path, download=download)


def _read_with_torchvision(name: str, path: str, *, download: bool) -> Parts:
    if name == "svhn":
        return read_svhn(path, download=download)
    if name == "flowers102":
        return read_flowers(path, download=download)
    source = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    return read_cifar(path, download=download, source=source)


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


def _divide(
    name: str, root: str, parts: Parts, split: SplitConfig, seed: int
) -> ClassificationData:
    validation, test = parts.validation, parts.test
    if split.select_on_test:
        if test is None:
            raise DataError(
                f"select_on_test must be false for {root}, which has no test split, got true: add "
                "a folder (or table) named test"
            )
        validation = test
    taken, held = carve(
        parts.train.targets, parts.classes, split, seed=seed, has_validation=validation is not None
    )
    train = Selection(parts.train, taken)
    notes = parts.notes
    if validation is None:
        validation = Selection(parts.train, held)
        notes += _not_validated(parts.classes, train, validation)
    looks_like_digits = name != "parquet" and set(parts.classes) == set(DIGITS)
    return ClassificationData(
        name=name,
        train=train,
        validation=validation,
        test=test,
        classes=parts.classes,
        native_size=_native_size(name, parts.train),
        mirror_safe=name != "svhn" and not looks_like_digits,
        selected_on="test" if split.select_on_test else "validation",
        fingerprint=_fingerprint(parts.classes, (train, validation, test)),
        notes=notes,
    )


def _not_validated(
    classes: Sequence[str], train: LabelledImages, validation: LabelledImages
) -> tuple[str, ...]:
    """A note on the classes that can be learnt and not judged."""
    lone = sorted(set(train.targets.tolist()) - set(validation.targets.tolist()))
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
        targets = [] if images is None else images.targets.tolist()
        digest.update(f"{len(targets)}\n".encode())
        for index, target in enumerate(targets):
            digest.update(f"{target}\t{images.name(index) if images else ''}\n".encode())
    classes_sha256 = hashlib.sha256("\n".join(classes).encode()).hexdigest()
    train, validation, test = (0 if images is None else len(images) for images in splits)
    return Fingerprint(train, validation, test, classes_sha256, digest.hexdigest())
