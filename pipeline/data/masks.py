"""Masks as the table keeps them: COCO's run lengths of a grid of cells laid over the image.

A cell is a patch of the network, or a pixel where the mask was refined. ``size`` and ``counts`` are
what ``pycocotools.mask`` reads; ``cell`` is what it lacks: how many pixels of the original image a
cell is wide and high. The last row and column may hang over the image's edge.

pycocotools writes the run lengths. It does not read them here: its C code believes them, and writes
past the end of the mask where they do not add up, but a table may come from anywhere.

Shape letters:  H, W rows and columns of cells   h, w of pixels   L letters   R runs
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask
from numpy.typing import NDArray

from pipeline.errors import DataError

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
    if (runs_R < 0).any() or runs_R.sum() != rows * columns:
        raise DataError(
            f"a mask's run lengths must be 0 or more and add up to {rows} x {columns} cells; "
            f"these {len(runs_R)} add up to {runs_R.sum()}: the table is damaged"
        )
    # Runs go down the columns, the first one off the object.
    flat = np.repeat(np.arange(len(runs_R)) % 2 == 1, runs_R)
    return flat.reshape(columns, rows).T


def at_pixels(stored: Mapping[str, Any], width: int, height: int) -> Mask:
    """``(h, w)``: a mask of the table at the original image's resolution, each cell a flat square.

    Args:
        stored: a value of the table's ``masks``.
        width: pixels of the image; for one scaled down give its own and scale ``cell`` likewise.
        height: likewise.

    Raises:
        DataError: as for ``decode``; the cells are no sizes, or do not cover the image.
    """
    mask_HW = decode(stored)
    if width < 1 or height < 1 or width * height > MAX_CELLS:
        raise DataError(f"an image must have 1 to {MAX_CELLS} pixels, got {width} x {height}")
    cell_2 = _numbers(stored, "cell")
    if not (cell_2 > 0).all():
        raise DataError(f"a mask's cell must be wider and higher than 0, got {cell_2.tolist()}")
    row_h, column_w = (
        (np.arange(pixels) + 0.5) / side
        for pixels, side in ((height, cell_2[1]), (width, cell_2[0]))
    )
    limits = np.array(mask_HW.shape) + _ROUNDING
    if row_h[-1] > limits[0] or column_w[-1] > limits[1]:
        raise DataError(
            f"a mask of {mask_HW.shape[0]} x {mask_HW.shape[1]} cells of {cell_2[1]:g} x "
            f"{cell_2[0]:g} pixels does not cover its image of {height} x {width}"
        )
    row_h1 = np.minimum(row_h.astype(np.int64), mask_HW.shape[0] - 1)[:, None]
    mask_hw: Mask = mask_HW[row_h1, np.minimum(column_w.astype(np.int64), mask_HW.shape[1] - 1)]
    return mask_hw


def _size(stored: Mapping[str, Any]) -> tuple[int, int]:
    rows, columns = _numbers(stored, "size")
    if not (rows >= 1 and columns >= 1 and rows * columns <= MAX_CELLS):
        raise DataError(
            f"a mask must have 1 to {MAX_CELLS} cells, got {rows:g} rows of {columns:g}"
        )
    return int(rows), int(columns)


def _numbers(stored: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    """The two finite numbers of a field."""
    try:
        two_2 = np.asarray(stored[name], dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        two_2 = np.empty(0)
    if two_2.shape != (2,) or not np.isfinite(two_2).all():
        raise DataError(f"a mask's {name} must be two numbers, got {stored.get(name)!r:.80}")
    return two_2


def _run_lengths(counts: Any) -> NDArray[np.int64]:
    """What COCO's letters stand for; negative only where they are wrong."""
    if not isinstance(counts, str) or not counts.isascii() or not counts:
        raise DataError(f"a mask's counts must be COCO's letters, got {counts!r:.80}")
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
        raise DataError(f"a mask's counts are no run lengths of COCO's, got {counts!r:.80}")
    place_L = np.arange(len(letters_L)) - np.repeat(first_R, last_R - first_R + 1)
    runs_R = np.add.reduceat((letters_L & _DIGITS) << _BITS * place_L, first_R)
    is_negative_R = letters_L[last_R] & _SIGN != 0
    runs_R -= is_negative_R.astype(np.int64) << _BITS * (last_R - first_R + 1)
    # From the third on they are kept as differences from the last but one.
    runs_R[1::2] = runs_R[1::2].cumsum()
    runs_R[2::2] = runs_R[2::2].cumsum()
    return runs_R
