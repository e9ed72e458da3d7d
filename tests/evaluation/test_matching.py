"""Which label goes to which annotated image."""

import numpy as np
import pytest

from pipeline.boxes import as_boxes
from pipeline.data.ground_truth import GroundTruth
from pipeline.errors import DataError
from pipeline.evaluation.predictions import Prediction, match


def truths(*names: str, aliases: tuple[str, ...] = ()) -> list[GroundTruth]:
    box, easy = as_boxes([[0, 0, 1, 1]]), np.array([False])
    return [GroundTruth(name, box, easy, None, None, aliases) for name in names]


def matched(labels: list[str], annotated: list[GroundTruth]) -> list[str | None]:
    found = match([Prediction(name, (0, 0, 1, 1)) for name in labels], annotated).predictions
    return [None if label is None else label.name for label in found]


@pytest.mark.parametrize(
    ("label", "annotated"),
    [
        ("/data/images/1.jpg", "1.jpg"),
        ("s3://bucket/train/1.jpg", "train/1.jpg"),
        ("/data/photos.parquet#17/1.jpg", "1.jpg"),
        ("1.jpg", "1.jpg"),
        ("1.jpg", "train2014/1.jpg"),
        ("/data/1.jpeg", "1.jpg"),
        ("/data/1.jpg", "1"),
        ("/data/photo.v2.jpg", "photo.v2"),
        ("1", "1.jpg"),
        ("/data/1.jpg", "./1.jpg"),
        ("/data/train/1.jpg", "train\\1.jpg"),
    ],
)
def test_names_of_one_image_find_each_other(label: str, annotated: str) -> None:
    assert matched([label], truths(annotated)) == [label]


@pytest.mark.parametrize(
    ("label", "annotated"),
    [
        ("/data/11.jpg", "1.jpg"),
        ("/data/val/1.jpg", "train/1.jpg"),
        ("/data/1.jpg/readme", "1.jpg"),
        ("/data/1.JPG.bak", "1.jpg"),
    ],
)
def test_names_of_other_images_do_not(label: str, annotated: str) -> None:
    with pytest.raises(DataError, match="no label belongs to an annotated image") as fault:
        matched([label], truths(annotated))
    assert label in str(fault.value)
    assert annotated in str(fault.value)


def test_the_longest_suffix_wins() -> None:
    labels = ["/data/val/1.jpg", "/data/1.jpg"]
    assert matched(labels, truths("1.jpg", "val/1.jpg")) == ["/data/1.jpg", "/data/val/1.jpg"]


def test_the_whole_name_outranks_one_without_extension() -> None:
    labels = ["/masks/1.png", "/photos/1.jpg"]
    found = match([Prediction(name, None) for name in labels], truths("1.jpg"))
    assert [label and label.name for label in found.predictions] == ["/photos/1.jpg"]
    assert found.num_unmatched == 1


def test_stem_of_two_annotated_images_decides_nothing() -> None:
    labels = ["/a/1.jpg", "/a/2.webp"]
    assert matched(labels, truths("1.jpg", "2.png", "2.gif")) == ["/a/1.jpg", None, None]


def test_aliases_are_tried_where_the_name_fails() -> None:
    assert matched(["/a/old.jpg"], truths("new", aliases=("old.png",))) == ["/a/old.jpg"]
    assert matched(["/a/old.jpg", "/a/new.jpg"], truths("new", aliases=("old.png",))) == [
        "/a/new.jpg"
    ]


def test_images_without_a_label_and_labels_without_an_image_are_told() -> None:
    labels = [Prediction(name, None) for name in ("/a/1.jpg", "/a/8.jpg", "/a/9.jpg")]
    found = match(labels, truths("1.jpg", "2.jpg"))
    assert found.predictions == [labels[0], None]
    assert found.num_unmatched == 2


def test_two_labels_of_one_image_are_both_named() -> None:
    with pytest.raises(DataError, match=r"1\.jpg has /train/1\.jpg and /val/1\.jpg"):
        matched(["/train/1.jpg", "/val/1.jpg"], truths("1.jpg"))


def test_image_listed_twice_is_named() -> None:
    with pytest.raises(DataError, match=r"lists the image b/1\.jpg twice"):
        matched(["a/1.jpg"], truths("a/1.jpg", "b/1.jpg", "b/1.jpg"))


def test_empty_sides_are_told_apart() -> None:
    with pytest.raises(DataError, match="--labels holds no image"):
        matched([], truths("1.jpg"))
    with pytest.raises(DataError, match="the ground truth holds no image"):
        matched(["1.jpg"], [])
