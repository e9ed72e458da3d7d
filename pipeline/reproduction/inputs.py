"""Which data and weights are at hand, and where: told by flags, or found below --data-root.

A set of annotated photos is a folder with ``images/`` or ``JPEGImages/`` and with
``instances.json`` or ``Annotations/``; ``ImageSets/Main/trainval.txt`` and ``test.txt`` (VOC's)
divide it. To add a data set: a field of ``DataPlaces`` in config/reproduction.py, and the names its
files go by in ``DATA``.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipeline.data.ground_truth import GroundTruth, annotated_images
from pipeline.errors import ConfigError, DataError
from pipeline.reproduction.backbones import BACKBONES
from pipeline.reproduction.cells import Split
from pipeline.storage import Location

DATA: dict[str, tuple[str, ...]] = {
    "cifar10": ("cifar10", "cifar-10-batches-py", "cifar10_images.tar.gz", "cifar10.tar.gz"),
    "cifar100": ("cifar100", "cifar-100-python", "cifar100.tar.gz"),
    "svhn": ("svhn", "train_32x32.mat"),
    "flowers102": ("flowers102", "flowers-102"),
    "flowers17": ("flowers17",),
    "domainnet": ("domainnet",),
    "imagenet": ("imagenet",),
    "imagenet100": ("imagenet100", "imagenet"),
    "voc07": ("voc07", "VOCdevkit/VOC2007", "VOC2007", "voc07_test_500"),
    "voc12": ("voc12", "VOCdevkit/VOC2012", "VOC2012"),
    "coco20k": ("coco20k",),
    "kangaroo": ("kangaroo",),
    "scenes": ("scenes",),
}
"""By which names each data set lies below --data-root."""

# The publisher's own files, which torchvision wants the parent folder of.
_PARENT_IS_THE_ROOT = ("cifar-10-batches-py", "cifar-100-python", "train_32x32.mat", "flowers-102")

NETWORKS = ("swin", "cvt", "t2t", "resnet50")
"""Classifiers that --weights may give a start to."""

_DEPTH = 3


@dataclass(frozen=True)
class AtHand:
    """What there is, and how it was told.

    Attributes:
        data: place of each data set that was given by a flag.
        weights: file of each network that was given by one.
        root: folder in which the rest is looked for; None looks nowhere.
        fetch: whether networks may fetch published weights by name.
    """

    data: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    root: str | None = None
    fetch: bool = False

    def place_of(self, name: str) -> str | None:
        """Where a data set lies, absolute; None where it is not at hand.

        Raises:
            DataError: a flag names a place that is not there.
        """
        # The six domains are one flag; each lies below it as train_classifier expects.
        name = "domainnet" if name.startswith("domainnet-") else name
        told = self.data.get(name)
        if told is not None:
            if not os.path.exists(told):
                raise DataError(f"--data.{name}: there is no {told}")
            return os.path.abspath(told)
        if self.root is None:
            return None
        for candidate in DATA[name]:
            found = os.path.join(os.path.abspath(self.root), candidate)
            if os.path.exists(found):
                return os.path.dirname(found) if candidate in _PARENT_IS_THE_ROOT else found
        return None

    def weights_of(self, name: str) -> str | None:
        """The file of a network's weights, absolute; None where there is none at hand."""
        told = self.weights.get(name)
        if told is not None:
            return os.path.abspath(told)
        backbone = BACKBONES.get(name)
        if backbone is None or self.root is None:
            return None
        return next(
            (str(path) for path in _files_below(self.root) if path.name in backbone.files), None
        )


def weights_flag(texts: tuple[str, ...]) -> dict[str, str]:
    """``("vit-s16=FILE", ...)`` as a mapping.

    Raises:
        ConfigError: it is not NAME=FILE, or the name is unknown.
        DataError: there is no such file.
    """
    known = [*BACKBONES, *NETWORKS]
    files: dict[str, str] = {}
    for text in texts:
        name, _, file = text.partition("=")
        if not file or name not in known:
            raise ConfigError(
                f"--weights must be NAME=FILE with a name of {', '.join(known)}, got {text}"
            )
        if not os.path.exists(file):
            raise DataError(f"--weights {name}: there is no {file}")
        files[name] = file
    return files


def _files_below(root: str) -> Iterator[Path]:
    """Files not deeper than where weights lie; a data set of a million images is not walked."""
    top = Path(root).absolute()
    for folder, names, files in os.walk(top):
        if len(Path(folder).relative_to(top).parts) + 1 >= _DEPTH:
            names.clear()
        # Data sets hold no weights, and a great many files.
        names[:] = [one for one in names if one not in _data_folders()]
        yield from (Path(folder) / one for one in sorted(files))


def _data_folders() -> set[str]:
    return {name.partition("/")[0] for names in DATA.values() for name in names}


_IMAGES = ("images", "JPEGImages")
_TRUTHS = ("instances.json", "Annotations")
_TRAINED_SHARE = 0.7

PAPER_COUNTS = {"voc07": 5011, "voc12": 11_540, "coco20k": 19_817}
"""Images of the papers' sets (trainval); fewer are another experiment."""


@dataclass(frozen=True, eq=False)
class Photos:
    """Photos with an object, by their URIs in order, and their objects."""

    uris: tuple[str, ...]
    truths: tuple[GroundTruth, ...]

    @property
    def key(self) -> str:
        """Tells two sets of photos apart."""
        return hashlib.sha256("\n".join(self.uris).encode()).hexdigest()[:8]

    def list_in(self, folder: Location) -> Location:
        """Where a list of them lies, as label_images takes it: its name says what it holds."""
        return folder.child(f"{len(self.uris)}-{self.key}.txt")

    def write_list(self, folder: Location) -> None:
        """Write the list, where it is not there yet."""
        place = self.list_in(folder)
        if place.kind() == "missing":
            place.write_bytes("".join(f"{uri}\n" for uri in self.uris).encode())


def read_photos(place: str, split: Split | None, num_images: int | None) -> Photos:
    """The photos of one split of the set at ``place``.

    Args:
        place: folder of the set.
        split: None takes VOC's trainval where the set is divided by lists, else all. Where it is
            not divided, trainval is the first 70 % by name and test the rest.
        num_images: at most so many, the first ones.

    Raises:
        DataError: images or annotations are missing, or none of them match.
    """
    top = Path(place)
    images = _first(top, _IMAGES)
    rows, truths = annotated_images(images, _first(top, _TRUTHS), num_images=None)
    both = [
        (str(uri), truth)
        for uri, truth in zip(rows["uri"].to_pylist(), truths, strict=True)
        if len(truth.boxes_N4)
    ]
    listed = top / "ImageSets" / "Main" / f"{split or 'trainval'}.txt"
    if listed.exists():
        stems = {line.split()[0] for line in listed.read_text().splitlines() if line.strip()}
        both = [one for one in both if PurePosixPath(one[0]).stem in stems]
    elif split is not None:
        cut = round(_TRAINED_SHARE * len(both))
        both = both[:cut] if split == "trainval" else both[cut:]
    both = both[:num_images]
    if not both:
        raise DataError(f"{place} holds no annotated photo of {split or 'trainval'}")
    return Photos(tuple(uri for uri, _ in both), tuple(truth for _, truth in both))


def _first(top: Path, names: tuple[str, ...]) -> str:
    for name in names:
        if (top / name).exists():
            return str(top / name)
    raise DataError(f"{top} must hold {' or '.join(names)}, got neither")
