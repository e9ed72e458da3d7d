"""Masks of the table: they come back as they went in, and no damaged one does harm."""

from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.data.masks import MAX_CELLS, Mask, at_pixels, decode, encode
from pipeline.errors import DataError

masks = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40))
# What letters of COCO's look like, and what does not.
letters = st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30)


def stored(**fields: Any) -> dict[str, Any]:
    return encode(np.eye(3, 4, dtype=bool), (8.0, 8.0)) | fields


@given(masks, st.integers(1, 30))
@example(np.zeros((1, 1), bool), 1)
@example(np.ones((1, 300), bool), 30)
def test_a_mask_comes_back_as_it_went_in(mask_HW: Mask, larger: int) -> None:
    # Larger ones have run lengths of several letters.
    mask_HW = mask_HW.repeat(larger, axis=0).repeat(larger, axis=1)
    kept = encode(mask_HW, (8.0, 8.5))
    assert kept["cell"] == [8.0, 8.5]
    assert np.array_equal(decode(kept), mask_HW)
    coco = {"size": kept["size"], "counts": kept["counts"].encode()}
    assert np.array_equal(pycocotools.mask.decode(coco).astype(bool), mask_HW)


def complaint_of(kept: dict[str, Any]) -> str | None:
    try:
        at_pixels(kept, 20, 30)
    except DataError as fault:
        return str(fault)
    return None


@given(letters, st.lists(st.integers(-2, 40), max_size=3), st.lists(st.floats(-1, 40), max_size=3))
@example("01", [3, 4], [1e-320, 8.0])
@example("l`0" * 20, [3, 4], [8.0, 8.0])
@example("oooooO0", [3, 4], [8.0, 8.0])
def test_whatever_stands_in_a_table_is_a_mask_or_one_line(
    counts: str, size: list[int], cell: list[float]
) -> None:
    complaint = complaint_of({"size": size, "counts": counts, "cell": cell})
    assert complaint is None or ("\n" not in complaint and len(complaint) < 300)


@given(masks, st.data())
def test_a_changed_letter_is_another_mask_or_one_line(mask_HW: Mask, data: Any) -> None:
    kept = encode(mask_HW, (40.0, 40.0))
    place = data.draw(st.integers(0, len(kept["counts"]) - 1))
    letter = data.draw(st.characters(max_codepoint=200))
    kept["counts"] = kept["counts"][:place] + letter + kept["counts"][place + 1 :]
    complaint = complaint_of(kept)
    assert complaint is None or "\n" not in complaint


@given(st.lists(st.integers(0, 70), min_size=1).filter(any), st.integers(-1, 1))
@example([0, 5, 0, 0, 0, 3], 0)
def test_run_lengths_are_read_as_pycocotools_reads_them(runs: list[int], too_many: int) -> None:
    rows = sum(runs) + too_many
    coco = pycocotools.mask.frPyObjects({"size": [rows, 1], "counts": runs}, rows, 1)
    kept = stored(size=[rows, 1], counts=coco["counts"].decode())
    if too_many:
        with pytest.raises(DataError):
            decode(kept)
    else:
        assert np.array_equal(decode(kept), pycocotools.mask.decode(coco).astype(bool))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"counts": ""}, "counts must be COCO's letters"),
        ({"counts": None}, "counts must be COCO's letters"),
        ({"counts": b"04"}, "counts must be COCO's letters"),
        ({"counts": "ü"}, "counts must be COCO's letters"),
        ({"counts": "o"}, "no run lengths of COCO's"),
        ({"counts": "0 \n"}, "no run lengths of COCO's"),
        ({"counts": "04"}, "the 2 run lengths of a mask of 3 x 4 cells"),
        ({"counts": "0<0" * 10**6}, "run lengths of a mask"),
        ({"size": [3, 5]}, "of 3 x 5 cells must be 0 or more and add up to it"),
        ({"size": [0, 4]}, "must have 1 to"),
        ({"size": [2**31, 2**31]}, f"1 to {MAX_CELLS} cells"),
        ({"size": [1e308, 1e308]}, "must have 1 to"),
        ({"size": None}, "size must be two numbers"),
        ({"size": [3, None]}, "size must be two numbers"),
        ({"cell": [8.0]}, "cell must be two numbers"),
        ({"cell": [8.0, float("nan")]}, "cell must be two numbers"),
        ({"cell": [8.0, -8.0]}, "3 cells of -8 pixels do not cover an image of 24"),
        ({"cell": [1.0, 8.0]}, "4 cells of 1 pixels do not cover an image of 30"),
    ],
)
def test_what_is_damaged_is_told_in_a_line(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as fault:
        at_pixels(stored(**fields), 30, 24)
    assert "\n" not in str(fault.value)


def test_no_more_pixels_are_drawn_than_fit_into_memory() -> None:
    with pytest.raises(DataError, match=r"drawn at 1 to 268435456 pixels, not at \d+ x 16385"):
        at_pixels(stored(cell=[1e5, 1e5]), 16_385, 16_385)


def test_cells_become_pixels_and_the_last_ones_hang_over_the_edge() -> None:
    mask_HW = np.array([[True, False, True], [False, True, False]])
    mask_hw = at_pixels(encode(mask_HW, (4.0, 3.0)), 10, 5)
    whole_hw = mask_HW.repeat(3, axis=0).repeat(4, axis=1)
    assert np.array_equal(mask_hw, whole_hw[:5, :10])


def test_of_an_image_scaled_down_each_pixel_has_the_cell_of_its_middle() -> None:
    rng = np.random.default_rng(0)
    mask_HW = rng.random((30, 40)) < 0.5
    # As of a network that saw an original of 1001 x 751 pixels at 320 x 240.
    kept = encode(mask_HW, (8 * 1001 / 320, 8 * 751 / 240))
    kept["cell"] = np.float32(kept["cell"]).tolist()
    mask_hw = at_pixels(kept, 1001, 751, shown=(320, 240))
    assert np.array_equal(mask_hw, mask_HW.repeat(8, axis=0).repeat(8, axis=1))
