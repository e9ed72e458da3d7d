"""The publishers' files of CIFAR, SVHN and Flowers102, in their real formats but small.

torchvision compares every file with its published checksum, which small files cannot have. So the
readers are given torchvision's own classes without the checksums; that the checksums are looked at
otherwise is tested in test_classification.py.
"""

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from pipeline.data.classification_sets import read_cifar, read_flowers, read_svhn
from pipeline.errors import DataError
from tests.data.labelled import flat, greys, names
from tests.data.pictures import encode


class UncheckedCIFAR10(datasets.CIFAR10):  # type: ignore[misc]
    train_list: ClassVar[Any] = [[name, None] for name, _ in datasets.CIFAR10.train_list]
    test_list: ClassVar[Any] = [[name, None] for name, _ in datasets.CIFAR10.test_list]
    meta: ClassVar[Any] = datasets.CIFAR10.meta | {"md5": None}


class UncheckedCIFAR100(datasets.CIFAR100):  # type: ignore[misc]
    train_list: ClassVar[Any] = [[name, None] for name, _ in datasets.CIFAR100.train_list]
    test_list: ClassVar[Any] = [[name, None] for name, _ in datasets.CIFAR100.test_list]
    meta: ClassVar[Any] = datasets.CIFAR100.meta | {"md5": None}


class UncheckedSVHN(datasets.SVHN):  # type: ignore[misc]
    split_list: ClassVar[Any] = {
        name: [*row[:2], None] for name, row in datasets.SVHN.split_list.items()
    }


class UncheckedFlowers(datasets.Flowers102):  # type: ignore[misc]
    _file_dict: ClassVar[Any] = {
        key: (name, None) for key, (name, _) in datasets.Flowers102._file_dict.items()
    }


def rows(count: int) -> Any:
    """Images of which each channel has a value of its own, as CIFAR lays them out."""
    channels = [np.full((count, 32 * 32), 10 * channel, np.uint8) for channel in range(3)]
    return np.concatenate(channels, axis=1) + np.arange(count, dtype=np.uint8)[:, None]


def plant_cifar(folder: Path, files: dict[str, Any]) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))


def test_cifar10_is_all_batches_and_the_names(tmp_path: Path) -> None:
    batches: dict[str, Any] = {
        f"data_batch_{number}": {"data": rows(2), "labels": [number, 0]} for number in range(1, 6)
    }
    others = {
        "test_batch": {"data": rows(3), "labels": [9, 8, 7]},
        "batches.meta": {"label_names": [f"name {label}" for label in range(10)]},
    }
    plant_cifar(tmp_path / "cifar-10-batches-py", batches | others)
    parts = read_cifar(str(tmp_path), source=UncheckedCIFAR10)
    assert parts.classes == tuple(f"name {label}" for label in range(10))
    assert parts.train.targets.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert parts.test is not None
    assert parts.test.targets.tolist() == [9, 8, 7]
    assert parts.train.image(1).getpixel((31, 0)) == (1, 11, 21)
    assert greys(parts.test) == [0, 1, 2]
    assert names(parts.test)[2] == "test/00002"
    assert parts.validation is None


def test_cifar100_has_the_fine_labels(tmp_path: Path) -> None:
    files = {
        "train": {"data": rows(2), "fine_labels": [99, 3], "coarse_labels": [1, 2]},
        "test": {"data": rows(1), "fine_labels": [50], "coarse_labels": [1]},
        "meta": {"fine_label_names": [f"fine {label}" for label in range(100)]},
    }
    plant_cifar(tmp_path / "cifar-100-python", files)
    parts = read_cifar(str(tmp_path), source=UncheckedCIFAR100)
    assert (len(parts.classes), parts.classes[99]) == (100, "fine 99")
    assert parts.train.targets.tolist() == [99, 3]


def test_svhn_calls_its_ten_zero_and_keeps_images_upright(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3, 4), np.uint8)
    pixels[5, 20, 1] = [10, 11, 12, 13]
    for name in ("train_32x32.mat", "test_32x32.mat"):
        labels = np.array([[10], [1], [9], [10]], np.uint8)
        scipy.io.savemat(tmp_path / name, {"X": pixels, "y": labels})
    parts = read_svhn(str(tmp_path), source=UncheckedSVHN)
    assert parts.train.targets.tolist() == [0, 1, 9, 0]
    assert parts.train.targets.dtype == np.int64
    assert parts.classes == tuple("0123456789")
    # Row 5, column 20: in Pillow's order x = 20, y = 5.
    assert parts.train.image(2).getpixel((20, 5)) == (0, 12, 0)
    assert parts.test is not None


def test_flowers_train_on_both_of_the_lists_that_are_no_test(tmp_path: Path) -> None:
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 8):
        picture = encode(flat(number * 20), "PNG")
        (folder / "jpg" / f"image_{number:05d}.jpg").write_bytes(picture)
    labels = np.array([[102, 1, 2, 3, 4, 5, 6]], np.uint8)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels})
    lists = {"trnid": [[7, 1]], "valid": [[3, 2]], "tstid": [[4, 5, 6]]}
    scipy.io.savemat(folder / "setid.mat", lists)
    parts = read_flowers(str(tmp_path), source=UncheckedFlowers)
    assert parts.train.targets.tolist() == [5, 101, 1, 0]
    assert greys(parts.train) == [140, 20, 60, 40]
    assert parts.validation is None
    assert parts.test is not None
    assert (parts.test.targets.tolist(), greys(parts.test)) == ([2, 3, 4], [80, 100, 120])
    assert parts.train.name(0) == "jpg/image_00007.jpg"
    assert (len(parts.classes), parts.classes[0]) == (102, "pink primrose")


@pytest.mark.parametrize(
    ("read", "source"),
    [
        (read_cifar, UncheckedCIFAR10),
        (read_svhn, UncheckedSVHN),
        (read_flowers, UncheckedFlowers),
    ],
)
def test_absent_files_are_a_data_error_that_tells_the_flag(
    tmp_path: Path, read: Any, source: Any
) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path} .*not found.*set data\.download"):
        read(str(tmp_path), source=source)


def test_download_that_fails_is_a_data_error(tmp_path: Path) -> None:
    class Unreachable(UncheckedSVHN):
        # Port 9 of this machine: nobody listens.
        split_list: ClassVar[Any] = {
            "train": ["http://127.0.0.1:9/train_32x32.mat", "train_32x32.mat", "0" * 32]
        }

    with pytest.raises(DataError, match=r"refused.*unpack the publisher's files"):
        read_svhn(str(tmp_path), download=True, source=Unreachable)
