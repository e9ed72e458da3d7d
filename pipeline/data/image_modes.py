"""Whatever mode an image file has -> RGB, 8 bits a channel.

Colour profiles (ICC) are ignored: a box does not depend on a gamut. To treat another mode in a way
of its own: branch on it in `to_rgb`; what has no branch there goes through Pillow's ``convert``.

Shape letters:  H rows   W columns
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """``image`` in mode RGB, its transparent parts over ``background``.

    16-bit grey is divided by 257 (Pillow's own conversion saturates). Floats, and integers beyond
    16 bits, have no agreed range: their minimum becomes 0, their maximum 255, NaN and infinity 0.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, background)
        image.paste(layer, mask=layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey as "L", or as "LA" where the file declares one grey value transparent."""
    values_HW = np.asarray(image)
    if values_HW.itemsize == 2 or (
        image.mode == "I" and values_HW.min() >= 0 and values_HW.max() < 1 << 16
    ):
        # Rounded within 16 bits: wider sums would cost a huge image twice its memory.
        whole_HW, rest_HW = np.divmod(values_HW.astype(np.uint16, copy=False), 257)
        grey = Image.fromarray((whole_HW + (rest_HW > 128)).astype(np.uint8))
    else:
        grey = Image.fromarray(_stretch(values_HW))
    transparent_value = image.info.get("transparency")
    if isinstance(transparent_value, int):
        grey.putalpha(Image.fromarray(values_HW != transparent_value).convert("L"))
    return grey


def _stretch(values_HW: NDArray[Any]) -> NDArray[np.uint8]:
    """Minimum -> 0, maximum -> 255; a constant, and whatever is not finite -> 0."""
    finite_HW = np.isfinite(values_HW)
    if not finite_HW.any():
        return np.zeros(values_HW.shape, np.uint8)
    low, high = values_HW[finite_HW].min(), values_HW[finite_HW].max()
    # float64, because the span of two float32 values may overflow float32.
    above_low_HW = np.where(finite_HW, values_HW, low).astype(np.float64) - float(low)
    span = float(high) - float(low) or 1.0
    eight_HW: NDArray[np.uint8] = np.rint(above_low_HW * (255 / span)).astype(np.uint8)
    return eight_HW
