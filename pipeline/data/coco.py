"""COCO's instances JSON -> ground truth.

Crowd regions are kept apart: their box spans many objects. Boxes keep their fractions of a pixel
(LOST's evaluation rounds them to integers first). The field ``difficult``, which conversions from
Pascal VOC carry, is honoured where it is there.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import Boxes, area, xywh_to_xyxy
from pipeline.data.ground_truth import GroundTruth, known_side, read_json
from pipeline.errors import DataError
from pipeline.storage import Location, one_line


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
