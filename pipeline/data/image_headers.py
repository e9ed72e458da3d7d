"""What an image file says of itself before it is unpacked: format, size, orientation and cost.

To read another format: add its Pillow name to ``FORMATS`` after checking that opening it neither
decodes (ICO and ICNS do) nor runs another program (EPS does), and that its header states the size
it unpacks to. To name more of the files that are no pictures: add their first bytes, in lower case,
to ``_SIGNATURES``.
"""

import io
import struct
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TILELENGTH, TILEWIDTH, TiffImageFile

# JPEG includes MPO. TGA has no magic number: it is tried on what no other format claims.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")

_ORIENTATION_TAG: Final = 0x0112

_SIGNATURES: Final = (
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "XML or SVG"),
    (b"%pdf", "a PDF"),
    (b"%!ps", "PostScript"),
    (b"8bps", "a Photoshop file"),
    (b"pk\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"par1", "a Parquet file"),
    (b"\x00\x00\x01\x00", "a Windows icon"),
    (b"version https://git-lfs", "a Git LFS pointer whose picture was never fetched"),
)


@dataclass(frozen=True)
class Header:
    """The original size after the EXIF transpose; the orientation where it is legal (1 to 8)."""

    width: int | None = None
    height: int | None = None
    exif_orientation: int | None = None


@dataclass(frozen=True)
class Shrink:
    """A JPEG decoder will return the picture at 1/2, 1/4 or 1/8."""

    target: tuple[int, int]
    """Width and height to scale it to afterwards."""

    box: tuple[float, float, float, float]
    """Where the picture lies in what is returned, which is rounded up to whole pixels."""


def recognise(data: bytes) -> str:
    """Which of ``FORMATS`` has this magic number; TGA, which has none, where nobody claims it."""
    Image.init()
    prefix = data[:16].ljust(16, b"\0")
    for name in FORMATS:
        accept = Image.OPEN[name][1]
        # A string instead of True says that this build of Pillow lacks the decoder.
        if accept is not None and accept(prefix) is True:
            return name
    return "TGA"


def open_image(data: bytes) -> ImageFile.ImageFile:
    """The image with its header read and nothing decoded.

    Not by ``Image.open``: that consults ``MAX_IMAGE_PIXELS``, a global which no thread can lift for
    itself alone, and raises before the size of a big image is known.

    Raises:
        UnidentifiedImageError: no format in ``FORMATS``; the message says what it seems to be.
        Exception: whatever the format's plugin makes of a damaged header.
    """
    name = recognise(data)
    try:
        return Image.OPEN[name][0](io.BytesIO(data), "")
    except Exception as fault:
        if name != "TGA":
            raise
        reason = f"not a picture that can be read here: it seems to be {sniff(data)}"
        raise UnidentifiedImageError(reason) from fault


def sniff(data: bytes) -> str:
    """What a file that is no picture seems to be, for people."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, kind in _SIGNATURES:
        if head.startswith(start):
            return kind
    if data[4:8] == b"ftyp":
        return f"HEIC or a video ({data[8:12].decode('ascii', 'replace').strip()})"
    # The slice may have cut the last character in two.
    text = "".join(data[:512].decode("utf-8", "replace")[:-1].split())
    is_text = text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text
    return "text" if text and is_text else "unknown binary data"


def ends_early(data: bytes) -> bool:
    """Whether a file is shorter than it says itself, where the format lets it say so."""
    name = recognise(data)
    if name == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if name == "TIFF":
        # Where its directory begins, often at the very end.
        return int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big") >= len(data)
    return name == "JPEG2000" and not data.endswith(b"\xff\xd9")


def peek_canvas(data: bytes) -> Header:
    """The size of the formats whose plugins allocate their canvas while opening: GIF and WebP.

    It is the size before the EXIF transpose, whose tag is unknown until the file is opened.
    """
    if data[:4] == b"GIF8" and len(data) >= 10:
        return Header(*struct.unpack_from("<HH", data, 6))
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return Header()
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return Header(width, height)


def read_header(image: ImageFile.ImageFile) -> Header:
    """The header of an opened image that is not loaded yet."""
    width, height = image.size
    if isinstance(image, TiffImageFile):
        # Its ``size`` may be turned already: it heeds one of the places that hold an orientation.
        width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    # Asked for its EXIF tags, a PNG without any in front decodes itself to look behind the pixels.
    unknown = isinstance(image, PngImageFile) and "exif" not in image.info
    return _turn(width, height, None if unknown else read_orientation(image))


def complete_header(header: Header, image: ImageFile.ImageFile) -> Header:
    """``header`` with the orientation a PNG may hold behind its pixels, once it is loaded."""
    if header.exif_orientation is not None or header.width is None or header.height is None:
        return header
    return _turn(header.width, header.height, read_orientation(image))


def _turn(width: int, height: int, orientation: int | None) -> Header:
    """The header of an image stored as ``width`` x ``height``; 5 to 8 lay it on its side."""
    if orientation is not None and orientation >= 5:
        width, height = height, width
    return Header(width, height, orientation)


def read_orientation(image: ImageFile.ImageFile) -> int | None:
    """The EXIF orientation still to be undone: a loaded TIFF has none any more."""
    try:
        value: Any = image.getexif().get(_ORIENTATION_TAG)
    # Damaged metadata raises as variously as damaged pixels, and must not cost a whole picture.
    except Exception:
        return None
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def fit(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """``size`` in proportion with its longer side at most ``max_side``, no side below 1."""
    longer = max(size)
    if longer <= max_side:
        return size
    width, height = (max(1, round(side * max_side / longer)) for side in size)
    return width, height


def plan_decoding(
    image: ImageFile.ImageFile, data: bytes, max_side: int
) -> tuple[int, Shrink | None]:
    """How many pixels the decoder will hold at once; a large JPEG is told to shrink meanwhile."""
    pixels = image.width * image.height
    if isinstance(image, TiffImageFile):
        # A tile may be bigger than the image it belongs to.
        tile = int(image.tag_v2.get(TILEWIDTH, 1)) * int(image.tag_v2.get(TILELENGTH, 1))
        return max(pixels, tile), None
    target = fit(image.size, max_side)
    if not isinstance(image, JpegImageFile) or target == image.size:
        return pixels, None
    kind = _jpeg_kind(data)
    drafted = image.draft(None, target) if kind != "other" else None
    if drafted is None:
        return pixels, None
    # With several scans all coefficients stay in memory until the last, however small the result.
    held = image.width * image.height if kind == "one scan" else pixels
    return held, Shrink(target, drafted[1])


def _jpeg_kind(data: bytes) -> str:
    """What the decoder has to go through: "one scan", "several scans", or "other".

    Several are progressive files, and sequential ones with a scan per component; other is lossless
    or unclear.
    """
    position, frame, components = 2, 0, 0
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # A fill byte.
            position += 1
            continue
        if marker == 0xDA:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, components = marker, data[position + 9]
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    else:
        return "other"
    if frame in (0xC0, 0xC1):
        return "one scan" if data[position + 4] == components else "several scans"
    return "several scans" if frame == 0xC2 else "other"
