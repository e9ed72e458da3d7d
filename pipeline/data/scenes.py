"""Procedural scenes that look a little like photographs, with exact boxes and masks.

They are the sample collection of ``make demo`` and endless training images for small models. A
scene is a ground in perspective below a sky or a wall, one dominant object off the centre, perhaps
one or two smaller ones, and one light. Everything follows from the seed. A box is drawn around the
pixels of its object that are visible, so the labels are exact by construction.

To add a kind of object: write a function beside ``_ball`` that returns parts in painter's order
(any unit, y downwards, the feet lowest) and name it in ``_KINDS``. To add a ground: a line in
``_GROUNDS``.

Shape letters:  H, W image   N objects   P points of an outline   h, w an object's own layer
"""

import colorsys
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from pipeline.boxes import as_boxes, xyxy_to_xywh
from pipeline.errors import ConfigError, StorageError
from pipeline.storage import Location

ANNOTATIONS_NAME = "instances.json"
MIN_SIDE = 64
MAX_OBJECTS = 6
SIZES = ((500, 375), (375, 500), (480, 360), (400, 400), (500, 333), (360, 480), (640, 426))
"""(width, height), mixed as in VOC and COCO."""

Floats = NDArray[np.float32]
Points = NDArray[np.float64]
Rng = np.random.Generator
_BILINEAR = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Scene:
    """One picture and all there is to know about it; the main object comes first."""

    pixels_HW3: NDArray[np.uint8]
    boxes_N4: NDArray[np.float64]
    """xyxy pixels, tight around the visible part, x1 and y1 exclusive."""
    masks_NHW: NDArray[np.bool_]
    """Visible pixels; no pixel belongs to two objects."""
    category_N: tuple[str, ...]


def make_scene(seed: int, *, width: int, height: int, num_objects: int | None = None) -> Scene:
    """The scene of this seed, the same on every machine but for rounding in a pixel's last bit.

    Args:
        seed: an integer from 0.
        width: pixels, at least 64.
        height: pixels, at least 64.
        num_objects: 1 to 6; None for mostly one, at times two or three.

    Raises:
        ConfigError: the seed, a side or the number of objects is outside its range.
    """
    _check(seed, [(width, height)])
    if num_objects is not None and not 1 <= num_objects <= MAX_OBJECTS:
        raise ConfigError(f"num_objects must be in [1, {MAX_OBJECTS}], got {num_objects}")
    rng = np.random.default_rng(seed)
    count = num_objects or int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
    ground = str(rng.choice(list(_GROUNDS)))
    canvas_HW3, horizon = _backdrop(rng, (height, width), ground)
    kinds = [str(kind) for kind in rng.choice(list(_KINDS), count)]
    things = _arrange(rng, [_KINDS[kind](rng) for kind in kinds], (height, width), horizon)
    light = np.array([rng.choice([-1, 1]) * rng.uniform(0.35, 0.9), -rng.uniform(0.5, 1), 0.8])
    owner_HW = np.full((height, width), -1)
    # From the back to the front: what stands lower in the picture is nearer.
    for index in sorted(range(count), key=lambda index: _extent(things[index])[3]):
        colours = _contrasting(rng, canvas_HW3, things[index], kinds[index])
        layer = _render(rng, things[index], colours, light)
        _cast_shadow(canvas_HW3, layer, horizon, light)
        _paste(canvas_HW3, owner_HW, layer, index)
    masks_NHW = owner_HW == np.arange(count)[:, None, None]
    boxes_N4 = as_boxes([_tight_box(mask_HW) for mask_HW in masks_NHW])
    return Scene(_through_lens(rng, canvas_HW3), boxes_N4, masks_NHW, tuple(kinds))


def write_collection(
    folder: Path, *, num_scenes: int, seed: int, sizes: Sequence[tuple[int, int]] = SIZES
) -> Path:
    """The path of a new COCO file beside ``images/{landscape,portrait,square}/scene_00000.jpg``.

    ``file_name`` is relative to ``folder/images``; boxes are xywh, segmentations uncompressed RLE.
    The COCO file is written last, so where it is, the collection is whole.

    Raises:
        ConfigError: the number of scenes, the seed or a size is outside its range.
        StorageError: the folder is not empty or cannot be written.
    """
    _check(seed, sizes)
    if num_scenes < 1:
        raise ConfigError(f"num_scenes must be at least 1, got {num_scenes}")
    root = Location.parse(str(folder))
    if not root.is_empty():
        raise StorageError(f"{root} is not empty; name a new folder or delete this one first")
    coco: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    coco["categories"] = [{"id": place, "name": kind} for place, kind in enumerate(_KINDS, 1)]
    for index in range(num_scenes):
        width, height = sizes[index % len(sizes)]
        # Children of one seed: collections of neighbouring seeds share no scene.
        child = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
        scene = make_scene(child, width=width, height=height)
        form = ("portrait", "square", "landscape")[int(np.sign(width - height)) + 1]
        name = f"{form}/scene_{index:05d}.jpg"
        root.child("images").child(name).write_bytes(_jpeg(scene.pixels_HW3))
        image = {"id": index + 1, "file_name": name, "width": width, "height": height}
        coco["images"].append(image)
        coco["annotations"] += _annotations(scene, index + 1, len(coco["annotations"]) + 1)
    root.child(ANNOTATIONS_NAME).write_bytes((json.dumps(coco) + "\n").encode())
    return Path(root.path) / ANNOTATIONS_NAME


def _check(seed: int, sizes: Sequence[tuple[int, int]]) -> None:
    if seed < 0:
        raise ConfigError(f"seed must be an integer from 0, got {seed}")
    if not sizes:
        raise ConfigError("sizes must name at least one (width, height), got none")
    for width, height in sizes:
        if min(width, height) < MIN_SIDE:
            raise ConfigError(f"width and height must be at least {MIN_SIDE}, got {width}x{height}")


def _jpeg(pixels_HW3: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_HW3).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO's records of the scene's objects."""
    kinds = list(_KINDS)
    return [
        {
            "id": first_id + place,
            "image_id": image_id,
            "category_id": kinds.index(kind) + 1,
            "bbox": xyxy_to_xywh(box)[0].tolist(),
            "area": int(mask_HW.sum()),
            "segmentation": {"size": list(mask_HW.shape), "counts": _run_lengths(mask_HW)},
            "iscrowd": 0,
        }
        for place, (kind, box, mask_HW) in enumerate(
            zip(scene.category_N, scene.boxes_N4, scene.masks_NHW, strict=True)
        )
    ]


def _run_lengths(mask_HW: NDArray[np.bool_]) -> list[int]:
    """COCO's runs down the columns; the first one counts background."""
    flat = np.concatenate([[False], mask_HW.ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(run) for run in np.diff(edges, prepend=0, append=mask_HW.size)]


def _tight_box(mask_HW: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# ------------------------------------------------------------------ noise and colour


def _resize(field: Floats, height: int, width: int) -> Floats:
    """The field at another size, bicubic."""
    return np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC))


def _noise(
    rng: Rng, size: tuple[int, int], cell: tuple[float, float], octaves: int = 4, gain: float = 0.55
) -> Floats:
    """``(H, W)`` smooth noise, mostly in [-1, 1]; ``cell`` is the coarsest (height, width), px."""
    total = np.zeros(size, dtype=np.float32)
    for octave in range(octaves):
        rows, columns = (
            int(side / max(step / 2**octave, 1)) + 2 for side, step in zip(size, cell, strict=True)
        )
        grid = rng.uniform(-1, 1, (min(rows, size[0]), min(columns, size[1]))).astype(np.float32)
        total += np.float32(gain**octave) * _resize(grid, *size)
    return total * np.float32(1.6 * (1 - gain) / (1 - gain**octaves))


def _seamless(field: Floats, seam: int = 64) -> Floats:
    """The field less ``seam`` rows and columns, repeating without an edge."""
    fade = np.linspace(0, 1, seam, dtype=np.float32)[:, None]
    for _ in range(2):
        start, end = field[:seam], field[-seam:]
        field = np.concatenate([end + fade * (start - end), field[seam:-seam]]).T
    return field


def _step(field: Floats, low: float, high: float) -> Floats:
    """0 below ``low``, 1 above ``high``, smooth between."""
    ramp = ((field - low) / (high - low)).clip(0, 1)
    return np.asarray(ramp * ramp * (3 - 2 * ramp), dtype=np.float32)


def _hsv(hue: float, saturation: float, value: float) -> Floats:
    """``(3,)`` RGB of the colour; the hue may be any number, a whole turn is 1."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)


def _mix(low: ArrayLike, high: ArrayLike, weight: Floats) -> Floats:
    """Between the two colours (or pictures), ``weight`` of the second at each pixel."""
    start = np.asarray(low, dtype=np.float32)
    return start + weight[..., None] * (np.asarray(high, dtype=np.float32) - start)


def _rgb(code: str) -> Floats:
    """``(3,)`` RGB of six hex digits."""
    return np.array(list(bytes.fromhex(code)), dtype=np.float32) / np.float32(255)


# ------------------------------------------------------------------ the backdrop

# name: (dark, light, cell of its texture (depth, across) in px, contrast, pattern)
_GROUNDS: dict[str, tuple[str, str, tuple[float, float], float, str]] = {
    "grass": ("2f4d1c", "93ad4e", (30, 8), 1.1, ""),
    "meadow": ("6d5a2c", "d3bd74", (40, 9), 1.0, ""),
    "sand": ("a98a5c", "ead3a6", (14, 40), 0.7, ""),
    "snow": ("b4c2d6", "fafcff", (40, 60), 0.8, ""),
    "water": ("1f4a63", "8db6c4", (9, 70), 1.1, ""),
    "asphalt": ("4a4a4e", "908e8a", (6, 6), 0.6, ""),
    "soil": ("46301f", "937050", (16, 16), 1.0, ""),
    "boards": ("6b4526", "c19462", (120, 8), 0.5, "boards"),
    "tiles": ("938b80", "dcd5c9", (30, 30), 0.3, "tiles"),
    "rug": ("6e3038", "c4a184", (6, 6), 0.4, "stripes"),
    "cloth": ("44607c", "e9e6dc", (6, 6), 0.3, "checks"),
}
_INDOORS = ("boards", "tiles", "rug", "cloth")
_SKIES = (("3f78c0", "cfe2f0"), ("8fa5b8", "e6e8e8"), ("5f6f9c", "f2c39a"), ("6fb0dc", "f4f1e2"))


def _backdrop(rng: Rng, size: tuple[int, int], ground: str) -> tuple[Floats, int]:
    """The ``(H, W, 3)`` scenery without objects, and its horizon's row (maybe above the top)."""
    height, width = size
    # Two in five look down onto the ground: the horizon lies above the picture.
    share = -rng.uniform(0.4, 1.5) if rng.random() < 0.4 else rng.uniform(0.15, 0.45)
    horizon = int(share * height)
    canvas_HW3 = np.zeros((height, width, 3), dtype=np.float32)
    if horizon > 0:
        behind = _wall if ground in _INDOORS else _sky
        canvas_HW3[:horizon] = behind(rng, (horizon, width))
    canvas_HW3[max(horizon, 0) :] = _plane(rng, size, horizon, ground)
    far = np.linspace(1, 0.1, height, dtype=np.float32)[:, None]
    # Depth of field: the far end is softer than what lies at our feet.
    soft = _blur(canvas_HW3, rng.uniform(0.6, 1.8) * min(size) / 360)
    level, down = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    turn = rng.uniform(0, np.pi)
    light = (1 + 0.15 * (np.cos(turn) * level + np.sin(turn) * down)).astype(np.float32)
    return _mix(canvas_HW3, soft, far) * light[..., None], horizon


def _blur(picture_HW3: Floats, radius: float) -> Floats:
    """The picture softened by a Gaussian of ``radius`` pixels; values are cut to [0, 1]."""
    image = Image.fromarray((picture_HW3.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(
        image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32
    ) / np.float32(255)


def _sky(rng: Rng, size: tuple[int, int]) -> Floats:
    height, width = size
    top, bottom = (_rgb(code) for code in _SKIES[rng.integers(len(_SKIES))])
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    sky = _mix(top, bottom, np.broadcast_to(down, size))
    clouds = _noise(rng, size, (height / 2, width / 2.5), 5)
    sky = _mix(sky, 0.35 * bottom + 0.65, 0.8 * _step(clouds, 0.05, 0.9))
    # Far hills, then a line of trees: nearer is rougher and less pale.
    for haze, octaves, cell in ((0.55, 3, width / 2), (0.1, 7, width / 4)):
        if rng.random() < 0.7:
            profile = _noise(rng, (1, width), (1, cell), octaves)
            crest = height * (1 - rng.uniform(0.1, 0.3) - 0.22 * profile)
            inside = _step(np.arange(height, dtype=np.float32)[:, None] - crest, -1, 1)
            leaves = 0.5 + 0.5 * _noise(rng, size, (width / 20, width / 20))
            land = _mix(_rgb("1d3320"), _rgb("6f8a52"), leaves)
            sky = _mix(sky, land + haze * (bottom - land), inside)
    return sky


def _wall(rng: Rng, size: tuple[int, int]) -> Floats:
    height, width = size
    paint = _hsv(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.45, 0.9))
    plaster = 0.06 * _noise(rng, size, (width / 4, width / 4), 6, 0.8)
    wall: Floats = paint * (1 + plaster[..., None])
    for _ in range(rng.integers(0, 4)):  # pictures, windows, shelves
        x, y = (rng.uniform(0, (width, height * 0.7))).astype(int)
        wide, tall = (rng.uniform((0.1, 0.2), (0.3, 0.6)) * (width, height)).astype(int)
        frame = np.s_[y : y + tall, x : x + wide]
        wall[frame] = 0.4 * wall[frame] + 0.45 * _hsv(rng.random(), 0.4, rng.random())
    skirting = max(2, height // 14)
    wall[-skirting:] = 0.3 * wall[-1:] + rng.uniform(0.1, 0.6)
    return wall


def _plane(rng: Rng, size: tuple[int, int], horizon: int, ground: str) -> Floats:
    """The ground from the horizon (or the top) down, its texture shrinking with distance."""
    height, width = size
    dark, light, cell, contrast, pattern = _GROUNDS[ground]
    unit = min(size)
    first = max(horizon, 0)
    near = np.linspace((first - horizon) / (height - horizon), 1, height - first)[:, None]
    depth = 1 / (0.93 * near + 0.07)
    eye = width * rng.uniform(0.2, 0.8)
    across = ((np.arange(width) - eye) / unit * depth).astype(np.float32)
    along = np.repeat(depth * (height - horizon) / unit, width, axis=1).astype(np.float32)
    # The tile measures 256 texels, the short side of the picture 320 of them at our feet.
    tile = _seamless(_noise(rng, (320, 320), cell, 5, 0.75))
    row, column = ((320 * place).astype(np.intp) & 255 for place in (along, across))
    texture = tile[row, column]
    # Fine texture averages out with distance; broad variation stays.
    weight = 0.5 + contrast * 0.5 * texture * (1.5 * near).clip(0.2, 1).astype(np.float32)
    weight += 0.3 * _noise(rng, across.shape, (unit / 4, unit / 1.5), 3)
    weight += _PATTERNS[pattern](across, along)
    # Rugs and cloths are dyed: their colours change places.
    dye = rng.permutation(3) if pattern in ("stripes", "checks") else np.arange(3)
    plane = _mix(_rgb(dark)[dye], _rgb(light)[dye], weight)
    # Patches of something else lie about: moss, leaves, stains, all near the ground's own hue.
    hue, saturation, value = colorsys.rgb_to_hsv(*plane.reshape(-1, 3).mean(0).clip(0, 1).tolist())
    tint = _hsv(hue + rng.normal(0, 0.08), min(1, saturation + 0.15), value * rng.uniform(0.4, 1.3))
    litter = _noise(rng, across.shape, (unit / 12, unit / 5), 4)
    return _mix(plane, tint * (0.8 + 0.4 * texture[..., None]), 0.7 * _step(litter, 0.55, 0.8))


def _checks(across: Floats, along: Floats) -> Floats:
    return np.float32(0.25) * (np.sign(np.sin(across * 40)) + np.sign(np.sin(along * 40)))


def _boards(across: Floats, along: Floats) -> Floats:
    board = across * 7
    gap = (board % 1 < 0.06).astype(np.float32)
    tone: Floats = np.sin(7 * np.floor(board))
    return np.float32(0.35) * tone - np.float32(0.6) * gap


def _tiles(across: Floats, along: Floats) -> Floats:
    grout = (across * 5 % 1 < 0.05) | (along * 5 % 1 < 0.05)
    return np.float32(0.5) * grout.astype(np.float32)


def _stripes(across: Floats, along: Floats) -> Floats:
    bands: Floats = np.float32(0.3) * np.sign(np.sin(along * 30))
    broad: Floats = np.float32(0.2) * np.sin(along * 7)
    return bands + broad


_PATTERNS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "": lambda across, along: np.zeros_like(across),
    "boards": _boards,
    "checks": _checks,
    "stripes": _stripes,
    "tiles": _tiles,
}


# ------------------------------------------------------------------ objects


@dataclass(frozen=True)
class _Part:
    """One painted outline of an object."""

    outline_P2: Points
    paint: str = "coat"
    """"coat" or its darker "far" (patterned), or a plain colour of ``_PAINTS``."""
    printed: bool = False
    """Lies flat on the parts beneath and takes their shading; others are rounded by their own."""


@dataclass(frozen=True)
class _Layer:
    """An object alone: premultiplied colour, coverage, and where its top left corner goes."""

    colour_hw3: Floats
    alpha_hw: Floats
    left: int
    top: int


def _oval(x: float, y: float, radius_x: float, radius_y: float, tilt: float = 0) -> Points:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    across, down = radius_x * np.cos(turn), radius_y * np.sin(turn)
    level = x + across * np.cos(tilt) - down * np.sin(tilt)
    return np.stack([level, y + across * np.sin(tilt) + down * np.cos(tilt)], axis=1)


def _limb(
    start: tuple[float, float], end: tuple[float, float], wide: float, narrow: float
) -> Points:
    """A tapering capsule: a leg, a neck, a trunk."""
    turn = np.arctan2(end[1] - start[1], end[0] - start[0]) + np.linspace(-np.pi / 2, np.pi / 2, 9)
    cap = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return np.concatenate([np.array(end) + narrow * cap, np.array(start) - wide * cap])


def _outline(*corners: tuple[float, float], rounds: int = 0) -> Points:
    """The polygon, its corners cut ``rounds`` times (Chaikin): 3 make it smooth."""
    points = np.array(corners, dtype=np.float64)
    for _ in range(rounds):
        after = np.roll(points, -1, axis=0)
        cut = [0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after]
        points = np.stack(cut, axis=1).reshape(-1, 2)
    return points


def _round_body(radius_P: Points, stretch: tuple[float, float]) -> Points:
    """The outline at these distances from the middle, clockwise from the right."""
    turn = np.linspace(0, 2 * np.pi, len(radius_P), endpoint=False)
    return np.stack([radius_P * np.cos(turn), radius_P * np.sin(turn)], axis=1) * stretch


def _blob(rng: Rng) -> list[_Part]:
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    radius = np.ones(96)
    for order in range(2, 6):
        radius += rng.normal(0, 0.22 / order) * np.cos(order * turn + rng.uniform(0, 7))
    return [_Part(_round_body(radius, (rng.uniform(0.8, 1.5), 1)))]


def _ball(rng: Rng) -> list[_Part]:
    panel, turn = rng.uniform(0.2, 0.34), rng.uniform(0, 7)
    skin = str(rng.choice(["coat", "cream"]))
    middle = _oval(0.1 * np.cos(turn), 0.1 * np.sin(turn), panel, panel)
    rim = [
        _oval(0.76 * np.cos(angle), 0.76 * np.sin(angle), panel * 0.55, panel * 0.9, angle)
        for angle in turn + np.arange(5) * 0.4 * np.pi
    ]
    return [_Part(_oval(0, 0, 1, 1), skin), *(_Part(spot, "far", True) for spot in (middle, *rim))]


def _beetle(rng: Rng) -> list[_Part]:
    broad, head = rng.uniform(0.65, 0.85), rng.uniform(0.25, 0.35)
    legs = [
        _Part(_limb((x * 0.5, y * 0.5), (x, y), 0.07, 0.04), "dark")
        for x in (-0.55, 0.05, 0.6)
        for y in (-broad - 0.25, broad + 0.25)
    ]
    feelers = [_Part(_limb((1, y / 3), (1.5, y), 0.04, 0.03), "dark") for y in (-0.4, 0.4)]
    body = [_Part(_oval(0.95, 0, head, head * 1.5), "dark"), _Part(_oval(0, 0, 1, broad))]
    seam = _Part(_limb((-0.98, 0), (0.8, 0), 0.025, 0.025), "dark", True)
    corners = np.array([(x, y) for x in (-1, 0.2, 1) for y in (-broad, broad)])
    places = rng.uniform(0.2, 0.6, (6, 2)) * corners
    spots = [_Part(_oval(x, y, 0.15, 0.13), "dark", True) for x, y in places]
    return [*legs, *feelers, *body, seam, *spots]


def _house(rng: Rng) -> list[_Part]:
    wide, tall, roof, deep = rng.uniform((0.9, 0.8, 0.5, 0.4), (1.5, 1.3, 1.0, 1.2)).tolist()
    middle, top, eaves, back = wide / 2, -tall - roof, 0.05 - tall, wide + deep
    front = _outline((0, 0), (wide, 0), (wide, -tall), (middle, top + 0.05), (0, -tall))
    side = _outline((wide, 0), (back, -0.12), (back, -tall), (wide, -tall))
    over = 0.08 * wide
    slope = _outline(
        (middle, top), (middle + deep, top), (back + over, eaves), (wide + over, eaves)
    )
    gable = _outline((-over, eaves), (middle, top), (middle, top + 0.16), (0, eaves + 0.07))
    pane = _outline((0, 0), (0.24 * wide, 0), (0.24 * wide, -0.26 * tall), (0, -0.26 * tall))
    windows = [np.add(pane, (x * wide, y * tall)) for x, y in ((0.58, -0.4), (0.38, -0.92))]
    windows.append(pane * (deep / wide, 1) + (wide + 0.35 * deep, -0.45 * tall))
    return [
        _Part(side, "far", True),
        _Part(front, "coat", True),
        _Part(slope, "brick"),
        _Part(gable, "brick", True),
        _Part(pane * (1.1, 2.1) + (0.12 * wide, 0), "wood", True),
        *(_Part(window, "glass", True) for window in windows),
    ]


def _flower(rng: Rng) -> list[_Part]:
    count, broad, heart = int(rng.integers(6, 14)), rng.uniform(0.16, 0.3), rng.uniform(0.22, 0.4)
    stem, bend = rng.uniform(1.3, 2.2), rng.uniform(-0.3, 0.3)
    parts = [_Part(_limb((0, 0), (bend, stem), 0.06, 0.08), "fern")]
    for side in (-1, 1):
        leaf = _oval(bend * 0.7 + side * 0.4, stem * rng.uniform(0.6, 0.8), 0.42, 0.13, -0.5 * side)
        parts.append(_Part(leaf, "leaf"))
    for turn in rng.permutation(count) * 2 * np.pi / count:
        parts.append(_Part(_oval(0.6 * np.cos(turn), 0.6 * np.sin(turn), 0.42, broad, turn)))
    return [*parts, _Part(_oval(0, 0, heart, heart), str(rng.choice(["beak", "dark", "wood"])))]


def _fruit(rng: Rng) -> list[_Part]:
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    # A dent below the stalk, as apples have, and the narrow shoulders of a pear.
    dent = 1 - rng.uniform(0, 0.25) * np.exp(-(((turn - 1.5 * np.pi) / 0.5) ** 2))
    shoulders = 1 + rng.uniform(-0.1, 0.4) * np.sin(turn)
    body = _round_body(dent, (1, rng.uniform(0.85, 1.25)))
    body[:, 0] *= shoulders
    top, lean = float(body[72, 1]), rng.uniform(-0.3, 0.3)
    leaf = [(0, top - 0.1), (0.3, top - 0.45), (0.8, top - 0.4), (0.5, top - 0.1)]
    stalk = _limb((0, top + 0.1), (lean, top - 0.4), 0.06, 0.05)
    return [_Part(stalk, "wood"), _Part(body), _Part(_outline(*leaf, rounds=3), "leaf")]


def _mushroom(rng: Rng) -> list[_Part]:
    cap, lean, tall = rng.uniform(0.6, 1.1), rng.uniform(-0.1, 0.1), rng.uniform(0.9, 1.5)
    brim = [(cap, -0.3), (cap, 0.3), (0, 0.15), (-cap, 0.3), (-cap, -0.3)]
    dome = _outline(*brim, (-cap / 2, -cap), (cap / 2, -cap), rounds=3)
    places = np.array([(-0.6, -0.1), (-0.2, -0.5), (0.1, -0.1), (0.35, -0.6), (0.7, -0.2)])
    places = cap * (places + rng.normal(0, 0.06, (5, 2))) - (0, 0.1 * cap)
    spots = [_Part(_oval(x, y, cap * 0.13, cap * 0.1), "cream", True) for x, y in places]
    return [
        _Part(_limb((0, 0.2), (lean, tall), cap * 0.3, cap * 0.38), "cream"),
        _Part(dome),
        *spots,
    ]


def _plant(rng: Rng) -> list[_Part]:
    fan = np.linspace(-1.2, 1.2, int(rng.integers(5, 10))) + rng.normal(0, 0.1)
    leaves = []
    for turn in rng.permutation(fan):
        reach, broad = rng.uniform(0.9, 1.7) / 2, rng.uniform(0.12, 0.25)
        leaf = _oval(reach * np.sin(turn), -reach * np.cos(turn), reach, broad, turn - np.pi / 2)
        leaves.append(_Part(leaf, str(rng.choice(["leaf", "fern"]))))
    rim = rng.uniform(0.45, 0.7)
    pot = _outline((-rim, -0.1), (rim, -0.1), (rim * 0.7, 0.9), (-rim * 0.7, 0.9), rounds=1)
    return [*leaves, _Part(pot)]


def _creature(rng: Rng) -> list[_Part]:
    long, deep, leg = rng.uniform(0.6, 1.1), rng.uniform(0.28, 0.45), rng.uniform(0.4, 1.0)
    head, thin = rng.uniform(0.2, 0.32), rng.uniform(0.07, 0.13)
    x, y = long + rng.uniform(0.05, 0.35), -deep - rng.uniform(0, 0.6)
    tail = (-long - rng.uniform(0.2, 0.6), rng.uniform(-0.8, 0.5))
    chest = [(-long, -deep), (long, -deep), (long * 1.15, deep), (-long * 1.1, deep)]
    ear = np.array([(-0.16, -0.5), (-0.12, -1.5), (0.4, -0.7)]) * head
    return [
        _Part(_limb((-long, -deep / 2), tail, 0.09, 0.04), "far"),
        *_legs(rng, (0.13 - long * 0.8, 0.13 + long * 0.75), deep + leg, thin, "far"),
        _Part(_outline(*chest, rounds=3)),
        *_legs(rng, (-long * 0.8, long * 0.75), deep + leg, thin, "coat"),
        _Part(_limb((long * 0.85, -deep * 0.2), (x, y), deep * 0.7, head * 0.6)),
        _Part(np.add(ear, (x + 0.1, y)), "far"),
        _Part(_oval(x, y, head * 1.1, head * 0.9, 0.3)),
        _Part(_oval(x + head, y + head * 0.45, head * 0.6, head * 0.45, 0.3), "cream"),
        _Part(np.add(ear, (x - 0.05, y))),
        _Part(_oval(x + head * 1.45, y + head * 0.4, head * 0.16, head * 0.14), "dark"),
        _Part(_oval(x + head * 0.45, y - head * 0.15, head * 0.15, head * 0.17), "dark"),
    ]


def _legs(rng: Rng, hips: tuple[float, float], foot: float, thin: float, paint: str) -> list[_Part]:
    """Two legs in step, each with its hoof."""
    stride = rng.uniform(-0.15, 0.15)
    parts = []
    for hip in hips:
        parts.append(_Part(_limb((hip, 0), (hip + stride, foot), thin * 1.6, thin), paint))
        parts.append(_Part(_oval(hip + stride + 0.03, foot, thin * 1.3, thin * 0.9), "dark"))
    return parts


def _bird(rng: Rng) -> list[_Part]:
    head, tail, leg = rng.uniform(0.25, 0.4), rng.uniform(0.4, 1.0), rng.uniform(0.3, 0.8)
    x, y = 0.75, -0.7 - rng.uniform(0, 0.3)
    body = [(-0.8, -0.3), (0, -0.6), (0.7, -0.7), (0.9, 0.1), (0.2, 0.6), (-0.6, 0.3)]
    wing = [(0.5, -0.4), (0.3, 0.3), (-0.5, 0.35), (-1.2, 0.15), (-0.4, -0.4)]
    fan = [(-0.5, -0.3), (-0.9 - tail, -0.1), (-0.85 - tail, 0.3), (-0.4, 0.2)]
    face = x + head * 0.7
    beak = [(face, y - 0.1), (face + head * 1.2, y + 0.08), (face, y + 0.16)]
    return [
        *(_Part(_limb((hip, 0.3), (hip, 0.5 + leg), 0.06, 0.04), "beak") for hip in (-0.1, 0.2)),
        _Part(_outline(*fan), "far"),
        _Part(_outline(*beak), "beak"),
        _Part(_outline(*body, rounds=3)),
        _Part(_limb((0.4, -0.25), (x, y), 0.3, head * 0.75)),
        _Part(_oval(x, y, head, head * 0.95)),
        _Part(_outline(*wing, rounds=3), "far"),
        _Part(_oval(x + head * 0.35, y - head * 0.2, head * 0.17, head * 0.17), "dark"),
    ]


def _vehicle(rng: Rng) -> list[_Part]:
    long, roof, wheel = rng.uniform(1.2, 1.8), rng.uniform(0.5, 0.9), rng.uniform(0.26, 0.36)
    back, front = -long * rng.uniform(0.5, 0.95), long * rng.uniform(0.2, 0.6)
    body = [(-long, -0.25), (-long, 0.3), (long, 0.3), (long, -0.05), (long * 0.7, -0.25)]
    frame = [(back, -0.1), (back + 0.15, -roof), (front - 0.3, -roof), (front, -0.1)]
    cabin, left = _outline(*frame, rounds=1), (back + front) / 2 - 0.06
    panes = (cabin - cabin.mean(0)) * (0.85, 0.68) + cabin.mean(0)
    pillar = _outline((left, -roof * 0.9), (left + 0.1, -roof * 0.9), (left + 0.1, 0), (left, 0))
    parts = [_Part(cabin), _Part(panes, "glass"), _Part(pillar), _Part(_outline(*body, rounds=2))]
    for x in (-long * 0.6, long * 0.62):
        parts.append(_Part(_oval(x, 0.32, wheel, wheel), "dark"))
        parts.append(_Part(_oval(x, 0.32, wheel / 2, wheel / 2), "metal"))
    return [*parts, _Part(_oval(long * 0.93, 0.02, 0.08, 0.08), "cream")]


_KINDS: dict[str, Callable[[Rng], list[_Part]]] = {
    "ball": _ball,
    "beetle": _beetle,
    "bird": _bird,
    "blob": _blob,
    "creature": _creature,
    "flower": _flower,
    "fruit": _fruit,
    "house": _house,
    "mushroom": _mushroom,
    "plant": _plant,
    "vehicle": _vehicle,
}
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


def _extent(parts: Sequence[_Part]) -> tuple[float, float, float, float]:
    """The box around all parts, ``x0 y0 x1 y1``."""
    points = np.concatenate([part.outline_P2 for part in parts])
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    return x0, y0, x1, y1


def _arrange(
    rng: Rng, things: list[list[_Part]], size: tuple[int, int], horizon: int
) -> list[list[_Part]]:
    """The things in pixels: the first one big and off the centre, the others clear of it."""
    placed: list[list[_Part]] = []
    # At least about 14 pixels a side, also in a thumbnail.
    least = 200 / (size[0] * size[1])
    for thing in things:
        low, high = (0.09, 0.42) if not placed else (max(0.015, least), max(0.07, least))
        share = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        turned = _moved(thing, (float(rng.choice([-1, 1])), 1))
        spots: list[tuple[float, list[_Part]]] = []
        for _ in range(40):
            spot = _stand(rng, turned, size, (share, horizon))
            spots.append((max((_overlap(spot, other) for other in placed), default=0.0), spot))
            if spots[-1][0] < 0.12:
                break
            share = max(least, share * 0.96)
        placed.append(min(spots, key=lambda scored: scored[0])[1])
    return placed


def _stand(
    rng: Rng, thing: list[_Part], size: tuple[int, int], plan: tuple[float, int]
) -> list[_Part]:
    """The thing at a random place on the ground, its box covering about the planned share."""
    (height, width), (share, horizon) = size, plan
    x0, y0, x1, y1 = _extent(thing)
    wide, tall = x1 - x0, y1 - y0
    wanted = float(np.sqrt(share * height * width / (wide * tall)))
    scale = min(wanted, 0.92 * width / wide, 0.92 * height / tall)
    side = rng.choice([-1, 1]) * rng.uniform(0.35, 1.06)
    left = (width - wide * scale) * (1 + side) / 2
    highest = max(horizon + 0.06 * height, tall * scale)
    foot = rng.uniform(min(highest, 0.99 * height), 0.99 * height)
    return _moved(thing, (scale, scale), (left - x0 * scale, foot - y1 * scale))


def _moved(
    thing: list[_Part], scale: tuple[float, float], shift: tuple[float, float] = (0, 0)
) -> list[_Part]:
    """The same parts, scaled about the origin and then shifted, (x, y) each."""
    return [replace(part, outline_P2=part.outline_P2 * scale + shift) for part in thing]


def _overlap(one: list[_Part], other: list[_Part]) -> float:
    """The two boxes' intersection as a share of the smaller one."""
    a, b = np.array(_extent(one)), np.array(_extent(other))
    common = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0).prod()
    return float(common / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()))


def _contrasting(
    rng: Rng, canvas_HW3: Floats, thing: list[_Part], kind: str
) -> tuple[Floats, Floats]:
    """Two colours for a coat: most often those of a few that differ most from the ground there."""
    x0, y0, x1, y1 = (max(0, int(side)) for side in _extent(thing))
    around = canvas_HW3[y0:y1, x0:x1].reshape(-1, 3).mean(0)
    # One in seven takes what comes: at times only texture and shading set it apart.
    offers = 1 if rng.random() < 0.15 else 3
    if kind in _COATS:
        coats = [_rgb(str(code)) for code in rng.choice(_COATS[kind], offers, replace=False)]
    else:
        dyes = rng.uniform((0, 0.45, 0.35), (1, 0.9, 0.95), (offers, 3)).tolist()
        coats = [_hsv(*dye) for dye in dyes]
    first = max(coats, key=lambda coat: float(np.abs(coat - around).sum()))
    hue, saturation, value = colorsys.rgb_to_hsv(*first.tolist())
    pale, lift = rng.uniform((0.3, 0.3), (1, 0.7)).tolist()
    return first, _hsv(hue + rng.uniform(-0.12, 0.12), saturation * pale, (value + lift) % 1)


def _coat(rng: Rng, size: tuple[int, int]) -> Floats:
    """How much of the second colour each pixel of an object's coat shows, in about [0, 1]."""
    unit = max(size)
    rough = 0.16 * _noise(rng, size, (unit / 24, unit / 24), 3, 0.8)
    style = str(rng.choice(["plain", "plain", "stripes", "spots", "patches", "mottled"]))
    if style == "plain":
        return rough + np.float32(0.15)
    if style == "stripes":
        turn, many = rng.uniform(0, np.pi), rng.uniform(5, 13)
        rows, columns = np.ogrid[: size[0], : size[1]]
        along = ((np.cos(turn) * columns + np.sin(turn) * rows) / unit).astype(np.float32)
        waver = 1.5 * _noise(rng, size, (unit / 3, unit / 3), 2)
        return rough + _step(np.sin(np.float32(2 * np.pi * many) * along + waver), -0.3, 0.3)
    cell = unit / rng.uniform(*{"spots": (7, 14), "patches": (2.5, 4), "mottled": (8, 16)}[style])
    if style == "mottled":
        return rough + np.float32(0.5) + 0.7 * _noise(rng, size, (cell, cell), 4, 0.5)
    return rough + _step(_noise(rng, size, (cell, cell), 2, 0.5), 0.15, 0.3)


def _render(rng: Rng, thing: list[_Part], colours: tuple[Floats, Floats], light: Points) -> _Layer:
    """The thing in its own layer, each part rounded by its shading."""
    west, north, east, south = _extent(thing)
    # A margin of two pixels or more, so that every part's own window lies inside the layer.
    left, top = int(np.floor(west)) - 2, int(np.floor(north)) - 2
    size = (int(south) + 4 - top, int(east) + 4 - left)
    coat_hw3 = _mix(*colours, _coat(rng, size).clip(0, 1))
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
        colour = _rgb(_PAINTS[part.paint]) if plain else np.float32(dim) * coat_hw3[spot]
        lit = colour * shade_hw[spot][..., None]
        colour_hw3[spot] += cover_hw[..., None] * (lit - colour_hw3[spot])
        alpha_hw[spot] += cover_hw * (1 - alpha_hw[spot])
    return _Layer(colour_hw3, alpha_hw, left, top)


def _coverage(outline_P2: Points, size: tuple[int, ...]) -> Floats:
    """``(h, w)`` share of each pixel inside the outline, from four samples a pixel."""
    raster = Image.new("L", (size[1] * 2, size[0] * 2))
    ImageDraw.Draw(raster).polygon([(float(x), float(y)) for x, y in outline_P2 * 2], fill=255)
    return np.asarray(raster.reduce(2), dtype=np.float32) / np.float32(255)


def _relief(alpha_hw: Floats, light: Points) -> Floats:
    """Light on the outline blown up like a cushion: 0.4 on its dark side, 1.4 at a highlight."""
    height, width = alpha_hw.shape
    shrink = min(1, 64 / max(height, width))
    small = _resize(np.pad(alpha_hw, 2), max(4, int(height * shrink)), max(4, int(width * shrink)))
    deep = ndimage.distance_transform_edt(small > 0.5)
    radius = deep.max() + 1e-3
    bulge = ndimage.gaussian_filter(np.sqrt(deep * (2 * radius - deep)), 1 + radius / 12)
    slope_y, slope_x = np.gradient(bulge)
    facing = light[2] - slope_x * light[0] - slope_y * light[1]
    steepness = np.sqrt((1 + slope_x**2 + slope_y**2) * (light @ light))
    lit = (facing / steepness).clip(0, 1)
    shade = 0.42 + 0.7 * lit + 0.35 * lit**16
    return _resize(shade.astype(np.float32), height + 4, width + 4)[2:-2, 2:-2]


def _cast_shadow(canvas_HW3: Floats, layer: _Layer, horizon: int, light: Points) -> None:
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


def _paste(canvas_HW3: Floats, owner_HW: NDArray[np.int_], layer: _Layer, index: int) -> None:
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


def _through_lens(rng: Rng, canvas_HW3: Floats) -> NDArray[np.uint8]:
    """The light on the sensor: colour cast, exposure, vignette, blur, noise; then bytes."""
    height, width = canvas_HW3.shape[:2]
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = (1 - rng.uniform(0.05, 0.3) * (x**2 + y**2) / 2).astype(np.float32)
    cast = (rng.uniform(0.85, 1.15) * rng.uniform(0.94, 1.06, 3)).astype(np.float32)
    picture = _blur(canvas_HW3 * vignette[..., None] * cast, rng.uniform(0.25, 0.5))
    grain = rng.uniform(0.004, 0.015) * rng.standard_normal((height, width, 1), dtype=np.float32)
    return ((picture + grain).clip(0, 1) * 255).round().astype(np.uint8)
