"""Pascal VOC XML files -> ground truth.

VOC counts pixels from 1 and includes the last one, so ``[xmin, ymin, xmax, ymax]`` becomes
``[xmin - 1, ymin - 1, xmax, ymax]``, 0-based with exclusive ends, as in LOST's evaluation.
Truncated and difficult objects are kept; the latter are marked.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from pipeline.boxes import as_boxes
from pipeline.data.ground_truth import GroundTruth, known_side
from pipeline.errors import DataError
from pipeline.storage import Location, one_line

# A bucket answers one request in tens of milliseconds, and VOC is thousands of small files.
NUM_READERS = 16


def read_voc(folder: Location) -> list[GroundTruth]:
    """One entry per XML file, by name.

    Args:
        folder: a VOC root (with ``Annotations/`` below it), that folder, or any folder of XML.

    Raises:
        DataError: there is no XML file, or one is damaged.
    """
    below = folder.child("Annotations")
    source = below if below.kind() == "folder" else folder
    # macOS leaves "._000005.xml" beside "000005.xml" when it writes to foreign disks.
    places = [
        place
        for place in source.files()
        if place.name.lower().endswith(".xml") and not place.name.startswith(".")
    ]
    if not places:
        raise DataError(
            f"{source} holds no .xml file: ground truth is a COCO .json file, or a folder of "
            "Pascal VOC .xml files (the VOC root with Annotations/ in it, or Annotations itself)"
        )
    with ThreadPoolExecutor(NUM_READERS) as readers:
        return list(readers.map(read_voc_file, places))


def read_voc_file(place: Location) -> GroundTruth:
    """One image's objects.

    Raises:
        DataError: the file cannot be read, is no VOC annotation, or a value in it is no number.
    """
    try:
        # defusedxml refuses entities that expand to gigabytes or read other files.
        root = fromstring(place.read_bytes())
    except DefusedXmlException as fault:
        raise DataError(
            f"{place} defines XML entities, which no VOC file needs: refused"
        ) from fault
    except (OSError, ParseError, ValueError, LookupError) as fault:
        raise DataError(f"{place} cannot be read as XML: {one_line(fault)}") from fault
    if root.tag != "annotation":
        raise DataError(
            f"{place} is no Pascal VOC annotation: its root must be <annotation>, got <{root.tag}>"
        )
    try:
        return _annotation(root, PurePosixPath(place.name).stem)
    except ValueError as fault:
        raise DataError(f"{place} is damaged: {fault}") from fault


def _annotation(root: Element, stem: str) -> GroundTruth:
    objects = root.findall("object")
    width, height = (_side(root, f"size/{name}") for name in ("width", "height"))
    file_name, aliases = _names(root.findtext("filename", "").strip(), stem)
    return GroundTruth(
        file_name=file_name,
        boxes_N4=as_boxes([_box(item) for item in objects]),
        difficult_N=np.array([_is_difficult(item) for item in objects], dtype=bool),
        width=width,
        height=height,
        aliases=aliases,
        image_id=_image_id(stem),
        classes_N=_classes(objects),
    )


def _image_id(stem: str) -> int | None:
    """The digits of VOC's names as one number, as its COCO conversions have it: 2008_000002."""
    digits = stem.replace("_", "")
    return int(digits) if digits.isascii() and digits.isdigit() else None


def _classes(objects: list[Element]) -> tuple[str, ...]:
    """The objects' names; none where one of them has none."""
    names = [item.findtext("name", "").strip() for item in objects]
    return tuple(names) if all(names) else ()


def _names(written: str, stem: str) -> tuple[str, tuple[str, ...]]:
    """The image's name, and what else it may be called.

    Copied and renamed XML files keep the old <filename>, so the XML's own name, by which VOC's
    image sets go too, outranks it wherever they differ in more than the extension.
    """
    base = PurePosixPath(written.replace("\\", "/")).name
    if base == stem or PurePosixPath(base).stem == stem:
        return base, (stem,)
    return stem, (base,) if base else ()


def _box(item: Element) -> list[float]:
    # Only the object's own <bndbox>: person layout has more of them inside <part>.
    x0, y0, x1, y1 = (_number(item, f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax"))
    if x1 < x0 or y1 < y0:
        raise ValueError(f"bndbox must have xmin <= xmax and ymin <= ymax, got {[x0, y0, x1, y1]}")
    return [x0 - 1, y0 - 1, x1, y1]


def _number(item: Element, path: str) -> float:
    text = item.findtext(path)
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{item.tag}/{path} must be a number, got {text!r}")
    return number


def _side(root: Element, path: str) -> int | None:
    return known_side(_number(root, path)) if root.findtext(path) else None


def _is_difficult(item: Element) -> bool:
    text = item.findtext("difficult", "0").strip().lower()
    if text not in ("", "0", "1", "false", "true"):
        raise ValueError(f"object/difficult must be 0 or 1, got {text!r}")
    return text in ("1", "true")
