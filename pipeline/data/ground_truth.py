"""What an annotation file says of one image; voc.py and coco.py both read into this.

To read another format: write a module beside those two whose function returns
``list[GroundTruth]``, and add its case to ``read_ground_truth`` in pipeline/evaluation/evaluate.py.

Shape letters:  N objects of one image   M crowd regions of one image
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import Boxes, as_boxes
from pipeline.errors import DataError
from pipeline.storage import Location, one_line


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
