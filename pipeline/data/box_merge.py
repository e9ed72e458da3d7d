"""Two tables of boxes as one: what a detector found, and the first boxes that it did not find.

Self-training: a detector trained on one box per image finds more objects, with a score each. Its
confident detections become the labels of the next round, and a box of the round before stays where
no detection covers it (CutLER, Wang et al., CVPR 2023, section 3.3).

Shape letters:  N images   M boxes, image after image   P pairs of boxes   K images of one table
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.boxes import aligned_iou
from pipeline.data.box_table import BoxTable
from pipeline.data.labelled_images import PackedBytes
from pipeline.errors import DataError

# So many boxes at a time: with 100 detections an image, some 100 MB of pairs.
_CHUNK = 4096


def merge_boxes(first: BoxTable, found: BoxTable, *, iou: float = 0.5) -> BoxTable:
    """All boxes of ``found``, and those of ``first`` that overlap none of them.

    Images are the same where their ``image_id`` is. An image of one table alone keeps its boxes.
    Within an image the found boxes come first. Read ``found`` with a ``min_score``.

    Args:
        first: The labels so far.
        found: What a detector trained on them found in the same images.
        iou: From which intersection over union on a first box gives way, in (0, 1].

    Raises:
        DataError: an image is twice in a table, or has two sizes.
        ValueError: ``iou`` is not in (0, 1].
    """
    if not 0 < iou <= 1:
        raise ValueError(f"iou must be in (0, 1], got {iou}")
    ids, found_ids = _ids(first), _ids(found)
    there_N = _numbers(pc.index_in(ids, value_set=found_ids))
    _check_sizes(first, found, there_N)
    num_found_N = np.where(there_N >= 0, np.diff(found.bounds)[there_N], 0)
    owner_M = np.repeat(np.arange(len(first)), np.diff(first.bounds))
    covered_M = _covered(
        first.boxes_M4,
        found.boxes_M4,
        found.bounds[there_N][owner_M],
        num_found_N[owner_M],
        iou,
    )
    # Numbers of images in both tables together: those of `first`, then the others of `found`.
    here_N = _numbers(pc.index_in(found_ids, value_set=ids))
    new_K = np.flatnonzero(here_N < 0)
    here_N[new_K] = len(first) + np.arange(len(new_K))
    found_owner_M = np.repeat(here_N, np.diff(found.bounds))
    all_ids = pa.concat_arrays([ids, found_ids.take(pa.array(new_K))])
    order_N, place_N = _order(all_ids)
    owners_M = place_N[np.concatenate([found_owner_M, owner_M[~covered_M]])].astype(np.int64)
    by_image_M = np.argsort(owners_M, kind="stable")

    def boxes_of_both(name: str) -> NDArray[Any]:
        values_M = np.concatenate([getattr(found, name), getattr(first, name)[~covered_M]])
        return np.asarray(values_M[by_image_M])

    def images_of_both(name: str) -> NDArray[Any]:
        values_N = np.concatenate([getattr(first, name), getattr(found, name)[new_K]])
        return np.asarray(values_N[order_N])

    num_N = np.bincount(owners_M, minlength=len(order_N))
    uris = [first.uris[i] for i in range(len(first))] + [found.uris[int(i)] for i in new_K]
    return BoxTable(
        image_ids=PackedBytes(all_ids.take(pa.array(order_N)).to_pylist()),
        uris=PackedBytes(uris[i] for i in order_N.tolist()),
        width_N=images_of_both("width_N"),
        height_N=images_of_both("height_N"),
        bounds=np.concatenate([[0], np.cumsum(num_N)]).astype(np.int64),
        boxes_M4=boxes_of_both("boxes_M4"),
        labels_M=boxes_of_both("labels_M"),
        scores_M=boxes_of_both("scores_M"),
        sources=first.sources + found.sources,
        num_overlapped=first.num_overlapped + found.num_overlapped + int(covered_M.sum()),
    )


def _order(ids: pa.Array) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """``(N,)`` each: the numbers of the images by their sorted ids, and each one's place there."""
    order_N = pc.array_sort_indices(ids).to_numpy()
    place_N = np.empty_like(order_N)
    place_N[order_N] = np.arange(len(order_N))
    return order_N, place_N


def _covered(
    boxes_M4: NDArray[np.float32],
    found_M4: NDArray[np.float32],
    start_M: NDArray[np.int64],
    num_M: NDArray[np.int64],
    iou: float,
) -> NDArray[np.bool_]:
    """Which boxes overlap one of the ``num`` found ones that begin at row ``start``."""
    covered_M = np.zeros(len(boxes_M4), bool)
    for begin in range(0, len(boxes_M4), _CHUNK):
        some = slice(begin, begin + _CHUNK)
        num = num_M[some]
        left_P = np.repeat(np.arange(begin, begin + len(num)), num)
        # How many-th pair of its box each pair is.
        turn_P = np.arange(len(left_P)) - np.repeat(np.cumsum(num) - num, num)
        right_P = start_M[left_P] + turn_P
        over_P = aligned_iou(boxes_M4[left_P], found_M4[right_P]) >= iou
        covered_M[left_P[over_P]] = True
    return covered_M


def _ids(table: BoxTable) -> pa.Array:
    ids = pa.array((table.image_ids[i] for i in range(len(table))), pa.binary())
    if pc.count_distinct(ids).as_py() != len(ids):
        raise DataError(
            f"{_places(table)} must hold each image_id once, got {len(ids)} rows with "
            f"{pc.count_distinct(ids).as_py()}; label the images again"
        )
    return ids


def _check_sizes(first: BoxTable, found: BoxTable, there_N: NDArray[np.int64]) -> None:
    (both,) = np.nonzero(there_N >= 0)
    there = there_N[both]
    differ = (first.width_N[both] != found.width_N[there]) | (
        first.height_N[both] != found.height_N[there]
    )
    if differ.any():
        here, other = int(both[differ.argmax()]), int(there[differ.argmax()])
        raise DataError(
            f"image {first.image_id(here)} must have one size, got "
            f"{first.width_N[here]}x{first.height_N[here]} in {_places(first)} and "
            f"{found.width_N[other]}x{found.height_N[other]} in {_places(found)} "
            f"({int(differ.sum())} such images); label both from the same files"
        )


def _places(table: BoxTable) -> str:
    return " + ".join(source.place for source in table.sources) or "the table"


def _numbers(positions: pa.Array) -> NDArray[np.int64]:
    """Positions, -1 for null."""
    return np.array(pc.fill_null(positions, -1).to_numpy(zero_copy_only=False), np.int64)
