"""Encoded bytes -> the RGB pixels the network sees, and a status for every input that has none.

The promise is one row per input, always: `decode_image` raises for no bytes whatever. The size in
the header is checked before anything is unpacked, so that a decompression bomb costs no memory.
Threads may call it; Pillow frees the GIL while it decodes. Colour profiles (ICC) are ignored: a box
does not depend on a gamut.

To read another format see image_headers.py. To treat a colour mode in a way of its own: a branch in
`to_rgb`; what has none there goes through Pillow's ``convert``. A new way to fail is a new
``Status`` in pseudo_labels.py and a branch in `decode_image`.

Shape letters:  H rows   W columns   3 red, green, blue
"""

import re
import warnings
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from pipeline.data import image_headers
from pipeline.data.image_headers import Header, Shrink
from pipeline.data.pseudo_labels import MAX_ERROR_LENGTH, Status
from pipeline.errors import one_line


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


# RGB bytes per byte of file. Photographs seldom pass 50, a JPEG of one flat colour reaches 190 and
# deflate 1000. Only images above max_pixels are asked: it decides between two names of a refusal.
MAX_HONEST_COMPRESSION: Final = 100

_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow says when a file stops before its time, in its many words.
_TRUNCATED: Final = re.compile(
    "truncat|EOF|cannot load this|expected to read|requires a buffer|incomplete|no more images",
    re.IGNORECASE,
)
_PILLOW_FILTER: Final = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


@dataclass(frozen=True)
class DecodedImage:
    """What became of one image's bytes."""

    pixels_HW3: NDArray[np.uint8] | None
    """What the network sees, longer side <= max_side; None unless status is "ok"."""

    width: int | None
    """Original pixels after the EXIF transpose; known wherever the header was readable, also for
    refused and damaged images."""

    height: int | None

    status: Status

    error: str | None
    """Why there are no pixels, on one line of at most 512 characters; None when ok."""

    exif_orientation: int | None
    """1 to 8, where the tag is present and legal."""

    num_frames: int | None
    """Frames or pages, of which the first is taken; None unless ok and countable."""


def decode_image(
    data: bytes,
    *,
    min_side: int,
    max_side: int,
    max_pixels: int,
    background: tuple[int, int, int],
) -> DecodedImage:
    """The first frame of ``data`` as RGB, upright by its EXIF tag and scaled down to ``max_side``.

    Args:
        data: An encoded image, or anything else.
        min_side: A shorter side below it gives ``skipped_too_small``.
        max_side: A longer side above it is scaled down to it; nothing is ever scaled up.
        max_pixels: More pixels to unpack give ``skipped_too_large``, or ``error_bomb`` where the
            file is implausibly small for them. A JPEG that can be unpacked at 1/2, 1/4 or 1/8
            counts at that size. TIFF, GIF and WebP are held to Pillow's own 179 million as well.
        background: The colour behind transparent pixels.

    Returns:
        C-contiguous pixels and status ``ok``, or the reason why there are none; never an exception.
    """
    if not data:
        return _without_pixels("error_read", "empty file", Header())
    mute_pillow()
    header = Header()
    try:
        header = image_headers.peek_canvas(data)
        if (header.width or 0) * (header.height or 0) > max_pixels:
            return _too_large(data, header, max_pixels)
        image = image_headers.open_image(data)
        header = image_headers.read_header(image)
        if min(image.size) < min_side:
            return _too_small(header, min_side)
        unpacked, shrink = image_headers.plan_decoding(image, data, max_side)
        if unpacked > max_pixels:
            return _too_large(data, header, max_pixels, unpacked)
        pixels_HW3 = _unpack(image, shrink, max_side, background)
        header = image_headers.complete_header(header, image)
    except MemoryError as fault:
        return _without_pixels("error_memory", f"out of memory: {one_line(fault)}", header)
    except Image.DecompressionBombError as fault:
        # From TIFF, GIF and WebP, whose plugins themselves compare with Pillow's own ceiling.
        told = re.search(r"(\d+) pixels.* limit of (\d+)", str(fault))
        pixels, limit = map(int, told.groups()) if told else (None, max_pixels)
        return _too_large(data, header, limit, pixels)
    # A decoder given damaged bytes may raise anything; the row must exist and takes the fault.
    except Exception as fault:
        return _without_pixels("error_decode", _explain(fault, data), header)
    size, num_frames = (header.width, header.height), _count_frames(image)
    return DecodedImage(pixels_HW3, *size, "ok", None, header.exif_orientation, num_frames)


def _without_pixels(status: Status, reason: str, header: Header) -> DecodedImage:
    error = " ".join(reason.split())[:MAX_ERROR_LENGTH]
    size = header.width, header.height
    return DecodedImage(None, *size, status, error, header.exif_orientation, None)


def _too_small(header: Header, min_side: int) -> DecodedImage:
    reason = f"{header.width}x{header.height}: the shorter side is below min_side {min_side}"
    return _without_pixels("skipped_too_small", reason, header)


def _too_large(
    data: bytes, header: Header, limit: int, unpacked: int | None = None
) -> DecodedImage:
    """The refusal of more than ``limit`` pixels: a bomb, or too much of an honest picture."""
    pixels = max(unpacked or 0, (header.width or 0) * (header.height or 0))
    reason = f"{header.width}x{header.height}: {pixels:,} pixels to unpack, at most {limit:,}"
    compression = 3 * pixels // len(data)
    if compression > MAX_HONEST_COMPRESSION:
        return _without_pixels("error_bomb", f"{reason}, compressed {compression}:1", header)
    return _without_pixels("skipped_too_large", reason, header)


def _explain(fault: Exception, data: bytes) -> str:
    """The fault's class and message, and "truncated" where the file ends too early."""
    if isinstance(fault, UnidentifiedImageError):
        return str(fault)
    name, text = image_headers.recognise(data), f"{type(fault).__name__}: {one_line(fault)}"
    truncated = _TRUNCATED.search(text) or image_headers.ends_early(data)
    return f"{'truncated' if truncated else 'damaged'} {name}: {text}"


def mute_pillow() -> None:
    """Hide Pillow's remarks on odd metadata: no row may depend on how a process treats warnings.

    ``warnings.catch_warnings`` is unsafe with threads and makes every other library repeat itself
    after each image. So this filter, which concerns Pillow's modules alone, goes in front for good.
    """
    if list(warnings.filters[:1]) != [_PILLOW_FILTER]:
        warnings.filterwarnings("ignore", module=_PILLOW_FILTER[3].pattern)


def _unpack(
    image: ImageFile.ImageFile,
    shrink: Shrink | None,
    max_side: int,
    background: tuple[int, int, int],
) -> NDArray[np.uint8]:
    """The decoded pixels as RGB, scaled down and upright."""
    image.load()
    picture = to_rgb(image, background)
    target = shrink.target if shrink else image_headers.fit(picture.size, max_side)
    if picture.size != target:
        box = shrink.box if shrink else None
        picture = picture.resize(target, Image.Resampling.BICUBIC, box, reducing_gap=2.0)
    orientation = image_headers.read_orientation(image)
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    # A copy: Pillow's own memory is read-only, and torch warns of that at every image.
    return np.array(picture)


def _count_frames(image: ImageFile.ImageFile) -> int | None:
    try:
        return int(getattr(image, "n_frames", 1))
    # Counting walks through later frames, whose damage must not cost the first.
    except Exception:
        return None
