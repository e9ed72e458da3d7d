"""What stands behind and below the objects, and the noise and colours that scenes are painted with.

A backdrop is a ground in perspective under a sky or a wall. Pictures are float32 in about [0, 1]; a
size is (height, width), a colour ``(3,)`` RGB.

To add a ground: a line in ``GROUNDS``; with a pattern of its own: a function in ``_PATTERNS``.

Shape letters:  H, W image
"""

import colorsys
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageFilter

Floats = NDArray[np.float32]


Points = NDArray[np.float64]


Rng = np.random.Generator


def noise(
    rng: Rng, size: tuple[int, int], cell: tuple[float, float], octaves: int = 4, gain: float = 0.55
) -> Floats:
    """``(H, W)`` smooth noise, mostly in [-1, 1]; ``cell`` is the coarsest (height, width), px."""
    total = np.zeros(size, dtype=np.float32)
    for octave in range(octaves):
        rows, columns = (
            int(side / max(step / 2**octave, 1)) + 2 for side, step in zip(size, cell, strict=True)
        )
        grid = rng.uniform(-1, 1, (min(rows, size[0]), min(columns, size[1]))).astype(np.float32)
        total += np.float32(gain**octave) * resize(grid, *size)
    return total * np.float32(1.6 * (1 - gain) / (1 - gain**octaves))


def seamless(field: Floats, seam: int = 64) -> Floats:
    """The field less ``seam`` rows and columns, repeating without an edge."""
    fade = np.linspace(0, 1, seam, dtype=np.float32)[:, None]
    for _ in range(2):
        start, end = field[:seam], field[-seam:]
        field = np.concatenate([end + fade * (start - end), field[seam:-seam]]).T
    return field


def step(field: Floats, low: float, high: float) -> Floats:
    """0 below ``low``, 1 above ``high``, smooth between."""
    ramp = ((field - low) / (high - low)).clip(0, 1)
    return np.asarray(ramp * ramp * (3 - 2 * ramp), dtype=np.float32)


def mix(low: ArrayLike, high: ArrayLike, weight: Floats) -> Floats:
    """Between the two colours (or pictures), ``weight`` of the second at each pixel."""
    start = np.asarray(low, dtype=np.float32)
    return start + weight[..., None] * (np.asarray(high, dtype=np.float32) - start)


def hsv(hue: float, saturation: float, value: float) -> Floats:
    """``(3,)`` RGB of the colour; the hue may be any number, a whole turn is 1."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)


def rgb(code: str) -> Floats:
    """``(3,)`` RGB of six hex digits."""
    return np.array(list(bytes.fromhex(code)), dtype=np.float32) / np.float32(255)


def blur(picture_HW3: Floats, radius: float) -> Floats:
    """The picture softened by a Gaussian of ``radius`` pixels; values are cut to [0, 1]."""
    image = Image.fromarray((picture_HW3.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(
        image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32
    ) / np.float32(255)


def resize(field: Floats, height: int, width: int) -> Floats:
    """The field at another size, bicubic."""
    return np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC))


# name: (dark, light, cell of its texture (depth, across) in px, contrast, pattern)
GROUNDS: dict[str, tuple[str, str, tuple[float, float], float, str]] = {
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


def backdrop(rng: Rng, size: tuple[int, int], ground: str) -> tuple[Floats, int]:
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
    soft = blur(canvas_HW3, rng.uniform(0.6, 1.8) * min(size) / 360)
    level, down = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    turn = rng.uniform(0, np.pi)
    light = (1 + 0.15 * (np.cos(turn) * level + np.sin(turn) * down)).astype(np.float32)
    return mix(canvas_HW3, soft, far) * light[..., None], horizon


def _sky(rng: Rng, size: tuple[int, int]) -> Floats:
    height, width = size
    top, bottom = (rgb(code) for code in _SKIES[rng.integers(len(_SKIES))])
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    sky = mix(top, bottom, np.broadcast_to(down, size))
    clouds = noise(rng, size, (height / 2, width / 2.5), 5)
    sky = mix(sky, 0.35 * bottom + 0.65, 0.8 * step(clouds, 0.05, 0.9))
    # Far hills, then a line of trees: nearer is rougher and less pale.
    for haze, octaves, cell in ((0.55, 3, width / 2), (0.1, 7, width / 4)):
        if rng.random() < 0.7:
            profile = noise(rng, (1, width), (1, cell), octaves)
            crest = height * (1 - rng.uniform(0.1, 0.3) - 0.22 * profile)
            inside = step(np.arange(height, dtype=np.float32)[:, None] - crest, -1, 1)
            leaves = 0.5 + 0.5 * noise(rng, size, (width / 20, width / 20))
            land = mix(rgb("1d3320"), rgb("6f8a52"), leaves)
            sky = mix(sky, land + haze * (bottom - land), inside)
    return sky


def _wall(rng: Rng, size: tuple[int, int]) -> Floats:
    height, width = size
    paint = hsv(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.45, 0.9))
    plaster = 0.06 * noise(rng, size, (width / 4, width / 4), 6, 0.8)
    wall: Floats = paint * (1 + plaster[..., None])
    for _ in range(rng.integers(0, 4)):  # pictures, windows, shelves
        x, y = (rng.uniform(0, (width, height * 0.7))).astype(int)
        wide, tall = (rng.uniform((0.1, 0.2), (0.3, 0.6)) * (width, height)).astype(int)
        frame = np.s_[y : y + tall, x : x + wide]
        wall[frame] = 0.4 * wall[frame] + 0.45 * hsv(rng.random(), 0.4, rng.random())
    skirting = max(2, height // 14)
    wall[-skirting:] = 0.3 * wall[-1:] + rng.uniform(0.1, 0.6)
    return wall


def _plane(rng: Rng, size: tuple[int, int], horizon: int, ground: str) -> Floats:
    """The ground from the horizon (or the top) down, its texture shrinking with distance."""
    height, width = size
    dark, light, cell, contrast, pattern = GROUNDS[ground]
    unit = min(size)
    first = max(horizon, 0)
    near = np.linspace((first - horizon) / (height - horizon), 1, height - first)[:, None]
    depth = 1 / (0.93 * near + 0.07)
    eye = width * rng.uniform(0.2, 0.8)
    across = ((np.arange(width) - eye) / unit * depth).astype(np.float32)
    along = np.repeat(depth * (height - horizon) / unit, width, axis=1).astype(np.float32)
    # The tile measures 256 texels, the short side of the picture 320 of them at our feet.
    tile = seamless(noise(rng, (320, 320), cell, 5, 0.75))
    row, column = ((320 * place).astype(np.intp) & 255 for place in (along, across))
    texture = tile[row, column]
    # Fine texture averages out with distance; broad variation stays.
    weight = 0.5 + contrast * 0.5 * texture * (1.5 * near).clip(0.2, 1).astype(np.float32)
    weight += 0.3 * noise(rng, across.shape, (unit / 4, unit / 1.5), 3)
    weight += _PATTERNS[pattern](across, along)
    # Rugs and cloths are dyed: their colours change places.
    dye = rng.permutation(3) if pattern in ("stripes", "checks") else np.arange(3)
    plane = mix(rgb(dark)[dye], rgb(light)[dye], weight)
    # Patches of something else lie about: moss, leaves, stains, all near the ground's own hue.
    hue, saturation, value = colorsys.rgb_to_hsv(*plane.reshape(-1, 3).mean(0).clip(0, 1).tolist())
    tint = hsv(hue + rng.normal(0, 0.08), min(1, saturation + 0.15), value * rng.uniform(0.4, 1.3))
    litter = noise(rng, across.shape, (unit / 12, unit / 5), 4)
    return mix(plane, tint * (0.8 + 0.4 * texture[..., None]), 0.7 * step(litter, 0.55, 0.8))


def _boards(across: Floats, along: Floats) -> Floats:
    board = across * 7
    gap = (board % 1 < 0.06).astype(np.float32)
    tone: Floats = np.sin(7 * np.floor(board))
    return np.float32(0.35) * tone - np.float32(0.6) * gap


def _checks(across: Floats, along: Floats) -> Floats:
    return np.float32(0.25) * (np.sign(np.sin(across * 40)) + np.sign(np.sin(along * 40)))


def _stripes(across: Floats, along: Floats) -> Floats:
    bands: Floats = np.float32(0.3) * np.sign(np.sin(along * 30))
    broad: Floats = np.float32(0.2) * np.sin(along * 7)
    return bands + broad


def _tiles(across: Floats, along: Floats) -> Floats:
    grout = (across * 5 % 1 < 0.05) | (along * 5 % 1 < 0.05)
    return np.float32(0.5) * grout.astype(np.float32)


_PATTERNS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "": lambda across, along: np.zeros_like(across),
    "boards": _boards,
    "checks": _checks,
    "stripes": _stripes,
    "tiles": _tiles,
}
