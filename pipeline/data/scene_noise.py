"""Smooth noise and colours: what the scenes of scenes.py are painted with.

Pictures are float32 in about [0, 1]; a size is (height, width), a colour ``(3,)`` RGB.

Shape letters:  H, W image
"""

import colorsys

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
