"""Annotated images and boxes by hand, in as few words as a test needs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pipeline.boxes import as_boxes
from pipeline.data.ground_truth import GroundTruth
from pipeline.evaluation.predictions import Detections, detections

Box = Sequence[float]


def truth(
    boxes: Sequence[Box],
    difficult: Sequence[bool] = (),
    *,
    name: str = "1.jpg",
    classes: Sequence[str] = (),
    **fields: Any,
) -> GroundTruth:
    """One image; no object is difficult unless told."""
    flags = np.array(difficult or [False] * len(boxes), dtype=bool)
    return GroundTruth(name, as_boxes(boxes), flags, 100, 100, classes_N=tuple(classes), **fields)


def found(boxes: Sequence[Box] = (), scores: Sequence[float] = (), **more: Any) -> Detections:
    """One image's boxes; without scores these are 1."""
    return detections(boxes, scores, **more)


# On a coarse grid, where boxes meet often and IoUs of exactly one half occur.
_EDGE = st.integers(0, 5)
BOX = (
    st.tuples(_EDGE, _EDGE, st.integers(1, 4), st.integers(1, 4))
    .map(lambda b: [4 * b[0], 4 * b[1], 4 * (b[0] + b[2]), 4 * (b[1] + b[3])])
)  # fmt: skip
SCORE = st.sampled_from([0.1, 0.2, 0.5, 0.9])
OBJECTS = st.lists(st.tuples(BOX, st.booleans()), max_size=4)
SCORED = st.lists(st.tuples(BOX, SCORE), max_size=5)
IMAGES = st.lists(st.tuples(OBJECTS, SCORED), min_size=1, max_size=5)


def images_of(drawn: Sequence[Any]) -> tuple[list[GroundTruth], list[Detections]]:
    """What ``IMAGES`` draws, as both sides of an evaluation."""
    truths = [
        truth([b for b, _ in objects], [d for _, d in objects], name=f"{number}.jpg")
        for number, (objects, _) in enumerate(drawn)
    ]
    return truths, [found([b for b, _ in boxes], [s for _, s in boxes]) for _, boxes in drawn]


def iou(one: Box, other: Box) -> float:
    """Written to be obviously right."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return width * height / (sum(areas) - width * height)
