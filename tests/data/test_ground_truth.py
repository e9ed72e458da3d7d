"""VOC XML and COCO JSON -> the same ground truth; damage -> one line that names the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.ground_truth import GroundTruth, read_coco, read_voc
from pipeline.errors import DataError
from pipeline.storage import Location

BOX = "<bndbox><xmin>3</xmin><ymin>5</ymin><xmax>10</xmax><ymax>8</ymax></bndbox>"


def voc_xml(*objects: str, filename: str = "a.jpg", size: str = "") -> str:
    inside = "".join(f"<object><name>cat</name>{item}</object>" for item in objects)
    return f"<annotation><filename>{filename}</filename>{size}{inside}</annotation>"


def voc_of(folder: Path, xml: str | bytes, name: str = "a.xml") -> GroundTruth:
    (folder / name).write_bytes(xml.encode() if isinstance(xml, str) else xml)
    (truth,) = read_voc(Location.parse(str(folder)))
    return truth


def coco_of(folder: Path, content: Any) -> list[GroundTruth]:
    (folder / "gt.json").write_text(json.dumps(content))
    return read_coco(Location.parse(str(folder / "gt.json")))


def coco_with(**annotation: Any) -> dict[str, Any]:
    one = {"id": 7, "image_id": 1, "bbox": [2, 4, 8, 4]} | annotation
    return {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [one]}


# ---- VOC


def test_voc_counts_from_one_and_includes_the_last_pixel(tmp_path: Path) -> None:
    assert voc_of(tmp_path, voc_xml(BOX)).boxes_N4.tolist() == [[2, 4, 10, 8]]


def test_voc_reads_size_and_difficult(tmp_path: Path) -> None:
    size = "<size><width>500</width><height>375</height><depth>3</depth></size>"
    objects = (BOX, f"{BOX}<difficult>1</difficult>", f"{BOX}<difficult>0</difficult>")
    truth = voc_of(tmp_path, voc_xml(*objects, size=size))
    assert (truth.width, truth.height) == (500, 375)
    assert truth.difficult_N.tolist() == [False, True, False]
    assert truth.without_difficult().boxes_N4.shape == (2, 4)


def test_voc_names_classes_and_numbers_images_by_their_digits(tmp_path: Path) -> None:
    truth = voc_of(tmp_path, voc_xml(BOX, f"{BOX}<difficult>1</difficult>"), "2008_000021.xml")
    assert (truth.image_id, truth.classes_N) == (2008000021, ("cat", "cat"))
    assert truth.without_difficult().classes_N == ("cat",)
    nameless = voc_xml(BOX).replace("<name>cat</name>", "")
    truth = voc_of(tmp_path, nameless, "2008_000021.xml")
    assert truth.classes_N == ()
    (tmp_path / "2008_000021.xml").unlink()
    assert voc_of(tmp_path, voc_xml(BOX), "holiday1.xml").image_id is None


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_voc_size_that_is_not_given_is_unknown(tmp_path: Path, size: str) -> None:
    truth = voc_of(tmp_path, voc_xml(BOX, size=size))
    assert (truth.width, truth.height) == (None, None)


def test_voc_parts_of_a_person_are_no_objects(tmp_path: Path) -> None:
    head = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin></bndbox></part>"
    assert voc_of(tmp_path, voc_xml(head + BOX)).boxes_N4.tolist() == [[2, 4, 10, 8]]


def test_voc_image_without_objects_is_kept(tmp_path: Path) -> None:
    truth = voc_of(tmp_path, voc_xml())
    assert truth.boxes_N4.shape == (0, 4)
    assert truth.difficult_N.shape == (0,)


@pytest.mark.parametrize(
    ("filename", "file_name", "aliases"),
    [
        ("a.jpg", "a.jpg", ("a",)),
        ("a", "a", ("a",)),
        (r"C:\photos\a.png", "a.png", ("a",)),
        ("copied_from.jpg", "a", ("copied_from.jpg",)),
        ("", "a", ()),
    ],
)
def test_voc_files_own_name_outranks_a_stale_filename(
    tmp_path: Path, filename: str, file_name: str, aliases: tuple[str, ...]
) -> None:
    truth = voc_of(tmp_path, voc_xml(BOX, filename=filename))
    assert (truth.file_name, truth.aliases) == (file_name, aliases)


@pytest.mark.parametrize("below", [".", "Annotations"])
def test_voc_root_and_its_annotations_folder_read_alike(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "Annotations"
    folder.mkdir()
    (folder / "b.xml").write_text(voc_xml(BOX, filename="b.jpg"))
    (folder / "a.xml").write_text(voc_xml(BOX))
    (folder / "._a.xml").write_bytes(b"\x00\x05\x16\x07")
    (folder / "readme.txt").write_text("no annotation")
    truths = read_voc(Location.parse(str(tmp_path / below)))
    assert [truth.file_name for truth in truths] == ["a.jpg", "b.jpg"]


BOMB = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;&x;">]>
<annotation><filename>&y;</filename></annotation>"""
OUTSIDE = """<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>
<annotation><filename>&x;</filename></annotation>"""


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (BOMB, "defines XML entities"),
        (OUTSIDE, "defines XML entities"),
        ("<annotation><object>", "cannot be read as XML"),
        (b"\xff\xfe\x00broken", "cannot be read as XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "cannot be read as XML"),
        ("<project/>", "its root must be <annotation>, got <project>"),
        (voc_xml("<name>no box</name>"), "object/bndbox/xmin must be a number, got None"),
        (voc_xml(BOX.replace("3", "three", 1)), "xmin must be a number, got 'three'"),
        (voc_xml(BOX.replace("3", "nan", 1)), "xmin must be a number, got 'nan'"),
        (voc_xml(BOX.replace("10", "2")), "must have xmin <= xmax"),
        (voc_xml(BOX + "<difficult>very</difficult>"), "difficult must be 0 or 1, got 'very'"),
    ],
)
def test_damaged_voc_names_file_and_reason(tmp_path: Path, xml: str | bytes, reason: str) -> None:
    with pytest.raises(DataError) as fault:
        voc_of(tmp_path, xml, name="000012.xml")
    assert "000012.xml" in str(fault.value)
    assert reason in str(fault.value)
    assert "\n" not in str(fault.value)


def test_voc_folder_without_xml_says_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.xml file: ground truth is a COCO"):
        read_voc(Location.parse(str(tmp_path)))


# ---- COCO


def test_coco_boxes_keep_their_fractions(tmp_path: Path) -> None:
    (truth,) = coco_of(tmp_path, coco_with(bbox=[1.25, 2.5, 3.5, 4.75]))
    assert truth.boxes_N4.tolist() == [[1.25, 2.5, 4.75, 7.25]]
    assert (truth.file_name, truth.width, truth.height) == ("a.jpg", None, None)


def test_coco_leaves_crowds_out_and_honours_difficult(tmp_path: Path) -> None:
    content = coco_with(iscrowd=1)
    content["annotations"] += [
        {"id": 8, "image_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 0, "difficult": 1},
        {"id": 9, "image_id": 1, "bbox": [0, 0, 6, 6]},
    ]
    (truth,) = coco_of(tmp_path, content)
    assert truth.boxes_N4.tolist() == [[0, 0, 5, 5], [0, 0, 6, 6]]
    assert truth.difficult_N.tolist() == [True, False]


def test_coco_keeps_ids_classes_areas_and_crowds_apart(tmp_path: Path) -> None:
    content = coco_with(category_id=18, area=11.5)
    more = [
        {"id": 8, "image_id": 1, "bbox": [0, 0, 4, 2], "category_id": 5, "difficult": 1},
        {"id": 9, "image_id": 1, "bbox": [1, 1, 5, 5], "category_id": 18, "iscrowd": 1},
    ]
    content |= {"annotations": content["annotations"] + more}
    content |= {"categories": [{"id": 18, "name": "dog"}]}
    (truth,) = coco_of(tmp_path, content)
    assert (truth.image_id, truth.classes_N) == (1, ("dog", "5"))
    assert truth.areas_N is not None
    assert truth.areas_N.tolist() == [11.5, 8]
    assert truth.crowds_M4.tolist() == [[1, 1, 6, 6]]
    easy = truth.without_difficult()
    assert easy.areas_N is not None
    assert (easy.classes_N, easy.areas_N.tolist()) == (("dog",), [11.5])
    assert easy.crowds_M4.shape == (1, 4)
    (bare,) = coco_of(tmp_path, coco_with())
    assert bare.classes_N == ()


def test_coco_ignores_annotations_of_images_it_does_not_list(tmp_path: Path) -> None:
    (truth,) = coco_of(tmp_path, coco_with(image_id=99))
    assert truth.boxes_N4.shape == (0, 4)


def test_coco_box_without_height_is_kept_as_mscoco_has_them(tmp_path: Path) -> None:
    (truth,) = coco_of(tmp_path, coco_with(bbox=[296.65, 388.33, 1.03, 0.0]))
    assert truth.boxes_N4.shape == (1, 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "must have the lists 'images' and 'annotations', got list"),
        ({"images": []}, "must have the lists 'images' and 'annotations', got images"),
        ({"images": {}, "annotations": []}, "must have the lists"),
        (coco_with(bbox=[1, 2, 3]), "annotation 7 has a bbox that is not [x, y, width, height]"),
        (coco_with(bbox=[1, 2, "wide", 4]), "could not convert string to float: 'wide'"),
        (coco_with(bbox=[1, 2, -3, 4]), "annotation 7 has a bbox that is not finite or has a"),
        (coco_with(bbox=[1, 2, float("nan"), 4]), "annotation 7 has a bbox that is not finite"),
        ({"images": [{"id": 1}], "annotations": []}, "an entry lacks 'file_name'"),
        ({"images": [{"id": 1, "file_name": 5}], "annotations": []}, "file_name that is no text"),
        (
            {"images": [{"id": 1, "file_name": "a"}] * 2, "annotations": []},
            "two images have the id 1",
        ),
        ({"images": [7], "annotations": []}, "is damaged"),
        (
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]},
            "an entry lacks 'bbox'",
        ),
    ],
)
def test_damaged_coco_names_file_and_reason(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(DataError) as fault:
        coco_of(tmp_path, content)
    assert "gt.json" in str(fault.value)
    assert reason in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("data", [b"{", b"\xff\xff\xff", b"[" * 200_000])
def test_file_that_is_no_json_is_a_data_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "gt.json").write_bytes(data)
    with pytest.raises(DataError, match=r"gt\.json cannot be read as JSON"):
        read_coco(Location.parse(str(tmp_path / "gt.json")))


def test_both_readers_agree_on_real_photos(shared: Path) -> None:
    folder = shared / "data" / "voc07_test_500"
    from_xml = {truth.file_name: truth for truth in read_voc(Location.parse(str(folder)))}
    from_json = read_coco(Location.parse(str(folder / "instances.json")))
    assert len(from_xml) == len(from_json) == 500
    for expected in from_json:
        found = from_xml[expected.file_name]
        np.testing.assert_array_equal(found.boxes_N4, expected.boxes_N4)
        np.testing.assert_array_equal(found.difficult_N, expected.difficult_N)
        assert (found.width, found.height) == (expected.width, expected.height)
        assert found.classes_N == expected.classes_N
        assert found.image_id == int(Path(found.file_name).stem)
