"""What an annotation file says of one image; voc.py and coco.py both read into this.

To read another format: write a module beside those two whose function returns
``list[GroundTruth]``, and add its case to ``read_ground_truth`` in pipeline/evaluation/evaluate.py.

Shape letters:  N objects of one image
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import Boxes
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
    """

    file_name: str
    boxes_N4: Boxes
    difficult_N: NDArray[np.bool_]
    width: int | None
    height: int | None
    aliases: tuple[str, ...] = ()

    def without_difficult(self) -> "GroundTruth":
        """The same image with only the objects that are not marked difficult."""
        easy_N = ~self.difficult_N
        return GroundTruth(
            self.file_name,
            self.boxes_N4[easy_N],
            self.difficult_N[easy_N],
            self.width,
            self.height,
            self.aliases,
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
