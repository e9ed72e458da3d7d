"""Every mode an image file can have becomes the RGB a person would see."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import to_rgb
from tests.data.pictures import Pixels, decode, encode, pixels_of

BACKGROUND = (10, 120, 250)


def rgb_of(data: bytes) -> Pixels:
    pixels_HW3 = pixels_of(decode(data, background=BACKGROUND))
    assert pixels_HW3.dtype == np.uint8
    return pixels_HW3


def colour_of(data: bytes) -> tuple[int, ...]:
    """The one colour of a flat image."""
    pixels_HW3 = rgb_of(data)
    assert (pixels_HW3 == pixels_HW3[0, 0]).all()
    return tuple(map(int, pixels_HW3[0, 0]))


def sixteen_bits(value: int, kind: str = "<u2") -> Image.Image:
    return Image.fromarray(np.full((32, 32), value, kind))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
@pytest.mark.parametrize(("value", "grey"), [(0, 0), (300, 1), (32768, 128), (65535, 255)])
def test_sixteen_bit_grey_is_scaled_and_not_clipped_to_white(
    kind: str, value: int, grey: int
) -> None:
    assert colour_of(encode(sixteen_bits(value), kind)) == (grey,) * 3


def test_big_endian_sixteen_bit_tiff_is_scaled() -> None:
    assert colour_of(encode(sixteen_bits(32768, ">u2"), "TIFF")) == (128,) * 3


def test_sixteen_bit_pgm_is_scaled() -> None:
    data = b"P5 32 32 65535\n" + struct.pack(">H", 32768) * 32 * 32
    assert Image.open(io.BytesIO(data)).mode == "I"
    assert colour_of(data) == (128,) * 3


def test_every_sixteen_bit_value_is_divided_by_257_and_rounded() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(rgb_of(encode(Image.fromarray(values), "PNG"))[..., 0], expected)


def test_transparent_value_of_sixteen_bit_grey_shows_the_background() -> None:
    values = np.full((32, 32), 40_000, np.uint16)
    values[0] = 40_001
    pixels_HW3 = rgb_of(encode(Image.fromarray(values), "PNG", transparency=40_000))
    assert (pixels_HW3[0] == 156).all()
    assert (pixels_HW3[1:] == BACKGROUND).all()


def test_integers_beyond_sixteen_bits_are_stretched() -> None:
    values = np.full((32, 32), 1_000_000, np.int32)
    values[0], values[1] = -1_000_000, 0
    pixels_HW3 = rgb_of(encode(Image.fromarray(values), "TIFF"))
    assert [int(pixels_HW3[row, 0, 0]) for row in range(3)] == [0, 128, 255]


def test_floats_are_stretched_and_what_is_not_finite_becomes_black() -> None:
    values = np.full((32, 32), 3e38, np.float32)
    values[0], values[1], values[2], values[3] = -3e38, np.nan, np.inf, -np.inf
    pixels_HW3 = rgb_of(encode(Image.fromarray(values), "TIFF"))
    assert [int(pixels_HW3[row, 0, 0]) for row in range(5)] == [0, 0, 0, 0, 255]


@pytest.mark.parametrize("value", [7.5, np.nan, np.inf])
def test_constant_floats_become_black(value: float) -> None:
    image = Image.fromarray(np.full((32, 32), value, np.float32))
    assert colour_of(encode(image, "TIFF")) == (0, 0, 0)


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (0, 255, 255, 0), (255, 0, 0, 0), (0, 0, 0, 128)])
def test_cmyk_jpeg_keeps_its_colours(ink: tuple[int, int, int, int]) -> None:
    expected = [(255 - part) * (255 - ink[3]) / 255 for part in ink[:3]]
    found = rgb_of(encode(Image.new("CMYK", (32, 32), ink), "JPEG", quality=95))
    assert np.abs(found - np.array(expected)).max() <= 3


def test_ycck_jpeg_is_read_as_libjpeg_turns_it_into_cmyk() -> None:
    data = encode(Image.new("CMYK", (32, 32), (0, 0, 0, 0)), "JPEG", quality=95)
    adobe = data.index(b"Adobe")
    ycck = data[: adobe + 11] + b"\x02" + data[adobe + 12 :]
    expected = np.asarray(Image.open(io.BytesIO(ycck)).convert("RGB"))
    assert np.array_equal(rgb_of(ycck), expected)
    assert not np.array_equal(rgb_of(ycck), rgb_of(data))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette_gives_colours_and_not_indices(kind: str) -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([1, 2, 3, 40, 50, 60])
    assert colour_of(encode(image, kind)) == (40, 50, 60)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_shows_the_background(kind: str) -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.paste(0, (0, 0, 32, 16))
    pixels_HW3 = rgb_of(encode(image, kind, transparency=1))
    assert (pixels_HW3[:16] == (1, 2, 3)).all()
    assert (pixels_HW3[16:] == BACKGROUND).all()


def test_half_transparent_palette_is_blended() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 110, 20, 50])
    found = colour_of(encode(image, "PNG", transparency=bytes([255, 128])))
    assert np.abs(np.array(found) - (60, 70, 150)).max() <= 1


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (1, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_one_bit_becomes_black_and_white(kind: str, value: int, grey: int) -> None:
    assert colour_of(encode(Image.new("1", (32, 32), value), kind)) == (grey,) * 3


@pytest.mark.parametrize(
    ("mode", "transparent", "half", "opaque"),
    [
        ("LA", (50, 0), (110, 128), (50, 255)),
        ("RGBA", (50, 50, 50, 0), (110, 110, 110, 128), (50, 50, 50, 255)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_blended_with_the_background(
    kind: str,
    mode: str,
    transparent: tuple[int, ...],
    half: tuple[int, ...],
    opaque: tuple[int, ...],
) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    found = [
        colour_of(encode(Image.new(mode, (32, 32), colour), kind, **options))
        for colour in (transparent, half, opaque)
    ]
    assert found[0] == BACKGROUND
    assert np.abs(np.array(found[1]) - (60, 115, 180)).max() <= 1
    assert found[2] == (50, 50, 50)


def test_colour_under_full_transparency_does_not_bleed_when_scaled_down() -> None:
    image = Image.new("RGBA", (400, 400), (255, 0, 0, 0))
    row = decode(encode(image, "PNG"), max_side=50, background=BACKGROUND)
    assert row.pixels_HW3 is not None
    assert (row.pixels_HW3 == BACKGROUND).all()


def test_transparent_colour_of_an_rgb_png_shows_the_background() -> None:
    data = encode(Image.new("RGB", (32, 32), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    assert colour_of(data) == BACKGROUND


MODES = "1 L P RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV LA PA I F I;16 I;16L I;16B I;16N"


@pytest.mark.parametrize("mode", MODES.split())
def test_no_mode_of_pillow_is_left_out(mode: str) -> None:
    image = to_rgb(Image.new(mode, (20, 30)), BACKGROUND)
    assert (image.mode, image.size) == ("RGB", (20, 30))


@pytest.mark.parametrize(
    ("mode", "kind", "stored", "expected"),
    [
        ("YCbCr", "TIFF", (128, 64, 128), (128, 150, 15)),
        ("YCbCr", "JPEG", (128, 64, 128), (128, 150, 15)),
        ("LAB", "TIFF", (128, 128, 128), (119, 119, 119)),
    ],
)
def test_other_colour_spaces_are_converted(
    mode: str, kind: str, stored: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    found = colour_of(encode(Image.new(mode, (32, 32), stored), kind))
    assert np.abs(np.array(found) - expected).max() <= 4
