"""Pictures as bytes, and what the decoder makes of them.

Shape letters:  H height   W width
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.images import DecodedImage, decode_image

Pixels = NDArray[np.uint8]


def encode(picture: Image.Image | Pixels, kind: str, **options: Any) -> bytes:
    """The file that Pillow writes in the format ``kind``."""
    sink = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(sink, kind, **options)
    return sink.getvalue()


def decode(data: bytes, **changed: Any) -> DecodedImage:
    """The decoder's answer at the settings of a job, but for those that are ``changed``."""
    knobs: dict[str, Any] = {
        "min_side": 16,
        "max_side": 1024,
        "max_pixels": 100_000_000,
        "background": (255, 255, 255),
    }
    return decode_image(data, **(knobs | changed))


def pixels_of(row: DecodedImage) -> Pixels:
    """``(H, W, 3)``, of a row that has pixels."""
    assert row.status == "ok", row.error
    assert row.pixels_HW3 is not None
    return row.pixels_HW3


def noise(height: int = 64, width: int = 80) -> Pixels:
    """The same ``(H, W, 3)`` at every call, and of little use to any compression."""
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
