"""Masks as the table keeps them: COCO's run lengths of a grid of cells laid over the image.

A cell is a patch of the network, or a pixel where the mask was refined. ``size`` and ``counts`` are
what ``pycocotools.mask`` reads; ``cell`` is what it lacks: how many pixels of the original image a
cell is wide and high. The last row and column may hang over the image's edge.

pycocotools writes the run lengths. It does not read them here, for a table may come from anywhere:
where they add up to too little its masks hold whatever lay in memory (2.0.11).

Shape letters:  H, W rows and columns of cells   h, w of pixels   L letters   R runs
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask
from numpy.typing import NDArray

from pipeline.errors import DataError, one_line

Mask = NDArray[np.bool_]

MAX_CELLS = 2**28
"""Of a mask, and pixels of an image that one is laid over: 256 MiB."""

# COCO's letters: five bits each, the lowest first; the sixth says that more follow. A difference of
# two runs of at most MAX_CELLS cells takes 30 bits with its sign.
_FIRST_LETTER, _BITS, _MOST_LETTERS = 48, 5, 6
_MORE, _SIGN, _DIGITS = 32, 16, 31
# Of a cell: what rounding to float32 may shift the edge of the last one by.
_ROUNDING = 0.01


def encode(mask_HW: Mask, cell: tuple[float, float]) -> dict[str, Any]:
    """A value of the table's ``masks``.

    Args:
        mask_HW: True on the object; may be empty.
        cell: width and height of a cell, in pixels of the original image.
    """
    runs = pycocotools.mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {
        "size": list(mask_HW.shape),
        "counts": runs["counts"].decode("ascii"),
        "cell": [float(side) for side in cell],
    }


def decode(stored: Mapping[str, Any]) -> Mask:
    """``(H, W)``: the cells of a mask of the table, whoever wrote it.

    Raises:
        DataError: a size is below 1 or above ``MAX_CELLS`` in all, the counts are no COCO run
            lengths, or they do not add up to the size.
    """
    rows, columns = _size(stored)
    runs_R = _run_lengths(stored.get("counts"))
    cells = rows * columns
    # Each alone first, so that no sum runs over.
    if runs_R.min() < 0 or runs_R.max() > cells or runs_R.sum() != cells:
        raise DataError(
            f"the {len(runs_R)} run lengths of a mask of {rows} x {columns} cells must be 0 or "
            "more and add up to it, and do not: the table is damaged"
        )
    # Runs go down the columns, the first one off the object.
    flat = np.repeat(np.arange(len(runs_R)) % 2 == 1, runs_R)
    return flat.reshape(columns, rows).T


def at_pixels(
    stored: Mapping[str, Any], width: int, height: int, *, shown: tuple[int, int] | None = None
) -> Mask:
    """``(h, w)``: a mask of the table as pixels of its image, each cell a flat square.

    Args:
        stored: a value of the table's ``masks``.
        width: of the original image.
        height: likewise.
        shown: width and height of the pixels that are asked for, where the image was scaled.

    Raises:
        DataError: as for ``decode``; or the cells do not cover the image.
    """
    mask_HW = decode(stored)
    wide, high = shown or (width, height)
    if min(width, height, wide, high) < 1 or wide * high > MAX_CELLS:
        raise DataError(f"a mask is drawn at 1 to {MAX_CELLS} pixels, not at {wide} x {high}")
    cell_wide, cell_high = _numbers(stored, "cell")
    row_h = _cell_of_pixels(height, high, cell_high, mask_HW.shape[0])
    column_w = _cell_of_pixels(width, wide, cell_wide, mask_HW.shape[1])
    mask_hw: Mask = mask_HW[row_h[:, None], column_w]
    return mask_hw


def _cell_of_pixels(length: int, pixels: int, cell: float, cells: int) -> NDArray[np.int64]:
    """Which cell the middle of each pixel lies in, along one side of the image."""
    if not cell > 0 or length / cell > cells + _ROUNDING:
        raise DataError(
            f"a mask's {cells} cells of {cell:g} pixels do not cover an image of {length}: the "
            "table is damaged"
        )
    place = (np.arange(pixels) + 0.5) * (length / pixels) / cell
    return np.minimum(place.astype(np.int64), cells - 1)


def _size(stored: Mapping[str, Any]) -> tuple[int, int]:
    rows, columns = _numbers(stored, "size")
    if not (rows >= 1 and columns >= 1 and rows <= MAX_CELLS / columns):
        raise DataError(
            f"a mask must have 1 to {MAX_CELLS} cells, got {rows:g} rows of {columns:g}"
        )
    return int(rows), int(columns)


def _numbers(stored: Mapping[str, Any], name: str) -> tuple[float, float]:
    """The two finite numbers of a field."""
    try:
        two_2 = np.asarray(stored[name], dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        two_2 = np.empty(0)
    if two_2.shape != (2,) or not np.isfinite(two_2).all():
        raise DataError(f"a mask's {name} must be two numbers, got {one_line(repr(stored), 80)}")
    return float(two_2[0]), float(two_2[1])


def _run_lengths(counts: Any) -> NDArray[np.int64]:
    """What COCO's letters stand for; negative only where they are wrong."""
    if not isinstance(counts, str) or not counts.isascii() or not counts:
        raise DataError(f"a mask's counts must be COCO's letters, got {one_line(repr(counts), 80)}")
    letters_L = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - _FIRST_LETTER
    last_R = np.flatnonzero(letters_L & _MORE == 0)
    first_R = np.concatenate([[0], last_R[:-1] + 1])
    if (
        letters_L.min() < 0
        or letters_L.max() >= 2 * _MORE
        or not len(last_R)
        or last_R[-1] != len(letters_L) - 1
        or (last_R - first_R).max() >= _MOST_LETTERS
    ):
        raise DataError(
            f"a mask's counts are no run lengths of COCO's, got {one_line(repr(counts), 80)}"
        )
    place_L = np.arange(len(letters_L)) - np.repeat(first_R, last_R - first_R + 1)
    runs_R = np.add.reduceat((letters_L & _DIGITS) << _BITS * place_L, first_R)
    is_negative_R = letters_L[last_R] & _SIGN != 0
    runs_R -= is_negative_R.astype(np.int64) << _BITS * (last_R - first_R + 1)
    # From the third on they are kept as differences from the last but one.
    runs_R[1::2] = runs_R[1::2].cumsum()
    runs_R[2::2] = runs_R[2::2].cumsum()
    return runs_R
