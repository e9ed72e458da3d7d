"""What becomes of an image that cannot be read, so that one bad file does not end a run.

In training the next readable image of its class takes its place (``read_or_replace``); in
evaluation it is left out (``read_or_skip``), since counting another one twice would be a wrong
accuracy. Another rule is another function of the type ``Read``.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.labelled_images import LabelledImages
from pipeline.errors import DataError


class Fault(NamedTuple):
    """An image that could not be read: what it is called, and a sentence that says so and why."""

    name: str
    complaint: str


class Reading(NamedTuple):
    """An image (None: left out) and the files that could not be read on the way to it."""

    image: Image.Image | None
    faults: tuple[Fault, ...] = ()


Read = Callable[[LabelledImages, int], Reading]


def read_or_replace(images: LabelledImages, index: int) -> Reading:
    """The image, or the next readable one of its class in the order of indices, wrapping around.

    Raises:
        DataError: no image of the class can be read.
    """
    first = _read(images, index)
    if not isinstance(first, Fault):
        return Reading(first)
    label = int(images.labels[index])
    members = np.flatnonzero(images.labels == label)
    faults = [first]
    for other in np.roll(members, -1 - int(np.searchsorted(members, index)))[:-1]:
        found = _read(images, int(other))
        if not isinstance(found, Fault):
            return Reading(found, tuple(faults))
        faults.append(found)
    complaint = f"({first.complaint}); mend the files"
    if len(members) == len(images):
        # Of one class, as all unlabelled images are: users know of none.
        raise DataError(
            f"at least one image must be readable, none of {len(members)} is {complaint}"
        )
    raise DataError(
        f"at least one image of class {label} must be readable, none of its {len(members)} is "
        f"{complaint} or remove the class"
    )


def read_or_skip(images: LabelledImages, index: int) -> Reading:
    """The image, or nothing in its place."""
    found = _read(images, index)
    return Reading(None, (found,)) if isinstance(found, Fault) else Reading(found)


def _read(images: LabelledImages, index: int) -> Image.Image | Fault:
    try:
        return images.image(index)
    except DataError as fault:
        return Fault(images.name(index), str(fault))
