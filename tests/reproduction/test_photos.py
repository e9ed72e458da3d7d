"""Which photos a row is measured on."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import ConfigError, DataError
from pipeline.reproduction.inputs import AtHand, read_photos, weights_flag
from pipeline.storage import Location


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten photos, of which the last has no object."""
    folder = tmp_path / "voc07"
    (folder / "images").mkdir(parents=True)
    for number in range(10):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{number:03d}.png")
    images = [
        {"id": number, "file_name": f"{number:03d}.png", "width": 8, "height": 8}
        for number in range(10)
    ]
    objects = [
        {"id": 1 + number, "image_id": number, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16}
        for number in range(9)
    ]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "a"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def names(place: Path, *args: object) -> list[str]:
    return [Path(uri).stem for uri in read_photos(str(place), *args).uris]  # type: ignore[arg-type]


def test_photos_without_an_object_are_left_out(photos: Path) -> None:
    assert names(photos, None, None) == [f"{number:03d}" for number in range(9)]
    assert names(photos, None, 2) == ["000", "001"]


def test_without_lists_the_first_by_name_are_trained_on_and_the_rest_tested(photos: Path) -> None:
    trained, tested = names(photos, "trainval", None), names(photos, "test", None)
    assert (len(trained), len(tested)) == (6, 3)
    assert sorted(trained + tested) == names(photos, None, None)


def test_lists_divide_the_photos_as_voc_does(photos: Path) -> None:
    lists = photos / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("003\n001\n")
    (lists / "test.txt").write_text("005 1\n\n")
    assert names(photos, None, None) == names(photos, "trainval", None) == ["001", "003"]
    assert names(photos, "test", None) == ["005"]


def test_the_list_of_photos_is_named_by_what_it_holds(photos: Path, tmp_path: Path) -> None:
    folder = Location.parse(str(tmp_path / "lists"))
    first, more = (read_photos(str(photos), None, count) for count in (3, 4))
    first.write_list(folder)
    first.write_list(folder)
    assert Path(first.list_in(folder).path).read_text().splitlines() == list(first.uris)
    assert first.list_in(folder) != more.list_in(folder)
    assert first.list_in(folder) == read_photos(str(photos), None, 3).list_in(folder)


def test_a_place_without_annotations_is_told(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"must hold instances\.json or Annotations"):
        read_photos(str(tmp_path), None, None)


def test_data_and_weights_are_found_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for folder in ("cifar-10-batches-py", "VOCdevkit/VOC2007", "domainnet", "flowers17", "w/x"):
        (root / folder).mkdir(parents=True)
    (root / "w" / "dino_deitsmall16_pretrain.pth").touch()
    (root / "flowers17" / "dino_vitbase16_pretrain.pth").touch()
    at_hand = AtHand(root=str(root))
    # torchvision wants the parent of its own folder.
    assert at_hand.place_of("cifar10") == str(root)
    assert at_hand.place_of("voc07") == str(root / "VOCdevkit/VOC2007")
    assert at_hand.place_of("domainnet-real") == str(root / "domainnet")
    assert at_hand.place_of("svhn") is None
    assert at_hand.weights_of("vit-s16") == str(root / "w" / "dino_deitsmall16_pretrain.pth")
    # Data sets are not walked.
    assert at_hand.weights_of("vit-b16") is None
    assert AtHand().place_of("cifar10") is None


def test_what_a_flag_names_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data\.svhn: there is no /nowhere"):
        AtHand({"svhn": "/nowhere"}).place_of("svhn")
    with pytest.raises(DataError, match="--weights vit-s16: there is no /nowhere"):
        weights_flag(("vit-s16=/nowhere",))
    for wrong in ("vit-s16", f"vit-x={tmp_path}"):
        with pytest.raises(ConfigError, match="--weights must be NAME=FILE with a name of vit-s16"):
            weights_flag((wrong,))
    assert weights_flag((f"vit-s16={tmp_path}",)) == {"vit-s16": str(tmp_path)}
