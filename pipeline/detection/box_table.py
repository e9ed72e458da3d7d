"""Boxes to train a detector on: the usable rows of a pseudo-label table, in a few flat arrays.

A million images take some 200 MB and no Python object each, so loader processes can share them.
What cannot be trained on is left out and counted, image by image and box by box.

``merge_boxes`` makes one table of two, for self-training: a detector trained on one box per image
finds more objects, with a score each. Its confident detections become the labels of the next round,
and a box of the round before stays where no detection covers it (CutLER, Wang et al., CVPR 2023,
section 3.3).

To leave out more: a reason in `_reasons`. To read boxes from elsewhere: another function that
returns a `BoxTable`.

Shape letters:  N images   M boxes, image after image   P pairs of boxes   K images of one table
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.boxes import aligned_iou, as_boxes
from pipeline.data.labelled_images import PackedBytes
from pipeline.data.pseudo_labels import manifest_sha256, read_labels
from pipeline.errors import DataError
from pipeline.storage import Location

THINNEST: Final = 0.01
"""Pixels of the original: a box thinner than this may lose its last width when it is scaled in
float32, and a detector must not meet a box without area."""

_COLUMNS = ["image_id", "uri", "width", "height", "status", "boxes", "scores", "labels"]
_KEPT = "kept"


@dataclass(frozen=True)
class TableSource:
    """A table that boxes were read from, and what of it was left out."""

    place: str
    manifest_sha256: str
    """Of the bytes of its manifest, which holds the hashes of the table's files."""

    rows: int
    images_left_out: Mapping[str, int]
    """By status; of status ok by ``no_box`` and ``no_usable_box``."""

    boxes_left_out: Mapping[str, int]
    """Of images of status ok: ``not_finite``, ``degenerate``, ``outside``, ``below_min_score``."""

    def describe(self) -> str:
        """The counts for people: ``images: 3 no_object, 1 error_read; boxes: 2 degenerate``."""
        told = (("images", self.images_left_out), ("boxes", self.boxes_left_out))
        parts = [
            f"{what}: " + ", ".join(f"{count} {reason}" for reason, count in counts.items())
            for what, counts in told
            if counts
        ]
        return "; ".join(parts) or "nothing"


@dataclass(frozen=True, eq=False)
class BoxTable:
    """Images with at least one box each, ordered by image_id."""

    image_ids: PackedBytes
    uris: PackedBytes
    width_N: NDArray[np.int32]
    """Of the original in pixels, upright."""

    height_N: NDArray[np.int32]
    bounds: NDArray[np.int64]
    """``(N + 1,)``: the boxes of image i are rows ``bounds[i]:bounds[i + 1]``."""

    boxes_M4: NDArray[np.float32]
    """xyxy in pixels of the upright original, inside it."""

    labels_M: NDArray[np.int64]
    """At least 1; 1 is "object" where there are no classes."""

    scores_M: NDArray[np.float32]
    """Finite; 1 where the table has none."""

    sources: tuple[TableSource, ...] = ()
    num_overlapped: int = field(default=0, kw_only=True)
    """Boxes of an earlier table that gave way to new ones."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_id(self, index: int) -> str:
        """Of image ``index``."""
        return self.image_ids[index].decode()

    def uri(self, index: int) -> str:
        """Where image ``index`` lies."""
        return self.uris[index].decode()

    def rows(self, index: int) -> slice:
        """The rows of the boxes of image ``index``."""
        return slice(int(self.bounds[index]), int(self.bounds[index + 1]))

    @property
    def is_wide_N(self) -> NDArray[np.bool_]:
        """Wider than high: the two buckets of aspect in which images meet in a batch."""
        wide_N: NDArray[np.bool_] = self.width_N > self.height_N
        return wide_N


def read_box_table(folder: Location, *, min_score: float | None = None) -> BoxTable:
    """The images of status ok with a usable box; boxes are cut at the image's edges.

    Args:
        folder: A finished pseudo-label table.
        min_score: Boxes with a lower score are left out; None keeps all.

    Raises:
        DataError: the table cannot be read, is damaged, or has no usable box.
    """
    rows = read_labels(folder, _COLUMNS)
    table = rows.filter(pc.equal(rows["status"], "ok")).combine_chunks()
    boxes_M4, scores_M, labels_M, owner_M = _flat_boxes(folder, table)
    width_N, height_N = (_numbers(table[name], np.int32) for name in ("width", "height"))
    edge_M4 = np.stack([width_N, height_N, width_N, height_N], axis=1)[owner_M]
    # NaN stays NaN.
    clipped_M4 = np.minimum(np.maximum(boxes_M4, 0), edge_M4).astype(np.float32)
    reason_M = _reasons(boxes_M4, clipped_M4, scores_M, min_score)
    kept_M = reason_M == _KEPT
    num_N, num_kept_N = (
        np.bincount(owners, minlength=len(table)) for owners in (owner_M, owner_M[kept_M])
    )
    usable_N = num_kept_N > 0
    source = TableSource(
        place=str(folder),
        manifest_sha256=manifest_sha256(folder),
        rows=len(rows),
        images_left_out=_images_left_out(rows["status"], num_N, num_kept_N),
        boxes_left_out=_ordered(Counter(reason_M[~kept_M].tolist())),
    )
    if not usable_N.any():
        raise DataError(
            f"{folder} must hold at least one usable box, got none in {len(rows)} rows (left out: "
            f"{source.describe()}); label the images again or lower the least score"
        )
    chosen = table.filter(pa.array(usable_N))
    return BoxTable(
        image_ids=PackedBytes(_encoded(chosen["image_id"])),
        uris=PackedBytes(_encoded(chosen["uri"])),
        width_N=width_N[usable_N],
        height_N=height_N[usable_N],
        bounds=np.concatenate([[0], np.cumsum(num_kept_N[usable_N])]).astype(np.int64),
        boxes_M4=clipped_M4[kept_M],
        labels_M=labels_M[kept_M],
        scores_M=scores_M[kept_M],
        sources=(source,),
    )


def _images_left_out(
    statuses: Any, num_N: NDArray[np.int64], num_kept_N: NDArray[np.int64]
) -> dict[str, int]:
    """Counts by reason; ``num`` and ``num_kept`` are boxes of the images of status ok."""
    values, counts = pc.value_counts(statuses).flatten()
    left_out = Counter(dict(zip(values.to_pylist(), counts.to_pylist(), strict=True)))
    left_out["ok"] = 0
    left_out["no_box"] = int((num_N == 0).sum())
    left_out["no_usable_box"] = int(((num_N > 0) & (num_kept_N == 0)).sum())
    return _ordered(left_out)


def _flat_boxes(
    folder: Location, table: pa.Table
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """All boxes of the table with their scores, labels, and the numbers of their rows."""
    num_N = _lengths(table["boxes"])
    owner_M = np.repeat(np.arange(len(table)), num_N)
    flat = pc.list_flatten(table["boxes"])
    boxes_M4 = _numbers(pc.list_flatten(flat), np.float32).reshape(-1, 4)
    if len(boxes_M4) != len(owner_M):
        raise DataError(f"{folder} is damaged: a box is null; label the images again")
    columns = []
    for name, missing in (("scores", 1.0), ("labels", 1)):
        given_N = table[name].is_valid().to_numpy()
        if (_lengths(table[name]) != num_N)[given_N].any():
            raise DataError(
                f"{folder} is damaged: an image has other numbers of boxes and of {name}; label "
                "the images again"
            )
        values_M = np.full(len(owner_M), missing)
        values_M[given_N[owner_M]] = _numbers(pc.list_flatten(table[name]), np.float64)
        columns.append(values_M)
    scores_M, labels_M = columns
    if (labels_M < 1).any():
        raise DataError(
            f"labels in {folder} must be at least 1 (0 is the background), "
            f"got {int(labels_M.min())}"
        )
    return boxes_M4, scores_M.astype(np.float32), labels_M.astype(np.int64), owner_M


def _reasons(
    boxes_M4: NDArray[np.float32],
    clipped_M4: NDArray[np.float32],
    scores_M: NDArray[np.float32],
    min_score: float | None,
) -> NDArray[np.str_]:
    """Why each box is left out, the first reason that holds; `_KEPT` for the others."""
    finite_M = np.isfinite(boxes_M4).all(axis=1) & np.isfinite(scores_M)
    low_M = scores_M < (-np.inf if min_score is None else min_score)
    conditions = {
        "not_finite": ~finite_M,
        "degenerate": _is_thin(boxes_M4),
        "outside": _is_thin(clipped_M4),
        "below_min_score": low_M,
    }
    return np.select([*conditions.values()], [*conditions], default=_KEPT)


def _is_thin(boxes_M4: NDArray[np.float32]) -> NDArray[np.bool_]:
    boxes = as_boxes(boxes_M4)
    # Infinity minus infinity is NaN, and no number is below NaN.
    with np.errstate(invalid="ignore"):
        sides_M2 = boxes[:, 2:] - boxes[:, :2]
    thin_M: NDArray[np.bool_] = sides_M2.min(axis=1) < THINNEST
    return thin_M


def _ordered(counts: "Counter[str]") -> dict[str, int]:
    """The counts that are not 0, largest first."""
    return {reason: count for reason, count in counts.most_common() if count}


def _lengths(lists: Any) -> NDArray[np.int64]:
    """Of each list of a column; 0 for null."""
    return _numbers(pc.list_value_length(lists), np.int64)


def _numbers(column: Any, kind: type[Any]) -> NDArray[Any]:
    """A column as an array: null is NaN among floats and 0 among integers."""
    if not np.issubdtype(kind, np.floating):
        column = pc.fill_null(column, 0)
    return np.array(column.to_numpy(), dtype=kind)


def _encoded(column: Any) -> Iterator[bytes]:
    """Strings as bytes, some at a time: a list of all would be as large as the table."""
    for chunk in column.cast(pa.binary()).chunks:
        for first in range(0, len(chunk), 1 << 14):
            yield from chunk.slice(first, 1 << 14).to_pylist()


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
    there_N = _positions(pc.index_in(ids, value_set=found_ids))
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
    here_N = _positions(pc.index_in(found_ids, value_set=ids))
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


def _positions(positions: pa.Array) -> NDArray[np.int64]:
    """Positions, -1 for null."""
    return np.array(pc.fill_null(positions, -1).to_numpy(zero_copy_only=False), np.int64)
