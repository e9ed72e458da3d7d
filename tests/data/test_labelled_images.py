"""Images with labels: the pixels everybody else sees, names that print, pickles that work."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.labelled_images import (
    ArrayImages,
    EncodedImages,
    FileImages,
    LabelledImages,
    PackedBytes,
    Selection,
    decode_rgb,
)
from pipeline.errors import DataError
from tests.data.labelled import flat, greys, names, plant_classes
from tests.data.pictures import decode, encode, noise, pixels_of

LABELS = np.array([1, 0, 1], np.int64)


def three_kinds(folder: Path) -> list[LabelledImages]:
    plant_classes(folder, {"a": 3})
    paths = ["a/0.png", "a/1.png", "a/2.png"]
    files = [(folder / path).read_bytes() for path in paths]
    arrays = np.stack([flat(1), flat(2), flat(3)])
    return [
        FileImages(str(folder), paths, LABELS),
        EncodedImages("a.tar", paths, files, LABELS),
        ArrayImages(arrays, LABELS, "train"),
    ]


def test_files_archives_and_arrays_give_the_same_images(tmp_path: Path) -> None:
    for images in three_kinds(tmp_path):
        again: LabelledImages = pickle.loads(pickle.dumps(images))
        assert greys(again) == greys(images) == [1, 2, 3]
        assert names(again) == names(images)
        assert len(again) == 3
        assert again.targets.tolist() == [1, 0, 1]
        assert again.image(0).mode == "RGB"
        assert again.image(0).size == (8, 6)


def test_selection_keeps_order_labels_and_names(tmp_path: Path) -> None:
    for images in three_kinds(tmp_path):
        chosen = pickle.loads(pickle.dumps(Selection(images, np.array([2, 0]))))
        assert greys(chosen) == [3, 1]
        assert chosen.targets.tolist() == [1, 1]
        assert names(chosen) == [images.name(2), images.name(0)]


def test_packed_bytes_are_a_list_of_bytes() -> None:
    for strings in ([], [b""], [b"a", b"", b"\xff\x00bc"]):
        packed = PackedBytes(strings)
        assert [packed[index] for index in range(len(packed))] == strings


def test_a_million_names_pickle_as_two_buffers() -> None:
    packed = PackedBytes(b"train/n01440764/%08d.JPEG" % index for index in range(100_000))
    assert len(pickle.dumps(packed)) < 100_000 * (29 + 8) + 1000
    assert packed[99_999] == b"train/n01440764/00099999.JPEG"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_upright_as_the_labeller_sees_them(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(), kind, exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_rgb(data, "x")), pixels_of(decode(data)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_becomes_rgb_as_in_the_labeller(mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(noise()[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(noise()).convert(mode)
    data = encode(picture, "TIFF" if mode == "CMYK" else "PNG")
    image = decode_rgb(data, "x")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels_of(decode(data)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>gone</html>", "HTML"),
        (encode(noise(), "JPEG")[:-400], "truncated"),
        (encode(noise(), "PNG")[:200], "[Tt]runcated"),
        (b"GIF89a\xff\xff\xff\xff" + bytes(20), "65535x65535"),
    ],
)
def test_undecodable_bytes_are_a_data_error_that_names_them(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"^some/cat\.jpg cannot be decoded \(.*{reason}"):
        decode_rgb(data, "some/cat.jpg")


def test_vanished_file_is_a_data_error_with_its_path(tmp_path: Path) -> None:
    images = FileImages(str(tmp_path), ["a/0.png"], LABELS[:1])
    with pytest.raises(DataError, match=rf"cannot read {tmp_path}/a/0.png"):
        images.image(0)


def test_name_that_is_no_text_is_found_and_prints(tmp_path: Path) -> None:
    plant_classes(tmp_path, {"a": 1})
    raw = b"a/\xff\xc3\xa9.png"
    (tmp_path / "a" / "0.png").rename(Path(str(tmp_path)) / raw.decode(errors="surrogateescape"))
    images = FileImages(str(tmp_path), [raw.decode(errors="surrogateescape")], LABELS[:1])
    assert greys(images) == [1]
    assert images.name(0).encode() == rb"a/\xff" + "é.png".encode()


def test_truncated_photo_of_the_wild_is_named(shared: Path) -> None:
    images = FileImages(str(shared / "data" / "kangaroo"), ["images/00090.jpg"], LABELS[:1])
    with pytest.raises(DataError, match=r"images/00090\.jpg cannot be decoded .*truncated"):
        images.image(0)
