"""Bytes become upright RGB pixels or a row that says why not, and nothing ever raises."""

import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.images import DecodedImage
from tests.data.pictures import Pixels, decode, encode, noise, pixels_of


def quadrants(height: int = 64, width: int = 96) -> Pixels:
    """Four flat colours, so that every turn and mirror image is another picture."""
    colours = np.array([[[200, 30, 30], [30, 200, 30]], [[30, 30, 200], [220, 220, 30]]], np.uint8)
    return colours.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


VALID = {
    "JPEG": encode(noise(), "JPEG"),
    "JPEG progressive": encode(noise(), "JPEG", progressive=True),
    "PNG": encode(noise(), "PNG"),
    "GIF": encode(noise(), "GIF"),
    "TIFF": encode(noise(), "TIFF"),
    "TIFF LZW": encode(noise(), "TIFF", compression="tiff_lzw"),
    "WEBP": encode(noise(), "WEBP"),
    "WEBP lossless": encode(noise(), "WEBP", lossless=True),
    "BMP": encode(noise(), "BMP"),
    "PPM": encode(noise(), "PPM"),
    "TGA": encode(noise(), "TGA"),
    "AVIF": encode(noise(), "AVIF"),
    "JPEG2000": encode(noise(), "JPEG2000"),
}


def assert_consistent(row: DecodedImage) -> None:
    assert (row.status == "ok") == (row.pixels_HW3 is not None) == (row.error is None)
    assert row.error is None or (0 < len(row.error) <= 512 and "\n" not in row.error)
    assert (row.width is None) == (row.height is None)
    if row.pixels_HW3 is not None:
        assert row.pixels_HW3.dtype == np.uint8
        assert row.pixels_HW3.ndim == 3
        assert row.pixels_HW3.flags.c_contiguous


@pytest.mark.parametrize("kind", VALID)
def test_every_format_on_the_list_is_read(kind: str) -> None:
    row = decode(VALID[kind])
    assert pixels_of(row).shape == (64, 80, 3)
    assert (row.width, row.height, row.num_frames, row.exif_orientation) == (80, 64, 1, None)
    assert_consistent(row)


def test_pixels_are_those_of_pillow() -> None:
    expected = np.asarray(Image.open(io.BytesIO(VALID["JPEG"])).convert("RGB"))
    assert np.array_equal(pixels_of(decode(VALID["JPEG"])), expected)


def test_empty_file_becomes_error_read() -> None:
    row = decode(b"")
    assert (row.status, row.error, row.width) == ("error_read", "empty file", None)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"<html>", "HTML"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"Not found.\nTry again.", "text"),
        ("Nicht gefunden: Bär".encode(), "text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"PK\x03\x04rest", "zip"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9", "PostScript"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "heic"),
        (encode(noise(32, 32), "ICO"), "icon"),
        (b"\0", "unknown"),
        (bytes(range(256)), "unknown"),
        (b"RIFF\x04\0\0\0WAVE", "unknown"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, kind: str) -> None:
    row = decode(data)
    assert row.status == "error_decode"
    assert kind in (row.error or "")


@pytest.mark.parametrize("kind", [kind for kind in VALID if kind != "AVIF"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_file_becomes_error_decode_that_says_so(kind: str, share: float) -> None:
    row = decode(VALID[kind][: int(share * len(VALID[kind]))])
    assert row.status == "error_decode"
    assert (row.error or "").startswith(f"truncated {kind.split()[0]}")


def test_truncated_avif_becomes_error_decode() -> None:
    assert decode(VALID["AVIF"][:2000]).status == "error_decode"


def test_damaged_image_keeps_the_size_of_its_header() -> None:
    row = decode(VALID["JPEG"][:2000])
    assert (row.status, row.width, row.height) == ("error_decode", 80, 64)


def test_real_truncated_photo_becomes_error_decode_and_its_neighbour_is_read(shared: Path) -> None:
    photos = shared / "data" / "kangaroo" / "images"
    broken = decode((photos / "00090.jpg").read_bytes())
    assert broken.status == "error_decode"
    assert "truncated" in (broken.error or "")
    pixels_of(decode((photos / "00089.jpg").read_bytes()))


STORE = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF LZW", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", STORE)
def test_every_exif_orientation_gives_the_same_upright_picture(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"compression": "tiff_lzw"} if kind == "TIFF LZW" else {}
    stored = np.ascontiguousarray(STORE[orientation](quadrants()))
    row = decode(encode(stored, kind.split()[0], exif=exif, **options))
    difference = np.abs(pixels_of(row).astype(int) - quadrants())
    assert difference.mean() < (1e-9 if kind in ("PNG", "TIFF", "TIFF LZW") else 4)
    assert (row.width, row.height) == (96, 64)
    # libavif stores "no turn" as no tag at all.
    assert row.exif_orientation == (None if (kind, orientation) == ("AVIF", 1) else orientation)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_turned_image_is_scaled_down_in_its_upright_frame(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(STORE[6](quadrants(400, 800)))
    row = decode(encode(stored, kind, exif=exif), max_side=100)
    assert pixels_of(row).shape == (50, 100, 3)
    assert (row.width, row.height) == (800, 400)
    assert np.abs(pixels_of(row)[10, 10].astype(int) - quadrants()[0, 0]).max() < 8


def test_orientation_behind_the_pixels_of_a_png_is_found() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(np.ascontiguousarray(STORE[6](quadrants())), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[start : start + 4])
    chunk, rest = data[start : start + length], data[:start] + data[start + length :]
    row = decode(rest[:-12] + chunk + rest[-12:])
    assert np.array_equal(pixels_of(row), quadrants())
    assert (row.width, row.height, row.exif_orientation) == (96, 64, 6)


def test_orientation_in_the_xmp_of_a_tiff_is_heeded() -> None:
    stored = np.ascontiguousarray(STORE[6](quadrants()))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    row = decode(encode(stored, "TIFF", tiffinfo={700: xmp}))
    assert np.array_equal(pixels_of(row), quadrants())
    assert (row.width, row.height, row.exif_orientation) == (96, 64, 6)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_illegal_orientation_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    row = decode(encode(noise(), "PNG", exif=exif))
    assert row.exif_orientation is None
    assert np.array_equal(pixels_of(row), noise())


def test_damaged_exif_costs_neither_the_picture_nor_a_warning() -> None:
    damaged = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x02\0\xff\xff\0\0\xff\xff\0\0"
    data = encode(noise(), "JPEG", exif=damaged)
    with pytest.warns(UserWarning, match="Corrupt EXIF|Tag data larger"):
        Image.open(io.BytesIO(data)).getexif()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels_of(decode(data)).shape == (64, 80, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "MPO"])
def test_first_of_several_frames_is_taken_and_their_number_noted(kind: str) -> None:
    frames = [Image.new("RGB", (80, 64), colour) for colour in ("red", "green", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    row = decode(data)
    assert row.num_frames == 3
    assert np.abs(pixels_of(row).astype(int) - (255, 0, 0)).max() <= 3


def test_damage_behind_the_first_frame_does_not_cost_it() -> None:
    frames = [Image.fromarray(noise()), Image.fromarray(noise()[::-1].copy())]
    data = encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    second = data.rindex(struct.pack("<HHII", 256, 4, 1, 80))
    row = decode(data[:second] + b"\xff" * 12 + data[second + 12 :])
    assert np.array_equal(pixels_of(row), noise())
    assert row.num_frames is None


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2000), (2000, 3), (15, 16)])
def test_too_small_image_becomes_a_row_with_its_size(width: int, height: int) -> None:
    row = decode(encode(Image.new("RGB", (width, height)), "PNG"))
    assert (row.status, row.width, row.height) == ("skipped_too_small", width, height)
    assert_consistent(row)


def test_image_of_exactly_min_side_is_read() -> None:
    assert pixels_of(decode(encode(Image.new("RGB", (16, 16)), "PNG"))).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    ("width", "height", "shape"),
    [
        (100, 60, (60, 100)),
        (101, 60, (59, 100)),
        (333, 1000, (100, 33)),
        (801, 799, (100, 100)),
        (1600, 17, (1, 100)),
        (4000, 16, (1, 100)),
    ],
)
def test_longer_side_becomes_max_side_and_is_never_enlarged(
    kind: str, width: int, height: int, shape: tuple[int, int]
) -> None:
    row = decode(encode(Image.new("RGB", (width, height)), kind), max_side=100)
    assert pixels_of(row).shape == (*shape, 3)
    assert (row.width, row.height) == (width, height)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_scaling_down_averages_and_keeps_places(kind: str) -> None:
    # Left: a fine checkerboard, which a careless resize turns into black, white or stripes.
    image = np.zeros((1001, 1001), np.uint8)
    image[::2, ::2] = image[1::2, 1::2] = 255
    image[:, 700:] = 255
    small = pixels_of(
        decode(encode(image, kind, **({"quality": 95} if kind == "JPEG" else {})), max_side=100)
    )
    assert np.abs(small[3:-3, 3:66].astype(int) - 127).max() < 12
    assert small[:, 73:].min() > 240


def test_threads_get_the_same_rows_as_one_after_another() -> None:
    inputs = [*VALID.values(), b"", b"text", VALID["JPEG"][:900], b"P6 30000 30000 255\n"] * 4
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode, inputs))
    for row, data in zip(together, inputs, strict=True):
        alone = decode(data)
        assert (row.status, row.width, row.error) == (alone.status, alone.width, alone.error)
        assert np.array_equal(row.pixels_HW3, alone.pixels_HW3)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=1, max_size=300))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    row = decode(data)
    assert row.status.startswith("error_")
    assert_consistent(row)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(VALID)),
    keep=st.integers(0, 100),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=12),
    near_the_start=st.booleans(),
)
def test_damaged_pictures_never_raise(
    kind: str, keep: int, flips: list[tuple[float, int]], near_the_start: bool
) -> None:
    data = bytearray(VALID[kind])
    reach = 200 if near_the_start else len(data)
    for place, bit in flips:
        data[int(place * reach)] ^= 1 << bit
    assert_consistent(decode(bytes(data[: len(data) * keep // 100]), max_pixels=1_000_000))
