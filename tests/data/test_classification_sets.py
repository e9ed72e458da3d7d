"""The door to classification data: names, splits, the paper's counts, and what is written down."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.classification import SplitConfig
from pipeline.data.classification_sets import (
    DOWNLOADABLE,
    NAMES,
    SIZES,
    ClassificationData,
    check_sizes,
    load_classification,
)
from pipeline.data.labelled_images import ArrayImages, Parts
from pipeline.errors import ConfigError, DataError
from tests.data.labelled import flat, greys, names, plant_classes
from tests.data.pictures import encode, noise

TRAIN_AND_VAL = {"train/a": 20, "train/b": 10, "val/a": 3, "val/b": 2}


def load(
    root: Path, name: str = "folder", *, seed: int = 0, **knobs: float | None
) -> ClassificationData:
    split = SplitConfig.model_validate(knobs)
    data = load_classification(name, str(root), split=split, seed=seed)
    again = pickle.loads(pickle.dumps(data))
    assert again.describe() == data.describe()
    json.dumps(data.describe())
    return data


def test_validation_split_without_a_test_split_is_the_test_set(tmp_path: Path) -> None:
    data = load(plant_classes(tmp_path, TRAIN_AND_VAL))
    assert names(data.test) == [f"val/a/{index}.png" for index in range(3)] + [
        "val/b/0.png",
        "val/b/1.png",
    ]
    assert np.bincount(data.validation.targets).tolist() == [2, 1]
    assert np.bincount(data.train.targets).tolist() == [18, 9]
    assert not set(names(data.train)) & set(names(data.validation))
    assert data.selected_on == "validation"
    assert data.classes == ("a", "b")


def test_both_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    data = load(plant_classes(tmp_path, TRAIN_AND_VAL | {"test/a": 1}), validation_fraction=0)
    assert (len(data.train), len(data.validation)) == (30, 5)
    assert names(data.test) == ["test/a/0.png"]


def test_folder_without_splits_has_no_test_set(tmp_path: Path) -> None:
    data = load(plant_classes(tmp_path, {"a": 10, "b": 10}), validation_fraction=0.2)
    assert data.test is None
    assert (len(data.train), len(data.validation)) == (16, 4)
    assert data.describe()["num_test"] == 0


def test_selection_on_the_test_set_trains_on_everything_and_says_so(tmp_path: Path) -> None:
    root = plant_classes(tmp_path, TRAIN_AND_VAL)
    for fraction in (0, 0.1):
        data = load(root, select_on_test=True, validation_fraction=fraction)
        assert len(data.train) == 30
        assert data.validation is data.test
        assert data.describe()["selected_on"] == data.selected_on == "test"
    with pytest.raises(ConfigError, match="set select_on_test"):
        load(root, validation_fraction=0)
    with pytest.raises(DataError, match="which has no test split"):
        load(tmp_path / "train", select_on_test=True)


def test_few_labels_take_the_same_images_at_any_place(tmp_path: Path) -> None:
    root = plant_classes(tmp_path / "one", TRAIN_AND_VAL)
    copy = shutil.copytree(root, tmp_path / "other" / "copy")
    few, more = load(root, train_per_class=3), load(copy, train_per_class=6)
    assert set(names(few.train)) < set(names(more.train))
    assert np.bincount(few.train.targets).tolist() == [3, 3]
    assert names(few.validation) == names(more.validation)
    assert load(copy, train_per_class=3).describe() == few.describe()


def test_fingerprint_tells_splits_labels_and_classes_apart(tmp_path: Path) -> None:
    root = plant_classes(tmp_path / "set", TRAIN_AND_VAL)
    before = load(root)
    assert load(root).fingerprint == before.fingerprint
    assert load(root, seed=1).fingerprint.images_sha256 != before.fingerprint.images_sha256
    (root / "train" / "b" / "0.png").rename(root / "train" / "a" / "extra.png")
    assert load(root).fingerprint.images_sha256 != before.fingerprint.images_sha256
    assert load(root).fingerprint.classes_sha256 == before.fingerprint.classes_sha256
    for split in ("train", "val"):
        (root / split / "b").rename(root / split / "c")
    assert load(root).fingerprint.classes_sha256 != before.fingerprint.classes_sha256


def test_fingerprint_sees_labels_that_no_name_tells(tmp_path: Path) -> None:
    found = []
    for labels in ([0, 1, 0, 1], [0, 0, 1, 1]):
        table = pa.table({"image": [encode(flat(0), "PNG")] * 4, "label": labels})
        pq.write_table(table, tmp_path / "train.parquet")
        pq.write_table(table, tmp_path / "test.parquet")
        found.append(load(tmp_path, "parquet", select_on_test=True).fingerprint)
    assert found[0].classes_sha256 == found[1].classes_sha256
    assert found[0].images_sha256 != found[1].images_sha256


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(28, 28, 32), (32, 40, 32), (64, 64, 64), (200, 180, 192), (600, 900, 224), (3, 5, 32)],
)
def test_native_size_is_that_of_the_images(
    tmp_path: Path, height: int, width: int, size: int
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(8):
            data = encode(flat(0, height, width), "PNG")
            (tmp_path / name / f"{index}.png").write_bytes(b"damaged" if index == 0 else data)
    assert load(tmp_path).native_size == size


def test_digits_are_not_mirrored(tmp_path: Path) -> None:
    digits = plant_classes(tmp_path / "digits", {str(digit): 2 for digit in range(10)})
    letters = plant_classes(tmp_path / "letters", {letter: 2 for letter in "abcdefghij"})
    assert not load(digits).mirror_safe
    assert load(letters).mirror_safe


def test_parquet_comes_through_the_same_door(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("test", 4)):
        pictures = [encode(noise(64, 70), "PNG")] * count
        table = pa.table({"image": pictures, "label": [index % 2 for index in range(count)]})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    data = load(tmp_path, "parquet")
    assert (len(data.train), len(data.validation), data.native_size) == (18, 2, 64)
    assert data.test is not None
    assert data.mirror_safe


@pytest.mark.parametrize("name", SIZES)
def test_named_sets_must_have_the_counts_of_table_1(name: str) -> None:
    num_train, num_test, num_classes = SIZES[name]

    def parts(num_train: int, num_test: int, num_classes: int) -> Parts:
        classes = tuple(str(label) for label in range(num_classes))
        train, test = (
            # One image stands for all of them.
            ArrayImages(np.zeros((1, 1, 1, 3), np.uint8), np.zeros(count, np.int64), "x")
            for count in (num_train, num_test)
        )
        return Parts(classes, train, test=test)

    check_sizes(name, "root", parts(num_train, num_test, num_classes))
    for wrong in (
        (num_train - 1, num_test, num_classes),
        (num_train, num_test + 1, num_classes),
        (num_train, num_test, num_classes - 1),
    ):
        with pytest.raises(DataError, match=rf"{name} must have {num_train:,} training .*, got "):
            check_sizes(name, "root", parts(*wrong))
    with pytest.raises(DataError, match="got 1 training images, 0 test images"):
        check_sizes(name, "root", Parts(("a",), parts(1, 1, 1).train))


@pytest.mark.parametrize("name", sorted(set(SIZES) - {"imagenet100"}))
def test_small_folder_is_not_taken_for_a_set_of_the_paper(tmp_path: Path, name: str) -> None:
    plant_classes(tmp_path, TRAIN_AND_VAL)
    with pytest.raises(DataError, match=f"{name} must have .*got 30 training images, 5 test"):
        load(tmp_path, name)


def test_imagenet_100_is_picked_out_of_imagenet(tmp_path: Path) -> None:
    plant_classes(tmp_path, {"train/n01440764": 1, "val/n01440764": 1})
    with pytest.raises(DataError, match="for each of 100 classes, got 0; missing: n01558993"):
        load(tmp_path, "imagenet100")


@pytest.mark.parametrize("name", DOWNLOADABLE)
def test_absent_or_damaged_files_tell_the_flag(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"set data\.download"):
        load(tmp_path, name)


def test_files_that_are_not_the_published_ones_are_never_unpickled(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]:
        # A pickle that would raise ZeroDivisionError.
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(b"cbuiltins\neval\n(S'1/0'\ntR.")
    with pytest.raises(DataError, match="not found or corrupted"):
        load(tmp_path, "cifar10")


def test_domains_are_read_by_their_lists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"real_train\.txt .*csr\.bu\.edu"):
        load(tmp_path, "domainnet-real")


@pytest.mark.parametrize(
    ("name", "root", "download", "message"),
    [
        ("cifar-10", "x", False, "did you mean 'cifar10'"),
        ("x", "x", False, r"data\.name must be one of imagenet, .*, parquet, got 'x'$"),
        ("folder", "x", True, r"data\.download must be false for 'folder'"),
        ("imagenet", "s3://bucket/x", False, r"data\.root must be on a disk .*'parquet'"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    name: str, root: str, download: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_classification(name, root, split=SplitConfig(), download=download)


def test_single_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at least 2 classes, got 1 \(set\)"):
        load(plant_classes(tmp_path, {"set/a": 2, "set/b": 2}))


def test_names_are_those_of_the_paper_and_two_more() -> None:
    assert {"folder", "parquet"} == set(NAMES) - set(SIZES)
    assert len(NAMES) == 14


def test_flowers17_from_end_to_end(shared: Path) -> None:
    data = load(shared / "data" / "flowers17", train_per_class=10)
    assert np.bincount(data.train.targets).tolist() == [10] * 17
    assert np.bincount(data.validation.targets).tolist() == [6] * 17
    assert data.test is not None
    assert len(data.test) == 340
    assert data.native_size == 192
    assert data.train.image(0).mode == "RGB"


@pytest.mark.slow
def test_cifar10_as_an_archive_from_end_to_end(shared: Path) -> None:
    archive = shared / "data" / "cifar10_images.tar.gz"
    data = load(archive, "cifar10", train_per_class=4)
    assert data.describe() | {"notes": [], "images_sha256": ""} == {
        "name": "cifar10",
        "num_classes": 10,
        "native_size": 32,
        "mirror_safe": True,
        "selected_on": "validation",
        "notes": [],
        "num_train": 40,
        "num_validation": 5000,
        "num_test": 10000,
        "classes_sha256": data.fingerprint.classes_sha256,
        "images_sha256": "",
    }
    assert len(greys(data.train)) == 40
