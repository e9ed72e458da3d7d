"""DomainNet by its official lists: their labels, nothing moved, and all images there."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.config.classification import DOMAINS
from pipeline.data.classification_sets import WNIDS, read_domain
from pipeline.errors import DataError
from tests.data.labelled import greys, names, plant_classes

# As in the real lists, "t-shirt" comes after "tree", for the hyphen does not count.
TRAIN = ("sketch/Axe/0.png 0", "sketch/tree/0.png 1", "sketch/tree/1.png 1")
TEST = ("sketch/t-shirt/0.png 2", "sketch/Axe/1.png 0")


def plant(root: Path, train: Sequence[str] = TRAIN, test: Sequence[str] = TEST) -> str:
    plant_classes(root, {"sketch/Axe": 2, "sketch/tree": 2, "sketch/t-shirt": 1})
    (root / "sketch_train.txt").write_text("\n".join(train) + "\n\n")
    (root / "sketch_test.txt").write_text("\r\n".join(test))
    return str(root)


def test_labels_and_names_are_those_of_the_lists(tmp_path: Path) -> None:
    parts = read_domain(plant(tmp_path), "sketch")
    assert parts.classes == ("Axe", "tree", "t-shirt")
    assert parts.train.targets.tolist() == [0, 1, 1]
    assert names(parts.train) == [line.split()[0] for line in TRAIN]
    assert greys(parts.train) == [1, 3, 4]
    assert parts.test is not None
    assert (parts.test.targets.tolist(), greys(parts.test)) == ([2, 0], [5, 2])
    assert parts.validation is None


def test_file_names_may_hold_spaces(tmp_path: Path) -> None:
    root = plant(tmp_path, (*TRAIN[:2], "sketch/tree/a b.png 1"))
    (tmp_path / "sketch/tree/1.png").rename(tmp_path / "sketch/tree/a b.png")
    assert greys(read_domain(root, "sketch").train) == [1, 3, 4]


def test_missing_list_says_where_it_is_published(tmp_path: Path) -> None:
    root = plant(tmp_path)
    (tmp_path / "sketch_test.txt").unlink()
    where = r"csr\.bu\.edu/ftp/visda/2019/multi-source/domainnet/txt/sketch_test\.txt"
    with pytest.raises(DataError, match=rf"sketch_test\.txt .*get it from {where}"):
        read_domain(root, "sketch")


def test_missing_images_are_counted_before_training(tmp_path: Path) -> None:
    root = plant(tmp_path, (*TRAIN, "sketch/tree/9.png 1", "sketch/gone/1.png 3"))
    message = r"the 7 images .* 2 are missing, such as sketch/tree/9\.png: unpack .*/sketch\.zip"
    with pytest.raises(DataError, match=message):
        read_domain(root, "sketch")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (("sketch/Axe/0.png",), "line 1: must be domain/class/image and a label"),
        (("sketch/Axe/0.png 0", "Axe.png 1"), "line 2: .*got 'Axe.png 1'"),
        (("sketch/Axe/0.png 0", "sketch/tree/0.png 0"), "label 0 for 'Axe' and 'tree'"),
        (("sketch/Axe/0.png 0", "sketch/tree/0.png 5"), "without a gap, got 3 labels up to 5"),
        (("sketch/Axe/0.png 0", "sketch/Axe/1.png 1"), "without a gap"),
    ],
)
def test_lists_that_contradict_themselves_are_refused(
    tmp_path: Path, train: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_domain(plant(tmp_path, train), "sketch")


def test_there_are_six_domains_and_a_hundred_classes_of_imagenet() -> None:
    assert len(set(DOMAINS)) == 6
    assert len(set(WNIDS)) == 100
    assert list(WNIDS) == sorted(WNIDS)
    assert {"n02869837", "n01749939", "n02090622"} <= set(WNIDS)
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in WNIDS)
