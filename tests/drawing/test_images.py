"""Pictures: what is drawn is where it should be, in its colour, on images of any shape."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.drawing.images import (
    METHOD_COLOURS,
    PANEL,
    THUMBNAIL,
    Finding,
    Panel,
    contact_sheet,
    degree_panel,
    draw_box,
    draw_mask,
    map_panel,
    panel_row,
    similarity_panel,
)

GREEN, ORANGE = METHOD_COLOURS["solost"], METHOD_COLOURS["lost"]
BLUE = (20, 40, 200)


def plain(width: int, height: int) -> NDArray[np.uint8]:
    """An image of one colour; read-only, as Arrow's buffers are."""
    pixels = np.full((height, width, 3), BLUE, dtype=np.uint8)
    pixels.flags.writeable = False
    return pixels


def colours(picture: Image.Image) -> NDArray[np.int64]:
    """``(rows, columns, 3)`` as signed numbers."""
    return np.asarray(picture).astype(np.int64)


def near(picture: Image.Image, colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Where the picture has (almost) that colour."""
    return np.asarray((abs(colours(picture) - colour) < 24).all(axis=-1))


def extent(where: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """First and one past the last column and row that are set: x0, y0, x1, y1."""
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def test_the_box_is_drawn_where_it_is_in_the_scaled_picture() -> None:
    picture = draw_box(plain(200, 150), Finding([[50, 30, 150, 120]]), colour=GREEN)
    assert picture.size == (400, 300)
    assert extent(near(picture, GREEN)) == pytest.approx((100, 60, 300, 240), abs=2)
    assert near(picture, BLUE)[150, 200], "the inside of the box is the image itself"


def test_the_seed_is_a_white_dot_in_a_dark_ring_at_its_place() -> None:
    picture = draw_box(plain(200, 150), Finding([], (50, 100)), colour=GREEN)
    x0, y0, x1, y1 = extent(near(picture, (255, 255, 255)))
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((100, 200), abs=1)
    assert colours(picture)[200, x1 + 1].max() < 90


def test_the_score_stands_above_the_box_and_the_box_stays_whole() -> None:
    without = draw_box(plain(400, 300), Finding([[100, 100, 200, 200]]), colour=GREEN)
    scored = draw_box(plain(400, 300), Finding([[100, 100, 200, 200]], None, [0.5]), colour=GREEN)
    changed = (colours(without) != colours(scored)).any(axis=-1)
    assert changed.any()
    assert not changed[100:].any()


def test_masks_are_tinted_where_they_are_and_the_rest_is_the_image_itself() -> None:
    one, other = np.zeros((2, 150, 200), dtype=bool)
    one[30:60, 50:100] = True
    other[50:120, 90:150] = True
    picture = draw_box(plain(200, 150), Finding([], masks=[one, other]), colour=GREEN)
    tint = tuple(round(0.55 * ground + 0.45 * of) for ground, of in zip(BLUE, GREEN, strict=True))
    tinted_hw = near(picture, (tint[0], tint[1], tint[2]))
    assert extent(tinted_hw) == pytest.approx((100, 60, 300, 240), abs=2)
    union_hw = (one | other).repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(tinted_hw, union_hw)
    assert near(picture, BLUE)[~union_hw].all()


def test_a_map_shines_where_it_is_high_and_is_dark_where_it_is_not_above_0() -> None:
    map_RC = np.array([[-0.2, 0.0], [0.1, 0.4]], dtype=np.float32)
    panel = map_panel(plain(200, 150), map_RC, 100, title="Map", seed_xy=None)
    assert panel.title == "Map"
    assert panel.ramp is not None
    assert panel.ramp[1:] == ("0", "0.40")
    brightness = colours(panel.picture).sum(axis=-1)
    assert brightness[50, 50] == brightness[50, 350] < brightness[250, 50] < brightness[250, 350]
    nothing = map_panel(plain(200, 150), -map_RC - 1, 100, title="Map", seed_xy=None)
    assert len(nothing.picture.getcolors() or ()) == 1, "all dark"


@pytest.mark.parametrize("fit", [PANEL, THUMBNAIL])
def test_a_box_along_the_images_edge_is_seen_on_all_four_sides(fit: tuple[int, int]) -> None:
    picture = draw_box(plain(640, 480), Finding([[0, 0, 640, 480]]), colour=GREEN, fit=fit)
    found = near(picture, GREEN)
    width, height = picture.size
    for side in (found[:5], found[-5:], found[:, :5], found[:, -5:]):
        assert side.any(axis=0).mean() > 0.9 or side.any(axis=1).mean() > 0.9
    assert found.sum() < width * height / 4


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1, 1), [0, 0, 1, 1]),
        ((16, 16), [0, 0, 16, 16]),
        ((2000, 20), [900, 0, 901, 20]),
        ((20, 2000), [0, 1999, 20, 2000]),
        ((4000, 3000), [3999, 2999, 4000, 3000]),
    ],
)
def test_any_image_fits_its_panel_and_the_smallest_box_shows(
    size: tuple[int, int], box: list[float]
) -> None:
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    picture = draw_box(plain(*size), Finding([box]), colour=ORANGE)
    assert max(picture.width / PANEL[0], picture.height / PANEL[1]) == 1
    assert min(picture.size) >= 40
    assert near(picture, ORANGE).sum() > 20
    marked = draw_box(plain(*size), Finding([box], centre, [1.0]), colour=ORANGE)
    assert near(marked, (255, 255, 255)).sum() > 20


def test_an_image_without_a_finding_is_the_image() -> None:
    assert near(draw_box(plain(30, 20), Finding([]), colour=GREEN), BLUE).all()


def test_the_mask_covers_its_patches_and_patches_over_the_edge_are_cut() -> None:
    # 2 x 2 patches of 16 pixels on 24 x 20: the right and the lower ones hang over.
    mask = np.array([[False, True], [False, False]])
    picture = draw_mask(plain(24, 20), mask, 16, Finding([]), colour=ORANGE)
    assert picture.size == (360, 300)
    image = colours(picture)
    tinted = image[..., 0] > image[..., 2] + 30
    assert extent(tinted) == pytest.approx((240, 0, 360, 240), abs=1)
    assert tinted[:239, 241:].all()
    assert (image[~tinted].std(axis=-1) < 2).all(), "all else is grey"


def test_the_fewest_similar_patches_are_the_brightest_of_the_degree_map() -> None:
    panel = degree_panel(plain(64, 16), np.array([[1, 5, 9, 30]]), 16, seed_xy=None)
    light = colours(panel.picture.convert("L").convert("RGB"))[50, [50, 150, 250, 350], 0]
    assert (np.diff(light) < 0).all()
    assert panel.ramp is not None
    assert panel.ramp[1:] == ("1", "30")
    assert "among 3 others" in panel.title


def test_patches_unlike_the_seed_stay_grey_and_the_seed_does_not_set_the_scale() -> None:
    similarity = np.array([[1.0, 0.25, 0.0, -0.5]])
    panel = similarity_panel(plain(64, 16), similarity, 16, seed_xy=(8, 8))
    image = colours(panel.picture)
    spread = np.ptp(image[20, [150, 250, 350]], axis=-1)
    assert spread[0] > 60
    assert (spread[1:] < 3).all()
    assert panel.ramp is not None
    assert panel.ramp[1:] == ("0", "0.25")
    assert panel.title.endswith("(1 similar)")


@pytest.mark.parametrize("similarity", [[[1.0]], [[0.0]], [[1.0, -1.0]]])
def test_maps_of_a_single_patch_or_of_nothing_similar_are_drawn(
    similarity: list[list[float]],
) -> None:
    values = np.array(similarity)
    pixels = plain(16 * values.shape[1], 16)
    assert similarity_panel(pixels, values, 16, seed_xy=None).title.endswith("(0 similar)")
    degrees = np.zeros(values.shape, dtype=np.int64)
    assert degree_panel(pixels, degrees, 16, seed_xy=(8, 8)).picture.height > 0


def test_a_row_holds_every_panel_side_by_side() -> None:
    panels = [Panel(Image.new("RGB", (400, 300), colour), "t") for colour in (GREEN, ORANGE, BLUE)]
    row = panel_row("name", "note", panels)
    starts = [extent(near(row, colour)) for colour in (GREEN, ORANGE, BLUE)]
    assert [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in starts] == [(400, 300)] * 3
    assert starts[0][2] < starts[1][0] < starts[1][2] < starts[2][0]
    assert row.width > starts[2][2]


@pytest.mark.parametrize(
    "text",
    ["x" * 100_000, "a\nb\t\x00\x1b[31m", "\u202egpj.exe", "Ünï/写真/фото.jpg", "\udcff", ""],
)
def test_foreign_names_neither_widen_nor_break_a_picture(text: str) -> None:
    panel = Panel(Image.new("RGB", (60, 60)), text, text)
    plain_row = panel_row("name", "note", [Panel(panel.picture, "t")])
    assert panel_row(text, text, [panel]).size == plain_row.size
    assert contact_sheet([panel.picture], [text], columns=1, title=text).width < 300


def test_letters_beyond_ascii_are_drawn_as_themselves() -> None:
    def row(name: str) -> NDArray[np.int64]:
        return colours(panel_row(name, "", [Panel(Image.new("RGB", (60, 60)), "t")]))

    # Letters that a font lacks all look alike: an empty box.
    assert (row("ü") != row("ж")).any()


def test_a_sheet_has_a_cell_per_picture_in_rows_of_columns() -> None:
    pictures = [Image.new("RGB", (240, 180 - n), GREEN) for n in range(5)]
    sheet = contact_sheet(pictures, list("abcde"), columns=2)
    rows = near(sheet, GREEN)
    assert rows.sum() == sum(picture.width * picture.height for picture in pictures)
    per_line = [int(line.sum()) // 240 for line in rows]
    assert [n for n, last in zip(per_line, [0, *per_line], strict=False) if n > last] == [2, 2, 1]
    assert contact_sheet(pictures[:1], ["a"], columns=9).width < 300


def test_nothing_to_draw_is_refused_with_what_was_given() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        panel_row("name", "note", [])
    with pytest.raises(ValueError, match="got 0 pictures"):
        contact_sheet([], [], columns=3)
    with pytest.raises(ValueError, match="2 captions"):
        contact_sheet([Image.new("RGB", (9, 9))], ["a", "b"], columns=3)
    with pytest.raises(ValueError, match="0 columns"):
        contact_sheet([Image.new("RGB", (9, 9))], ["a"], columns=0)


def test_the_same_arrays_give_the_same_picture() -> None:
    finding = Finding([[10, 10, 50, 40]], (20, 20), [0.3])
    first, again = (draw_box(plain(64, 48), finding, colour=GREEN) for _ in range(2))
    assert first.tobytes() == again.tobytes()
