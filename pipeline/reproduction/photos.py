"""The annotated photos of a localization row: which they are, and what is on them.

A set is a folder with ``images/`` or ``JPEGImages/`` and with ``instances.json`` or
``Annotations/``; ``ImageSets/Main/trainval.txt`` and ``test.txt`` (VOC's) divide it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.data.ground_truth import GroundTruth
from pipeline.errors import DataError
from pipeline.evaluation.one_box import annotated_images
from pipeline.reproduction.cells import Split
from pipeline.storage import Location

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
