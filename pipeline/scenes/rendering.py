"""From outlines to pixels: coats, shading, shadows and the lens.

To add a coat: a style in ``_coat``. To add a plain colour for parts: a line in ``_PAINTS``.

Shape letters:  H, W image   h, w an object's own layer   P points of an outline
"""

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from pipeline.scenes.backdrops import Floats, Points, Rng, blur, hsv, mix, noise, resize, rgb, step
from pipeline.scenes.shapes import PaintedPart, extent

_FURS = ("8a5a2e", "c08a4a", "e8dcc6", "3a3230", "7d7a76", "d9b58a", "b5651d", "f1efe9", "5a3a24")


# Natural colours where a kind has them; the others come in any.
_COATS = {
    "bird": (*_FURS, "4a6fa5", "b03a2e"),
    "creature": _FURS,
    "fruit": ("c0392b", "e67e22", "f1c40f", "8bb32e", "7d2f4f", "e9b84a", "4b2a5a"),
    "house": ("f0e6d2", "d98f6a", "9fb8c8", "e3c25c", "b9c9a0", "c96a5a", "f4f1ea"),
}


_PAINTS = {
    "dark": "1d1a1a",
    "cream": "efe3cc",
    "leaf": "4f8a35",
    "fern": "2f6b3c",
    "wood": "6a4a2c",
    "glass": "a9c4d4",
    "metal": "b9bcc0",
    "beak": "e09a2d",
    "brick": "8e4434",
}


_BILINEAR = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Layer:
    """An object alone: premultiplied colour, coverage, and where its top left corner goes."""

    colour_hw3: Floats
    alpha_hw: Floats
    left: int
    top: int


def contrasting(
    rng: Rng, canvas_HW3: Floats, thing: list[PaintedPart], kind: str
) -> tuple[Floats, Floats]:
    """Two colours for a coat: most often those of a few that differ most from the ground there."""
    x0, y0, x1, y1 = (max(0, int(side)) for side in extent(thing))
    around = canvas_HW3[y0:y1, x0:x1].reshape(-1, 3).mean(0)
    # One in seven takes what comes: at times only texture and shading set it apart.
    offers = 1 if rng.random() < 0.15 else 3
    if kind in _COATS:
        coats = [rgb(str(code)) for code in rng.choice(_COATS[kind], offers, replace=False)]
    else:
        dyes = rng.uniform((0, 0.45, 0.35), (1, 0.9, 0.95), (offers, 3)).tolist()
        coats = [hsv(*dye) for dye in dyes]
    first = max(coats, key=lambda coat: float(np.abs(coat - around).sum()))
    hue, saturation, value = colorsys.rgb_to_hsv(*first.tolist())
    pale, lift = rng.uniform((0.3, 0.3), (1, 0.7)).tolist()
    return first, hsv(hue + rng.uniform(-0.12, 0.12), saturation * pale, (value + lift) % 1)


def render(
    rng: Rng, thing: list[PaintedPart], colours: tuple[Floats, Floats], light: Points
) -> Layer:
    """The thing in its own layer, each part rounded by its shading."""
    west, north, east, south = extent(thing)
    # A margin of two pixels or more, so that every part's own window lies inside the layer.
    left, top = int(np.floor(west)) - 2, int(np.floor(north)) - 2
    size = (int(south) + 4 - top, int(east) + 4 - left)
    coat_hw3 = mix(*colours, _coat(rng, size).clip(0, 1))
    colour_hw3, alpha_hw = (np.zeros(shape, dtype=np.float32) for shape in ((*size, 3), size))
    shade_hw = np.ones(size, dtype=np.float32)
    for part in thing:
        outline_P2 = part.outline_P2 - (left, top)
        (x0, y0), (x1, y1) = outline_P2.min(0).astype(int) - 1, outline_P2.max(0).astype(int) + 2
        spot = np.s_[y0:y1, x0:x1]
        cover_hw = _coverage(outline_P2 - (x0, y0), (y1 - y0, x1 - x0))
        if not part.printed:
            shade_hw[spot] += cover_hw * (_relief(cover_hw, light) - shade_hw[spot])
        dim = 0.6 if part.paint == "far" else 1
        plain = part.paint in _PAINTS
        colour = rgb(_PAINTS[part.paint]) if plain else np.float32(dim) * coat_hw3[spot]
        lit = colour * shade_hw[spot][..., None]
        colour_hw3[spot] += cover_hw[..., None] * (lit - colour_hw3[spot])
        alpha_hw[spot] += cover_hw * (1 - alpha_hw[spot])
    return Layer(colour_hw3, alpha_hw, left, top)


def cast_shadow(canvas_HW3: Floats, layer: Layer, horizon: int, light: Points) -> None:
    """Darken the ground where the layer's silhouette falls, laid down away from the light."""
    height, width = canvas_HW3.shape[:2]
    rows, columns = layer.alpha_hw.shape
    foot, slant = layer.top + rows - 4, 2.8 * float(light[0])
    # From a pixel of the shadow (at a quarter of the size, as it is soft anyway) to one of the
    # silhouette, which is four times as tall and sheared more the farther from the foot.
    upright = (4, -4 * slant, slant * foot - layer.left, 0, 16, -3 * foot - layer.top)
    silhouette = Image.fromarray((layer.alpha_hw * 255).astype(np.uint8))
    small = silhouette.transform(
        (width // 4 + 1, height // 4 + 1), Image.Transform.AFFINE, upright, _BILINEAR
    )
    middle, reach = (layer.left + columns / 2) / 4, columns / 10
    contact = (middle - reach, foot / 4 - reach / 6, middle + reach, foot / 4 + reach / 6)
    ImageDraw.Draw(small).ellipse(contact, fill=255)
    small = small.filter(ImageFilter.GaussianBlur(max(1, columns / 100)))
    shadow = np.asarray(small.resize((width, height), _BILINEAR), dtype=np.float32) / np.float32(
        255
    )
    ground = slice(max(horizon, 0), None)
    canvas_HW3[ground] *= 1 - np.float32(0.55) * shadow[ground, :, None]


def paste(canvas_HW3: Floats, owner_HW: NDArray[np.int_], layer: Layer, index: int) -> None:
    """Lay the object over the scenery; a pixel is its own where it covers at least half of it."""
    height, width = owner_HW.shape
    rows, columns = layer.alpha_hw.shape
    x0, x1 = max(layer.left, 0), min(layer.left + columns, width)
    y0, y1 = max(layer.top, 0), min(layer.top + rows, height)
    here, own = np.s_[y0:y1, x0:x1], np.s_[y0 - layer.top :, x0 - layer.left :]
    alpha_hw = layer.alpha_hw[own][: y1 - y0, : x1 - x0]
    colour_hw3 = layer.colour_hw3[own][: y1 - y0, : x1 - x0]
    canvas_HW3[here] = canvas_HW3[here] * (1 - alpha_hw[..., None]) + colour_hw3
    owner_HW[here][alpha_hw >= 0.5] = index


def through_lens(rng: Rng, canvas_HW3: Floats) -> NDArray[np.uint8]:
    """The light on the sensor: colour cast, exposure, vignette, blur, noise; then bytes."""
    height, width = canvas_HW3.shape[:2]
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = (1 - rng.uniform(0.05, 0.3) * (x**2 + y**2) / 2).astype(np.float32)
    cast = (rng.uniform(0.85, 1.15) * rng.uniform(0.94, 1.06, 3)).astype(np.float32)
    picture = blur(canvas_HW3 * vignette[..., None] * cast, rng.uniform(0.25, 0.5))
    grain = rng.uniform(0.004, 0.015) * rng.standard_normal((height, width, 1), dtype=np.float32)
    return ((picture + grain).clip(0, 1) * 255).round().astype(np.uint8)


def _coat(rng: Rng, size: tuple[int, int]) -> Floats:
    """How much of the second colour each pixel of an object's coat shows, in about [0, 1]."""
    unit = max(size)
    rough = 0.16 * noise(rng, size, (unit / 24, unit / 24), 3, 0.8)
    style = str(rng.choice(["plain", "plain", "stripes", "spots", "patches", "mottled"]))
    if style == "plain":
        return rough + np.float32(0.15)
    if style == "stripes":
        turn, many = rng.uniform(0, np.pi), rng.uniform(5, 13)
        rows, columns = np.ogrid[: size[0], : size[1]]
        along = ((np.cos(turn) * columns + np.sin(turn) * rows) / unit).astype(np.float32)
        waver = 1.5 * noise(rng, size, (unit / 3, unit / 3), 2)
        return rough + step(np.sin(np.float32(2 * np.pi * many) * along + waver), -0.3, 0.3)
    cell = unit / rng.uniform(*{"spots": (7, 14), "patches": (2.5, 4), "mottled": (8, 16)}[style])
    if style == "mottled":
        return rough + np.float32(0.5) + 0.7 * noise(rng, size, (cell, cell), 4, 0.5)
    return rough + step(noise(rng, size, (cell, cell), 2, 0.5), 0.15, 0.3)


def _coverage(outline_P2: Points, size: tuple[int, ...]) -> Floats:
    """``(h, w)`` share of each pixel inside the outline, from four samples a pixel."""
    raster = Image.new("L", (size[1] * 2, size[0] * 2))
    ImageDraw.Draw(raster).polygon([(float(x), float(y)) for x, y in outline_P2 * 2], fill=255)
    return np.asarray(raster.reduce(2), dtype=np.float32) / np.float32(255)


def _relief(alpha_hw: Floats, light: Points) -> Floats:
    """Light on the outline blown up like a cushion: 0.4 on its dark side, 1.4 at a highlight."""
    height, width = alpha_hw.shape
    shrink = min(1, 64 / max(height, width))
    small = resize(np.pad(alpha_hw, 2), max(4, int(height * shrink)), max(4, int(width * shrink)))
    deep = ndimage.distance_transform_edt(small > 0.5)
    radius = deep.max() + 1e-3
    bulge = ndimage.gaussian_filter(np.sqrt(deep * (2 * radius - deep)), 1 + radius / 12)
    slope_y, slope_x = np.gradient(bulge)
    facing = light[2] - slope_x * light[0] - slope_y * light[1]
    steepness = np.sqrt((1 + slope_x**2 + slope_y**2) * (light @ light))
    lit = (facing / steepness).clip(0, 1)
    shade = 0.42 + 0.7 * lit + 0.35 * lit**16
    return resize(shade.astype(np.float32), height + 4, width + 4)[2:-2, 2:-2]
