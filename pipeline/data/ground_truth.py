"""What an annotation file says of one image: COCO's instances JSON, or Pascal VOC's XML files.

COCO: crowd regions are kept apart, as their box spans many objects. Boxes keep their fractions of a
pixel (LOST's evaluation rounds them to integers first). The field ``difficult``, which conversions
from Pascal VOC carry, is honoured where it is there.

VOC counts pixels from 1 and includes the last one, so ``[xmin, ymin, xmax, ymax]`` becomes
``[xmin - 1, ymin - 1, xmax, ymax]``, 0-based with exclusive ends, as in LOST's evaluation.
Truncated and difficult objects are kept; the latter are marked.

To read another format: a function that returns ``list[GroundTruth]``, and a case in
``read_ground_truth``.

Shape letters:  N objects of one image   M crowd regions of one image
"""

import json
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import numpy as np
import pyarrow as pa
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from numpy.typing import NDArray

from pipeline.boxes import Boxes, area, as_boxes, xywh_to_xyxy
from pipeline.data.lake import Collection
from pipeline.errors import DataError, one_line
from pipeline.storage import Location


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The annotated objects of one image.

    Attributes:
        file_name: the image's name, possibly with folders before it.
        boxes_N4: xyxy in pixels, 0-based, x1 and y1 exclusive. A box may be empty (COCO has some):
            nothing can overlap it.
        difficult_N: bool, True for objects marked difficult.
        width: in pixels; None where the file does not say.
        height: in pixels; None where the file does not say.
        aliases: further names the image may go by, tried only where ``file_name`` fails.
        image_id: the file's own; None where it has none.
        classes_N: names of the objects' classes; empty where the file has no classes.
        areas_N: in pixels, of the objects' masks where COCO gives them; None is the boxes' own.
        crowds_M4: regions full of objects that nobody told apart; what is found there is no error.
    """

    file_name: str
    boxes_N4: Boxes
    difficult_N: NDArray[np.bool_]
    width: int | None
    height: int | None
    aliases: tuple[str, ...] = ()
    image_id: int | str | None = None
    classes_N: tuple[str, ...] = ()
    areas_N: NDArray[np.float64] | None = None
    crowds_M4: Boxes = field(default_factory=lambda: as_boxes([]))

    def without_difficult(self) -> "GroundTruth":
        """The same image with only the objects that are not marked difficult."""
        easy_N = ~self.difficult_N
        return replace(
            self,
            boxes_N4=self.boxes_N4[easy_N],
            difficult_N=self.difficult_N[easy_N],
            classes_N=tuple(np.array(self.classes_N, dtype=object)[easy_N])
            if self.classes_N
            else (),
            areas_N=None if self.areas_N is None else self.areas_N[easy_N],
        )


def known_side(side: float) -> int | None:
    """Width or height in pixels; None for the 0 that some tools write where they do not know."""
    return int(side) if side >= 1 else None


def read_json(place: Location) -> Any:
    """What the JSON file says.

    Raises:
        DataError: the file cannot be read, or is no JSON.
    """
    try:
        return json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        raise DataError(f"{place} cannot be read as JSON: {one_line(fault)}") from fault


def read_coco(place: Location) -> list[GroundTruth]:
    """One entry per image of the file, in its order; images without objects included.

    Annotations of images that the file does not list are ignored, as a shortened list of images
    beside the full list of annotations is the usual way to make a subset.

    Raises:
        DataError: the file is no instances JSON, or an entry in it is damaged.
    """
    content = read_json(place)
    images, annotations = _sections(content, place)
    try:
        names = _class_names(content)
        by_image = _objects_by_image(images, annotations)
        return [_ground_truth(image, by_image[image["id"]], names) for image in images]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as fault:
        reason = f"an entry lacks {fault}" if isinstance(fault, KeyError) else one_line(fault)
        raise DataError(f"{place} is damaged: {reason}") from fault


def _sections(content: Any, place: Location) -> tuple[list[Any], list[Any]]:
    """The lists ``images`` and ``annotations``."""
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            found = ", ".join(list(content)[:5]) if isinstance(content, dict) else None
            raise DataError(
                f"{place} is no COCO instances file: it must have the lists 'images' and "
                f"'annotations', got {found or type(content).__name__}"
            )
    return content["images"], content["annotations"]


def _objects_by_image(
    images: Iterable[Any], annotations: Iterable[Any]
) -> dict[Any, list[dict[str, Any]]]:
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for image in images:
        if image["id"] in by_image:
            raise ValueError(f"two images have the id {image['id']!r}")
        by_image[image["id"]] = []
    for annotation in annotations:
        if annotation["image_id"] in by_image:
            by_image[annotation["image_id"]].append(annotation)
    return by_image


def _class_names(content: dict[str, Any]) -> dict[Any, str]:
    """Category ids -> names; what has none goes by its id."""
    categories = content.get("categories") or []
    return {one["id"]: str(one.get("name", one["id"])) for one in categories}


def _ground_truth(
    image: dict[str, Any], annotations: list[dict[str, Any]], names: dict[Any, str]
) -> GroundTruth:
    if not isinstance(image["file_name"], str):
        raise ValueError(
            f"image {image['id']!r} has a file_name that is no text: {image['file_name']!r}"
        )
    objects = [item for item in annotations if not item.get("iscrowd")]
    classes = [item.get("category_id") for item in objects]
    boxes_N4 = xywh_to_xyxy([_xywh(item) for item in objects])
    return GroundTruth(
        file_name=image["file_name"],
        boxes_N4=boxes_N4,
        difficult_N=np.array([bool(item.get("difficult")) for item in objects], dtype=bool),
        width=known_side(image.get("width") or 0),
        height=known_side(image.get("height") or 0),
        image_id=image["id"],
        classes_N=()
        if None in classes
        else tuple(names.get(number, str(number)) for number in classes),
        areas_N=_areas(objects, boxes_N4),
        crowds_M4=xywh_to_xyxy([_xywh(item) for item in annotations if item.get("iscrowd")]),
    )


def _areas(objects: list[dict[str, Any]], boxes_N4: Boxes) -> NDArray[np.float64]:
    """Of the masks where the file says them, else of the boxes; what counts as small goes by it."""
    told = [item.get("area") for item in objects]
    own = area(boxes_N4)
    return np.array([own[i] if one is None else float(one) for i, one in enumerate(told)])


def _xywh(item: dict[str, Any]) -> list[float]:
    bbox, who = item["bbox"], f"annotation {item.get('id')!r}"
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise ValueError(f"{who} has a bbox that is not [x, y, width, height]: {bbox!r}")
    box = [float(value) for value in bbox]
    if not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise ValueError(f"{who} has a bbox that is not finite or has a negative side: {bbox!r}")
    return box


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


def read_ground_truth(place: Location) -> list[GroundTruth]:
    """A folder is read as Pascal VOC, a file as COCO.

    Raises:
        DataError: there is nothing, or it is damaged.
    """
    if place.required("--ground-truth").kind() == "folder":
        return read_voc(place)
    return read_coco(place)


def annotated_images(
    images: str, ground_truth: str, *, num_images: int | None
) -> tuple[pa.Table, list[GroundTruth]]:
    """The annotated images in the order of their URIs, ``num_images`` at most.

    Returns:
        Their rows, as ``Collection`` gives them, and the annotations of each row.

    Raises:
        DataError: no image of the collection is annotated, or the annotations cannot be read.
    """
    read = read_ground_truth(Location.parse(ground_truth))
    truths = {PurePosixPath(one.file_name).name: one for one in read}
    inputs = pa.concat_tables(list(Collection(images).chunks()))
    named = [PurePosixPath(uri).name in truths for uri in inputs["uri"].to_pylist()]
    chosen = inputs.filter(pa.array(named, pa.bool_())).sort_by("uri").slice(0, num_images)
    if not chosen.num_rows:
        raise DataError(f"none of {inputs.num_rows} images of {images} is in {ground_truth}")
    return chosen, [truths[PurePosixPath(uri).name] for uri in chosen["uri"].to_pylist()]
