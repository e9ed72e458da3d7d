"""A tar archive is read as if it were unpacked, without unpacking it."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.labelled_folders import is_archive, read_archive, read_folder
from pipeline.errors import DataError
from tests.data.labelled import greys, names, plant_classes

SPLIT = {"train/a": 2, "train/b/deep": 1, "val/a": 1, "test/b": 2}


def pack(folder: Path, archive: Path, inside: str = "") -> str:
    with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as tar:
        for path in sorted(folder.iterdir(), reverse=True):
            tar.add(path, f"{inside}{path.name}")
    return str(archive)


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "SET.TGZ"])
@pytest.mark.parametrize("inside", ["", "./", "cifar/"])
def test_archive_gives_what_the_folder_gives(tmp_path: Path, name: str, inside: str) -> None:
    folder = plant_classes(tmp_path / "set", SPLIT)
    (folder / "README.md").touch()
    unpacked = read_folder(str(folder))
    packed = read_archive(pack(folder, tmp_path / name, inside))
    assert is_archive(name)
    assert packed.classes == unpacked.classes == ("a", "b")
    for ours, theirs in (
        (packed.train, unpacked.train),
        (packed.validation, unpacked.validation),
        (packed.test, unpacked.test),
    ):
        assert ours is not None
        assert theirs is not None
        assert greys(ours) == greys(theirs)
        assert ours.targets.tolist() == theirs.targets.tolist()
        prefix = inside.removeprefix("./")
        assert names(ours) == [f"{prefix}{name}" for name in names(theirs)]


def test_archive_without_splits_is_all_training_images(tmp_path: Path) -> None:
    folder = plant_classes(tmp_path / "set", {"a": 2, "b": 1})
    parts = read_archive(pack(folder, tmp_path / "set.tar", "around/"))
    assert (parts.classes, greys(parts.train)) == (("a", "b"), [1, 2, 3])
    assert parts.validation is parts.test is None


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    folder = plant_classes(tmp_path / "set", {"a": 1, "b": 1})
    for name in ("a/x.txt", "a/.y.png", "README"):
        (folder / name).touch()
    left_out, _ = read_archive(pack(folder, tmp_path / "set.tar")).notes
    assert set(left_out.removeprefix("files left out: ").split(", ")) == {
        "1 .txt",
        "1 (hidden)",
        "1 (none)",
    }


def test_too_large_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    archive = pack(plant_classes(tmp_path / "set", SPLIT), tmp_path / "set.tar")
    with pytest.raises(DataError, match=r"at most 300 bytes .* unpack it"):
        read_archive(archive, max_bytes=300)


def test_damaged_archive_is_named(tmp_path: Path) -> None:
    archive = Path(pack(plant_classes(tmp_path / "set", SPLIT), tmp_path / "set.tar.gz"))
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(DataError, match=r"set\.tar\.gz as a tar archive"):
        read_archive(str(archive))
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.tar"):
        read_archive(str(tmp_path / "nowhere.tar"))


def test_archive_without_classes_is_refused(tmp_path: Path) -> None:
    folder = plant_classes(tmp_path / "set", {"": 3})
    with pytest.raises(DataError, match="must hold train/<class>/<image>"):
        read_archive(pack(folder, tmp_path / "set.tar"))


@pytest.mark.slow
def test_cifar10_archive_has_every_image_in_its_class(shared: Path) -> None:
    parts = read_archive(str(shared / "data" / "cifar10_images.tar.gz"))
    assert parts.test is not None
    assert np.bincount(parts.train.targets).tolist() == [5000] * 10
    assert np.bincount(parts.test.targets).tolist() == [1000] * 10
    assert parts.test.name(0) == "test/airplane/0000.jpg"
    assert {parts.train.image(index).size for index in range(0, 50_000, 5_000)} == {(32, 32)}
