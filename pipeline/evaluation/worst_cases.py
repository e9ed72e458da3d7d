"""Where boxes fail: the images with most missed objects, and the false boxes with highest scores.

To show another kind of failure: a function from matches to images beside ``most_missed``, and its
line in ``worst_cases_png``.

Shape letters:  N images   D boxes of all images
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.boxes import as_boxes, rescale
from pipeline.data.pixels import load_pixels, pixels_of_row
from pipeline.drawing.images import (
    THUMBNAIL,
    Colour,
    Finding,
    Picture,
    Pixels,
    base_name,
    contact_sheet,
    draw_box,
    encoded,
)
from pipeline.evaluation.all_boxes import DetectionEvaluation
from pipeline.evaluation.average_precision import Matches
from pipeline.evaluation.report import RULES

MISSED, TRUE, FALSE = (255, 159, 28), (64, 224, 128), (255, 82, 82)
"""Colours of objects that no box found, of boxes that found one, and of false boxes."""

_COLUMNS = 4
# More boxes on a thumbnail hide the picture.
_MOST_BOXES = 8
_DECODING = {"min_side": 1, "max_side": 512, "max_pixels": 100_000_000}


def worst_cases_png(evaluation: DetectionEvaluation, *, each: int = 12) -> bytes | None:
    """A sheet in PNG: at most ``each`` images with most misses, then ``each`` with false boxes.

    The images are read where the labels say they are; what is not there is left out.

    Returns:
        None where there is no failure, or no image of one can be read.
    """
    matches = evaluation.precision.matches
    missed = [
        (index, f"{len(matches.missed_N[index])} of {matches.num_objects_N[index]} missed")
        for index in most_missed(matches, each)
    ]
    false = [(index, f"false at {score:.3g}") for index, score in surest_false_boxes(matches, each)]
    chosen = missed + false
    pixels = _pixels([evaluation.names[index] for index, _ in chosen])
    entries = [
        (_draw(matches, index, *shown), f"{text}  {base_name(evaluation.names[index] or '')}")
        for (index, text), shown in zip(chosen, pixels, strict=True)
        if shown is not None
    ]
    if not entries:
        return None
    thumbnails, captions = zip(*entries, strict=True)
    title = f"orange: missed   green: found   red: false   ({RULES[evaluation.options.difficult]})"
    return encoded(contact_sheet(thumbnails, captions, columns=_COLUMNS, title=title))


def most_missed(matches: Matches, number: int) -> list[int]:
    """At most ``number`` images, those with most missed objects first; none without a miss."""
    missed_N = matches.num_objects_N - matches.num_found_N
    order = np.argsort(-missed_N, kind="stable")[:number]
    return [int(index) for index in order if missed_N[index]]


def surest_false_boxes(matches: Matches, number: int) -> list[tuple[int, float]]:
    """At most ``number`` images with their best scored false box, the highest score first."""
    false_D = np.flatnonzero(~matches.true_D)
    false_D = false_D[np.argsort(-matches.score_D[false_D], kind="stable")]
    best: dict[int, float] = {}
    for index in false_D:
        best.setdefault(int(matches.image_D[index]), float(matches.score_D[index]))
        if len(best) == number:
            break
    return list(best.items())


def _pixels(names: Sequence[str | None]) -> list[tuple[Pixels, float] | None]:
    """Of each image, the pixels and how much they were scaled; None where it cannot be read."""
    shown: list[tuple[Pixels, float] | None] = []
    for name in names:
        if name is None:
            shown.append(None)
            continue
        inputs = pa.table({"image_id": [name], "uri": [name]})
        decoded = load_pixels(inputs, background=(255, 255, 255), **_DECODING)
        pixels = pixels_of_row(decoded, 0)
        width = decoded["width"][0].as_py()
        shown.append(None if pixels is None else (pixels, pixels.shape[1] / width))
    return shown


def _draw(matches: Matches, index: int, pixels: Pixels, scale: float) -> Picture:
    """The image with its missed objects, its true boxes, and its best false ones on top."""
    own_D = np.flatnonzero(matches.image_D == index)
    false_D = own_D[~matches.true_D[own_D]][:_MOST_BOXES]
    layers: list[tuple[Colour, Finding]] = [
        (MISSED, Finding(rescale(matches.missed_N[index], scale, scale))),
        (TRUE, _scored(matches, own_D[matches.true_D[own_D]], scale)),
        (FALSE, _scored(matches, false_D, scale)),
    ]
    height, width = pixels.shape[:2]
    fit = min(THUMBNAIL[0] / width, THUMBNAIL[1] / height)
    colour, finding = layers[0]
    picture = draw_box(pixels, finding, colour=colour, fit=THUMBNAIL)
    for colour, finding in layers[1:]:
        # Drawn onto what is already of the thumbnail's size.
        small = Finding(rescale(finding.boxes_N4, fit, fit), scores=finding.scores)
        picture = draw_box(np.asarray(picture), small, colour=colour, fit=picture.size)
    return picture


def _scored(matches: Matches, boxes_D: NDArray[np.intp], scale: float) -> Finding:
    boxes_D4 = as_boxes(matches.boxes_D4[boxes_D])
    return Finding(rescale(boxes_D4, scale, scale), scores=matches.score_D[boxes_D].tolist())
