"""Clusters -> a picture of some crops of each: what a cluster has in common is for people to see.

Shape letters:  N boxes   D channels   K clusters
"""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.clustering.table_boxes import TableBoxes
from pipeline.drawing.images import Finding, Picture, Size, contact_sheet, draw_box

COLUMNS = 8
MOST_CLUSTERS = 100
"""On one sheet: more rows nobody looks at."""

_CELL: Size = (200, 150)
_NOTHING = (238, 240, 242)


def sample_numbers(
    vectors_ND: NDArray[np.float32], labels_N: NDArray[np.int64], *, number: int
) -> dict[int, list[int]]:
    """Of each cluster that has boxes, at most ``number`` of them, from its middle to its edge.

    They are spread evenly over its boxes in the order of their distance to its mean: the nearest
    alone would flatter it.
    """
    order_N = np.argsort(labels_N, kind="stable")
    found_K, starts_K = np.unique(labels_N[order_N], return_index=True)
    samples: dict[int, list[int]] = {}
    for label, members in zip(found_K, np.split(order_N, starts_K[1:]), strict=True):
        own_ND = vectors_ND[members].astype(np.float64)
        distance = ((own_ND - own_ND.mean(0)) ** 2).sum(1)
        members = members[np.argsort(distance, kind="stable")]
        count = min(number, len(members))
        samples[int(label)] = [
            int(members[place * len(members) // count]) for place in range(count)
        ]
    return samples


def cluster_sheet(
    boxes: TableBoxes, vectors_ND: NDArray[np.float32], labels_N: NDArray[np.int64], title: str
) -> bytes:
    """A sheet in PNG: a row of crops per cluster, from its middle to its edge.

    Args:
        boxes: The numbered boxes.
        vectors_ND: Of each box.
        labels_N: Of each box, as they are in the table.
        title: What the labels were made of.
    """
    samples = sample_numbers(vectors_ND, labels_N, number=COLUMNS)
    shown = dict(list(samples.items())[:MOST_CLUSTERS])
    found = boxes.find({number for numbers in shown.values() for number in numbers})
    sizes = np.bincount(labels_N)
    pictures: list[Picture] = []
    captions: list[str] = []
    for label, numbers in shown.items():
        for place in range(COLUMNS):
            one = found.get(numbers[place]) if place < len(numbers) else None
            pictures.append(_cell(None if one is None else one.crop))
            name = "" if one is None else one.uri.replace("\\", "/").rsplit("/", 1)[-1]
            captions.append(f"cluster {label}: {sizes[label]:,}" if place == 0 else name)
    if len(shown) < len(samples):
        title = f"{title}, the first {len(shown)}"
    sink = BytesIO()
    contact_sheet(pictures, captions, columns=COLUMNS, title=title).save(sink, "PNG")
    return sink.getvalue()


def _cell(crop_HW3: NDArray[np.uint8] | None) -> Picture:
    if crop_HW3 is None:
        return Image.new("RGB", _CELL, _NOTHING)
    return draw_box(crop_HW3, Finding([]), colour=_NOTHING, fit=_CELL)
