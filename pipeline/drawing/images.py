"""What the method saw, as pictures: arrays in, PIL images out.

Nothing here runs a model or touches a file (the gallery does). Every picture is scaled to ``fit``
first and drawn on afterwards, so that lines are equally thick on a thumbnail-sized image and on a
huge one. Boxes and seeds are in pixels of the array they are drawn on.

To draw another quantity per patch: write a function beside ``degree_panel``, and add it to the row
in gallery/maps.py.

Shape letters:  H, W rows and columns of pixels   R, C rows and columns of patches   N boxes
"""

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.boxes import Boxes, clip, rescale

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Colour = tuple[int, int, int]
Size = tuple[int, int]
Picture = Image.Image

METHOD_COLOURS: dict[str, Colour] = {
    "lost": (255, 159, 28),
    "solost": (64, 224, 128),
    "cad": (88, 166, 255),
    "ncut": (255, 214, 92),
    "head": (255, 105, 180),
}
"""One colour per rule wherever its box or mask is drawn; ``cad`` is the detector's."""

METHOD_NAMES = {"lost": "LOST", "solost": "SoLOST", "cad": "CAD", "ncut": "NCut", "head": "Head"}

PANEL: Size = (400, 300)
THUMBNAIL: Size = (240, 180)
"""Width and height that a picture is scaled to fit into, in a row and on a contact sheet."""

# Overlays are drawn this much larger and reduced, which smooths their edges.
_FINER = 4
_PAGE, _INK, _FAINT_INK, _CELL = (255, 255, 255), (28, 30, 34), (105, 110, 118), (238, 240, 242)
_DARK, _WHITE = (0, 0, 0), (255, 255, 255)
_HALO = (0, 0, 0, 170)
_MARGIN, _GAP = 16, 10
_NARROWEST_PANEL, _NARROWEST_PAGE = 200, 420
# Pixels of a picture's side: a panorama's strip would vanish under its own box and seed.
_THINNEST = 40
_TITLE_SIZE, _TEXT_SIZE, _NOTE_SIZE = 19, 14, 12
_LONGEST_TEXT = 400
# Bright is what matters in both maps: few similar patches, and much like the seed.
_DEGREE_RAMP, _SIMILARITY_RAMP = "viridis_r", "plasma"
_MAP_OPACITY = 0.7
_TINT = 0.45


@dataclass(frozen=True)
class Finding:
    """Boxes ``(N, 4)`` xyxy with their scores (or none), and the seed, in pixels of the image.

    ``masks`` are the objects' ``(H, W)`` pixels, where they are known.
    """

    boxes_N4: ArrayLike
    seed_xy: tuple[float, float] | None = None
    scores: Sequence[float] = ()
    masks: Sequence[Bools] = ()


@dataclass(frozen=True)
class Panel:
    """A picture with a title and a note under it; ``ramp`` is a colour bar from low to high."""

    picture: Picture
    title: str
    note: str = ""
    ramp: tuple[str, str, str] | None = None
    """Colour map, and the texts at its left and right end."""


def draw_box(pixels_HW3: Pixels, finding: Finding, *, colour: Colour, fit: Size = PANEL) -> Picture:
    """The image with its boxes, their scores in a corner, and the seed as a white dot.

    Masks are tinted in the colour of the boxes.
    """
    picture = _scaled(pixels_HW3, fit)
    if finding.masks:
        inside = Image.fromarray(np.any(finding.masks, axis=0)).resize(picture.size)
        tinted = Image.blend(picture, Image.new("RGB", picture.size, colour), _TINT)
        picture = Image.composite(tinted, picture, inside)
    return _mark(picture, pixels_HW3, finding, colour)


def draw_mask(
    pixels_HW3: Pixels,
    mask_RC: Bools,
    stride: float,
    finding: Finding,
    *,
    colour: Colour,
    fit: Size = PANEL,
) -> Picture:
    """The patches of ``mask_RC`` in the method's colour, all else dark; box and seed on top.

    Args:
        pixels_HW3: the image.
        mask_RC: the patches, each ``stride`` pixels wide; they may reach over the image's edge.
        stride: pixels per patch.
        finding: what the mask led to.
        colour: of the tint and of the box.
        fit: width and height the picture is scaled into.
    """
    picture = _scaled(pixels_HW3, fit)
    inside_HW = _spread(mask_RC.astype(np.float32), stride, pixels_HW3, picture.size) > 0.5
    # Tinted grey, not the tinted image: orange over a blue sky would be grey.
    tinted = Image.blend(_grey(picture), Image.new("RGB", picture.size, colour), _TINT)
    shown = Image.composite(tinted, _dimmed(picture), Image.fromarray(inside_HW))
    return _mark(shown, pixels_HW3, finding, colour)


def degree_panel(
    pixels_HW3: Pixels,
    degree_RC: NDArray[np.integer],
    stride: float,
    *,
    seed_xy: tuple[float, float] | None,
    fit: Size = PANEL,
) -> Panel:
    """How many other patches each patch is similar to; the fewest shine, the seed first of all.

    Args:
        pixels_HW3: the image.
        degree_RC: number of similar patches, each patch ``stride`` pixels wide.
        stride: pixels per patch.
        seed_xy: the seed, in pixels of the image.
        fit: width and height the picture is scaled into.
    """
    low, high = int(degree_RC.min()), int(degree_RC.max())
    height_RC = (degree_RC - low) / max(high - low, 1)
    picture = _scaled(pixels_HW3, fit)
    values_HW = _spread(height_RC, stride, pixels_HW3, picture.size)
    picture = _heat(picture, values_HW, np.ones_like(values_HW, dtype=bool), _DEGREE_RAMP)
    picture = _mark(picture, pixels_HW3, Finding([], seed_xy), _WHITE)
    title = f"Degree: similar among {degree_RC.size - 1} others"
    return Panel(picture, title, ramp=(_DEGREE_RAMP, str(low), str(high)))


def similarity_panel(
    pixels_HW3: Pixels,
    similarity_RC: Floats,
    stride: float,
    *,
    seed_xy: tuple[float, float] | None,
    fit: Size = PANEL,
) -> Panel:
    """How similar each patch is to the seed; patches that are not (0 or less) stay dark.

    Args:
        pixels_HW3: the image.
        similarity_RC: from -1 to 1, each patch ``stride`` pixels wide.
        stride: pixels per patch.
        seed_xy: the seed, in pixels of the image.
        fit: width and height the picture is scaled into.
    """
    # The seed is 1 to itself and lies under the dot: scaled by it, all others would be dark.
    high = float(np.sort(similarity_RC, axis=None)[-2:][0])
    high = high if high > 0 else 1.0
    picture = _scaled(pixels_HW3, fit)
    values_HW = _spread(similarity_RC, stride, pixels_HW3, picture.size)
    picture = _heat(picture, values_HW / high, values_HW > 0, _SIMILARITY_RAMP)
    picture = _mark(picture, pixels_HW3, Finding([], seed_xy), _WHITE)
    others = max(0, int((similarity_RC > 0).sum()) - 1)
    title = f"Similarity to the seed ({others} similar)"
    return Panel(picture, title, ramp=(_SIMILARITY_RAMP, "0", f"{high:.2f}"))


def map_panel(
    pixels_HW3: Pixels,
    map_RC: Floats,
    stride: float,
    *,
    title: str,
    seed_xy: tuple[float, float] | None,
    fit: Size = PANEL,
) -> Panel:
    """A map of objects: the higher the brighter; what is no object's (0 or less) stays dark.

    Args:
        pixels_HW3: the image.
        map_RC: of each patch, ``stride`` pixels wide.
        stride: pixels per patch.
        title: what the map is of.
        seed_xy: where it is highest on the object, in pixels of the image.
        fit: width and height the picture is scaled into.
    """
    high = max(float(map_RC.max()), 1e-6)
    picture = _scaled(pixels_HW3, fit)
    values_HW = _spread(map_RC, stride, pixels_HW3, picture.size)
    picture = _heat(picture, values_HW / high, values_HW > 0, _SIMILARITY_RAMP)
    picture = _mark(picture, pixels_HW3, Finding([], seed_xy), _WHITE)
    return Panel(picture, title, ramp=(_SIMILARITY_RAMP, "0", f"{high:.2f}"))


def panel_row(title: str, note: str, panels: Sequence[Panel]) -> Picture:
    """The panels side by side on a white page, under a title and a line of small print.

    Raises:
        ValueError: there are no panels.
    """
    if not panels:
        raise ValueError("a row needs at least one panel, got none")
    widths = [max(panel.picture.width, _NARROWEST_PANEL) for panel in panels]
    height = max(panel.picture.height for panel in panels)
    width = sum(widths) + _GAP * (len(panels) - 1)
    top = _MARGIN + _TITLE_SIZE + _TEXT_SIZE + 16
    captions = _TEXT_SIZE + _NOTE_SIZE + 14
    page_size = (max(width, _NARROWEST_PAGE) + 2 * _MARGIN, top + height + captions + _MARGIN)
    page = Image.new("RGB", page_size, _PAGE)
    room = page.width - 2 * _MARGIN
    _write(page, (_MARGIN, _MARGIN), title, size=_TITLE_SIZE, width=room)
    _write(page, (_MARGIN, _MARGIN + _TITLE_SIZE + 6), note, size=_TEXT_SIZE, width=room)
    left = _MARGIN
    for panel, cell in zip(panels, widths, strict=True):
        _paste_centred(page, panel.picture, (left, top), (cell, height))
        _caption(page, panel, (left, top + height + 6), cell)
        left += cell + _GAP
    return page


def contact_sheet(
    pictures: Sequence[Picture], captions: Sequence[str], *, columns: int, title: str = ""
) -> Picture:
    """The pictures in equal cells, row by row, a caption under each.

    Raises:
        ValueError: there are no pictures, not as many captions, or less than one column.
    """
    if not pictures or len(pictures) != len(captions) or columns < 1:
        raise ValueError(
            "a sheet needs at least one picture, a caption for each and at least one column, got "
            f"{len(pictures)} pictures, {len(captions)} captions and {columns} columns"
        )
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell = (
        max(_NARROWEST_PANEL, *(picture.width for picture in pictures)),
        max(picture.height for picture in pictures),
    )
    step = (cell[0] + _GAP, cell[1] + _NOTE_SIZE + 8 + _GAP)
    top = _MARGIN + (_TITLE_SIZE + 10 if title else 0)
    page_size = (columns * step[0] - _GAP + 2 * _MARGIN, top + rows * step[1] - _GAP + _MARGIN)
    page = Image.new("RGB", page_size, _PAGE)
    _write(page, (_MARGIN, _MARGIN), title, size=_TITLE_SIZE, width=page.width - 2 * _MARGIN)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(index, columns)
        corner = (_MARGIN + column * step[0], top + row * step[1])
        _paste_centred(page, picture, corner, cell)
        below = (corner[0], corner[1] + cell[1] + 4)
        _write(page, below, caption, size=_NOTE_SIZE, width=cell[0])
    return page


def encoded(picture: Picture, form: Literal["PNG", "JPEG"] = "PNG") -> bytes:
    """The file's bytes; JPEG without chroma subsampling, which would blur text and thin lines."""
    sink = io.BytesIO()
    options: dict[str, Any] = {"quality": 90, "subsampling": 0} if form == "JPEG" else {}
    picture.save(sink, form, **options)
    return sink.getvalue()


def base_name(uri: str) -> str:
    """The last part of a URI or path, for captions."""
    return uri.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _scaled(pixels_HW3: Pixels, fit: Size) -> Picture:
    """The image as large as ``fit`` allows, up or down; only thin strips change proportions."""
    height, width = pixels_HW3.shape[:2]
    scale = min(fit[0] / width, fit[1] / height)
    size = (max(_THINNEST, round(width * scale)), max(_THINNEST, round(height * scale)))
    return Image.fromarray(pixels_HW3).resize(size, Image.Resampling.LANCZOS)


def _spread(values_RC: Floats, stride: float, pixels_HW3: Pixels, size: Size) -> Floats:
    """Values of patches as values of the picture's pixels, each patch a flat square.

    Not smoothed: a smooth map looks finer than it was computed.
    """
    rows, columns = values_RC.shape
    height, width = pixels_HW3.shape[:2]
    seen = (0.0, 0.0, min(width / stride, columns), min(height / stride, rows))
    grid = Image.fromarray(values_RC.astype(np.float32))
    return np.asarray(grid.resize(size, Image.Resampling.NEAREST, box=seen))


def _heat(picture: Picture, values_HW: Floats, shown_HW: Bools, ramp: str) -> Picture:
    """Values from 0 to 1 in colours over the greyed picture, where ``shown_HW``; dark elsewhere."""
    colours = matplotlib.colormaps[ramp](values_HW, bytes=True)[..., :3]
    heat = Image.fromarray(np.ascontiguousarray(colours))
    heat = Image.blend(_dimmed(picture), heat, _MAP_OPACITY)
    return Image.composite(heat, _dimmed(picture), Image.fromarray(shown_HW))


def _grey(picture: Picture) -> Picture:
    return ImageOps.grayscale(picture).convert("RGB")


def _dimmed(picture: Picture) -> Picture:
    return Image.blend(_grey(picture), Image.new("RGB", picture.size, _DARK), 0.45)


def _mark(picture: Picture, pixels_HW3: Pixels, finding: Finding, colour: Colour) -> Picture:
    """The picture with the boxes, scores and seed of the image it was scaled from."""
    scale_x = picture.width / pixels_HW3.shape[1]
    scale_y = picture.height / pixels_HW3.shape[0]
    boxes = rescale(finding.boxes_N4, scale_x, scale_y)
    overlay = Image.new("RGBA", (picture.width * _FINER, picture.height * _FINER))
    draw = ImageDraw.Draw(overlay)
    thickness = 3 if max(picture.size) > THUMBNAIL[0] else 2
    boxes = _drawable(boxes, 3.0 * thickness + 2, picture.size)
    for box in boxes:
        _frame(draw, box, thickness, colour)
    if finding.seed_xy is not None:
        radius = 2.0 + thickness
        centre = np.array(finding.seed_xy) * (scale_x, scale_y)
        # Whole also where the seed's patch hangs over the edge of the image.
        centre = np.clip(centre, radius, np.array(picture.size) - radius)
        _dot(draw, (float(centre[0]), float(centre[1])), radius)
    marked = Image.alpha_composite(picture.convert("RGBA"), overlay.reduce(_FINER)).convert("RGB")
    for box, score in zip(boxes, finding.scores, strict=False):
        _chip(marked, box, f"{score:.2f}", colour)
    return marked


def _drawable(boxes_N4: Boxes, least: float, size: Size) -> Boxes:
    """The boxes within the picture, grown about their middles where a side is below ``least``."""
    middle_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    reach_N2 = np.maximum(boxes_N4[:, 2:] - boxes_N4[:, :2], least) / 2
    middle_N2 = np.clip(middle_N2, least / 2, np.array(size) - least / 2)
    return clip(np.hstack([middle_N2 - reach_N2, middle_N2 + reach_N2]), *size)


def _frame(draw: ImageDraw.ImageDraw, box: Boxes, thickness: int, colour: Colour) -> None:
    """A box's line between two dark ones, all inside the box, so that edges of images show it."""
    halo, line = _FINER, thickness * _FINER
    x0, y0, x1, y1 = (float(edge) * _FINER for edge in box)
    # Pillow's far corner is inclusive.
    x1, y1 = x1 - 1, y1 - 1
    draw.rectangle((x0, y0, x1, y1), outline=_HALO, width=line + 2 * halo)
    inner = (x0 + halo, y0 + halo, x1 - halo, y1 - halo)
    draw.rectangle(inner, outline=(*colour, 255), width=line)


def _dot(draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float) -> None:
    """A white disc in a dark ring: seen on any ground."""
    x, y = centre[0] * _FINER, centre[1] * _FINER
    for reach, fill in ((radius + 2.0, (0, 0, 0, 220)), (radius, (*_WHITE, 255))):
        reach *= _FINER
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)


def _chip(picture: Picture, box: Boxes, text: str, colour: Colour) -> None:
    """A small label above a box; inside it, or below a small one, where there is no room."""
    font = _font(_NOTE_SIZE)
    width, height = int(font.getlength(text)) + 8, _NOTE_SIZE + 5
    left = max(0, min(int(box[0]), picture.width - width))
    top = int(box[1]) - height
    if top < 0:
        top = int(box[1] if box[3] - box[1] > 2 * height else box[3])
    top = max(0, min(top, picture.height - height))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=colour)
    draw.text((left + width / 2, top + height / 2), text, font=font, fill=_INK, anchor="mm")


def _paste_centred(page: Picture, picture: Picture, corner: Size, cell: Size) -> None:
    """The picture in the middle of a pale cell."""
    page.paste(_CELL, (*corner, corner[0] + cell[0], corner[1] + cell[1]))
    offset = ((cell[0] - picture.width) // 2, (cell[1] - picture.height) // 2)
    page.paste(picture, (corner[0] + offset[0], corner[1] + offset[1]))


def _caption(page: Picture, panel: Panel, corner: Size, width: int) -> None:
    """Title and, below it, the note or the colour bar of a panel."""
    _write(page, corner, panel.title, size=_TEXT_SIZE, width=width)
    below = (corner[0], corner[1] + _TEXT_SIZE + 5)
    if panel.ramp is None:
        _write(page, below, panel.note, size=_NOTE_SIZE, width=width, colour=_FAINT_INK)
        return
    name, low, high = panel.ramp
    font = _font(_NOTE_SIZE)
    _write(page, below, low, size=_NOTE_SIZE, width=width, colour=_FAINT_INK)
    start = below[0] + int(font.getlength(low)) + 6
    length = max(20, min(120, width - int(font.getlength(low + high)) - 12))
    shades_L3 = matplotlib.colormaps[name](np.linspace(0, 1, length), bytes=True)[:, :3]
    bar = np.ascontiguousarray(np.broadcast_to(shades_L3, (_NOTE_SIZE - 2, length, 3)))
    page.paste(Image.fromarray(bar), (start, below[1] + 2))
    end = (start + length + 6, below[1])
    _write(page, end, high, size=_NOTE_SIZE, width=width, colour=_FAINT_INK)


def _write(
    page: Picture, corner: Size, text: str, *, size: int, width: int, colour: Colour = _INK
) -> None:
    """One line of text, its middle left out where it is wider than ``width``."""
    text = _printable(text)
    font = _font(size) if text.isascii() else _font_of_many_scripts(size)
    draw = ImageDraw.Draw(page)
    draw.text(corner, _shortened(text, font.getlength, width), font=font, fill=colour)


def _shortened(text: str, length: Callable[[str], float], width: float) -> str:
    """``text`` with "..." for as much of its middle as it takes: a file's ending stays in sight."""
    kept = len(text)
    shown = text
    while kept > 0 and length(shown) > width:
        kept -= 1
        shown = f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
    return shown


def _printable(text: str) -> str:
    """Foreign text, made safe to draw: one line, nothing invisible, of a bearable length."""
    line = "".join(letter if letter.isprintable() else "?" for letter in text)
    half = _LONGEST_TEXT // 2
    return line if len(line) <= _LONGEST_TEXT else f"{line[:half]}...{line[-half:]}"


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which has ASCII only; loading it takes longer than drawing with it."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType: install the wheel from PyPI")
    # Raqm spaces digits unevenly with this font.
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _font_of_many_scripts(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: for file names with umlauts, in Cyrillic, in Greek."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size - 1)
