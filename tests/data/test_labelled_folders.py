"""Folders of classes: what ImageFolder lists, matched by name, and errors that say what to move."""

import os
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from pipeline.data.labelled_folders import read_folder
from pipeline.data.labelled_images import printable
from pipeline.errors import DataError
from tests.data.labelled import greys, names, plant_classes


def test_classes_and_labels_are_those_of_torchvision(tmp_path: Path) -> None:
    plant_classes(tmp_path, {"10": 2, "2": 1, "1": 3, "B": 1, "a": 1, "a/deep/er": 2, "é ü": 1})
    theirs = ImageFolder(str(tmp_path))
    parts = read_folder(str(tmp_path))
    assert list(parts.classes) == theirs.classes == ["1", "10", "2", "B", "a", "é ü"]
    expected = {os.path.relpath(path, tmp_path): label for path, label in theirs.samples}
    assert dict(zip(names(parts.train), parts.train.targets.tolist(), strict=True)) == expected
    assert parts.test is parts.validation is None
    assert parts.notes == ()


@pytest.mark.parametrize(
    ("folders", "has_validation", "has_test"),
    [
        (("train", "val"), True, False),
        (("Train", "VALID", "test"), True, True),
        (("train", "validation"), True, False),
        (("train", "test"), False, True),
        (("train", "annotations"), False, False),
    ],
)
def test_splits_are_known_by_their_folders(
    tmp_path: Path, folders: tuple[str, ...], has_validation: bool, has_test: bool
) -> None:
    plant_classes(tmp_path, {f"{split}/{name}": 2 for split in folders for name in "ab"})
    parts = read_folder(str(tmp_path))
    assert parts.classes == ("a", "b")
    assert greys(parts.train) == [1, 2, 3, 4]
    assert (parts.validation is not None, parts.test is not None) == (has_validation, has_test)
    if has_test:
        assert names(parts.test)[0] == "test/a/0.png"


def test_split_without_a_class_keeps_the_labels_of_train(tmp_path: Path) -> None:
    plant_classes(tmp_path, {"train/a": 1, "train/b": 1, "train/c": 1, "test/b": 2})
    parts = read_folder(str(tmp_path))
    assert parts.test is not None
    assert parts.test.targets.tolist() == [1, 1]


def test_what_is_no_image_is_left_out_and_counted(tmp_path: Path) -> None:
    plant_classes(tmp_path, {"a": 2, "b": 1})
    for name in ("a/.hidden.png", "a/notes.txt", "b/Thumbs.db", "b/README", "list.txt"):
        (tmp_path / name).touch()
    (tmp_path / "a" / ".cache").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "b" / "0.png").rename(tmp_path / "b" / "0.PnG")
    parts = read_folder(str(tmp_path))
    assert names(parts.train) == ["a/0.png", "a/1.png", "b/0.PnG"]
    (note,) = parts.notes
    kinds = set(note.removeprefix("files left out: ").split(", "))
    assert kinds == {"3 (hidden)", "2 .txt", "1 .db", "1 (none)", "1 (broken link)"}


def test_links_are_followed_and_loops_are_walked_once(tmp_path: Path) -> None:
    plant_classes(tmp_path / "store", {"cat": 2})
    root = plant_classes(tmp_path / "root", {"dog": 1, "dog/more": 1})
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    (root / "dog" / "linked.png").symlink_to(tmp_path / "store" / "cat" / "0.png")
    (root / "dog" / "loop").symlink_to(root / "dog")
    (root / "dog" / "again").symlink_to(root / "dog" / "more")
    found = names(read_folder(str(root)).train)
    assert found == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/linked.png", "dog/more/0.png"]


def test_class_name_that_is_no_text_is_listed_and_prints(tmp_path: Path) -> None:
    plant_classes(tmp_path, {"a": 1})
    odd = b"caf\xe9".decode(errors="surrogateescape")
    plant_classes(tmp_path, {odd: 1})
    parts = read_folder(str(tmp_path))
    assert parts.classes == ("a", r"caf\xe9")
    assert greys(parts.train) == [1, 1]
    assert printable(odd) == r"caf\xe9"


def test_only_the_wanted_classes_are_read(tmp_path: Path) -> None:
    plant_classes(tmp_path, {f"{split}/{name}": 2 for split in ("train", "val") for name in "abc"})
    parts = read_folder(str(tmp_path), wanted=("c", "a"))
    assert parts.classes == ("a", "c")
    np.testing.assert_array_equal(parts.train.targets, [0, 0, 1, 1])
    with pytest.raises(DataError, match="for each of 3 classes, got 1; missing: x, y"):
        read_folder(str(tmp_path), wanted=("a", "x", "y"))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"a": 1, "b": 0}, "must hold images, got none in b of the train split"),
        ({"train/a": 1, "val/a": 0}, "got none in a of the validation split"),
        ({"train/a": 1, "test/a": 1, "test/z": 1}, "got z besides"),
        ({"val/a": 1, "test/a": 1}, "must hold a folder train, got only test, val"),
        ({"train/a": 1, "val/a": 1, "valid/a": 1}, "one folder for the validation split"),
        ({"train": 3}, r"one folder for each class, got none \(3 files\)"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, folders: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_folder(str(plant_classes(tmp_path, folders)))


def test_missing_root_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot list .*nowhere: .*No such file"):
        read_folder(str(tmp_path / "nowhere"))


def test_flowers17_has_its_published_counts(shared: Path) -> None:
    parts = read_folder(str(shared / "data" / "flowers17"))
    assert parts.validation is not None
    assert np.bincount(parts.train.targets).tolist() == [60] * 17
    assert np.bincount(parts.validation.targets).tolist() == [20] * 17
    theirs = ImageFolder(str(shared / "data" / "flowers17" / "train"))
    assert parts.train.targets.tolist() == theirs.targets
    assert names(parts.train) == [f"train/{path.split('/train/')[1]}" for path, _ in theirs.samples]
