"""Too many pixels are refused from the header, before they cost any memory."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from tests.conftest import ROOT
from tests.data.pictures import decode, encode, noise, pixels_of

KINDS = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP")
VALID = {kind: encode(noise(), kind) for kind in KINDS}


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def black_png(side: int) -> bytes:
    """A valid RGB PNG of zeros; one compressed piece is repeated, so nothing big is ever held."""
    row, pieces = 3 * side + 1, 500
    assert side % pieces == 0
    piece = bytes(row * (side // pieces))
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(piece) + squeeze.flush(zlib.Z_FULL_FLUSH)
    checksum = 1
    for _ in range(pieces):
        checksum = zlib.adler32(piece, checksum)
    stream = b"\x78\xda" + block * pieces + squeeze.flush() + struct.pack(">I", checksum)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", stream)
        + png_chunk(b"IEND", b"")
    )


def grey_jpeg(side: int, *, progressive: bool = False) -> bytes:
    """A valid sequential JPEG of mid-grey: with the standard tables a block is the bits 001010."""
    assert side % 16 == 0
    small = bytearray(encode(Image.new("L", (8, 8), 128), "JPEG"))
    frame, scan = small.index(b"\xff\xc0"), small.index(b"\xff\xda")
    small[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    if progressive:
        small[frame + 1] = 0xC2
    head = bytes(small[: scan + 2 + int.from_bytes(small[scan + 2 : scan + 4])])
    return head + b"\x28\xa2\x8a" * ((side // 8) ** 2 // 4) + b"\xff\xd9"


def patched(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def tiff_with_tile(side: int) -> bytes:
    """A 64 x 64 TIFF that claims to be cut into tiles of ``side`` x ``side``."""
    entries = {
        256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: 100,
    }  # fmt: skip
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    directory = struct.pack("<H", len(entries)) + fields + bytes(4)
    body = zlib.compress(bytes(64)).ljust(100, b"\0")
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def over_limit(kind: str) -> bytes:
    return encode(noise(300, 400), kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_honest_image_over_the_limit_becomes_skipped_too_large(kind: str) -> None:
    row = decode(over_limit(kind), max_pixels=119_999)
    assert (row.status, row.width, row.height) == ("skipped_too_large", 400, 300)
    assert "at most 119,999" in (row.error or "")
    assert decode(over_limit(kind), max_pixels=120_000).status == "ok"


def test_size_of_a_refused_image_is_that_after_the_transpose() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    row = decode(encode(noise(300, 400), "JPEG", exif=exif), max_pixels=1000)
    assert (row.status, row.width, row.height) == ("skipped_too_large", 300, 400)
    assert row.exif_orientation == 8


def test_jpeg_counts_at_the_size_it_is_unpacked_to_unless_it_has_several_scans() -> None:
    sequential, progressive = (
        encode(noise(800, 800), "JPEG", progressive=flag) for flag in (False, True)
    )
    knobs = {"max_side": 100, "max_pixels": 20_000}
    assert pixels_of(decode(sequential, **knobs)).shape == (100, 100, 3)
    assert decode(progressive, **knobs).status == "skipped_too_large"
    assert pixels_of(decode(progressive, max_side=100)).shape == (100, 100, 3)


def test_jpeg_with_a_scan_per_component_counts_in_full() -> None:
    data = encode(noise(800, 800), "JPEG")
    scan = data.index(b"\xff\xda\x00\x0c\x03")
    single = data[:scan] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + data[scan + 14 :]
    assert decode(single, max_side=100, max_pixels=20_000).status == "skipped_too_large"


def gif_of_frame(side: int) -> bytes:
    """A GIF whose first frame is far bigger than its screen of 80 x 64."""
    data = VALID["GIF"]
    return patched(data, data.index(b",\0\0\0\0\x50\0\x40\0") + 5, struct.pack("<HH", side, side))


def extended_webp(side: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 2
    data = encode(noise(), "WEBP", exif=exif)
    assert data[12:16] == b"VP8X"
    return patched(data, 24, (side - 1).to_bytes(3, "little") * 2)


BOMBS = {
    "PNG": lambda: black_png(20_000),
    "progressive JPEG": lambda: grey_jpeg(20_000, progressive=True),
    "GIF screen": lambda: patched(VALID["GIF"], 6, struct.pack("<HH", 65535, 65535)),
    "GIF frame": lambda: gif_of_frame(65535),
    "GIF frame under Pillow's ceiling": lambda: gif_of_frame(12_000),
    "WebP canvas": lambda: extended_webp(16_383),
    "TIFF tile": lambda: tiff_with_tile(20_000),
    "BMP": lambda: patched(VALID["BMP"], 18, struct.pack("<ii", 30_000, 30_000)),
    "PPM": lambda: b"P6 30000 30000 255\n" + bytes(64),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_from_its_header(name: str) -> None:
    row = decode(BOMBS[name]())
    assert row.status == "error_bomb", row.error


def test_bomb_row_has_the_size_of_its_header() -> None:
    row = decode(black_png(20_000))
    assert (row.width, row.height, row.exif_orientation) == (20_000, 20_000, None)
    assert "400,000,000 pixels" in (row.error or "")


def run_alone(code: str, tmp_path: Path, data: bytes) -> list[str]:
    """What ``code`` prints in a process of its own, with ``row(**knobs)`` and ``peak()`` in MiB."""
    (tmp_path / "data").write_bytes(data)
    prelude = f"""
import re, sys
from pathlib import Path
from pipeline.data.images import decode_image
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
knobs = dict(min_side=16, max_side=1024, max_pixels=100_000_000, background=(0, 0, 0))
def row(data):
    return decode_image(data, **knobs)
assert row({VALID["PNG"]!r}).status == "ok"
data = Path(sys.argv[1]).read_bytes()
before = peak()
"""
    command = [sys.executable, "-c", prelude + code, str(tmp_path / "data")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split()


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize("name", BOMBS)
def test_bomb_leaves_memory_flat(name: str, tmp_path: Path) -> None:
    code = "print(row(data).status, peak() - before)"
    status, growth = run_alone(code, tmp_path, BOMBS[name]())
    assert status == "error_bomb"
    assert int(growth) < (200 if name == "GIF frame under Pillow's ceiling" else 16)


@needs_proc
def test_huge_sequential_jpeg_is_unpacked_at_an_eighth(tmp_path: Path) -> None:
    code = "r = row(data); print(r.status, r.width, *r.pixels_HW3.shape, peak() - before)"
    status, width, *shape, growth = run_alone(code, tmp_path, grey_jpeg(20_000))
    assert (status, width, shape) == ("ok", "20000", ["1024", "1024", "3"])
    assert int(growth) < 150


@needs_proc
def test_running_out_of_memory_becomes_error_memory(tmp_path: Path) -> None:
    code = """
import resource
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20),) * 2)
r = row(data)
print(r.status, r.width)
"""
    assert run_alone(code, tmp_path, black_png(9_000)) == ["error_memory", "9000"]


def test_pillows_globals_are_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    decode(black_png(20_000))
    decode(VALID["JPEG"][:2000])
    after = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    assert after == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_pillows_ceiling_does_not_preempt_max_pixels(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert pixels_of(decode(VALID[kind])).shape == (64, 80, 3)


@pytest.mark.parametrize("kind", ["TIFF", "WEBP"])
def test_what_a_plugin_itself_refuses_is_too_large_and_keeps_its_size(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    row = decode(VALID[kind])
    assert (row.status, row.width, row.height) == ("skipped_too_large", 80, 64)
    assert "at most 2,000" in (row.error or "")
