import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from pipeline.boxes import Boxes, area, pairwise_iou, xywh_to_xyxy
from pipeline.errors import ConfigError, StorageError
from pipeline.scenes.scenes import MIN_SIDE, SIZES, Scene, make_scene, write_collection
from tests.conftest import ROOT

SHAPES = [(480, 360), (360, 480), (300, 300), (64, 64), (64, 200), (200, 64)]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Scenes of every form, from thumbnails on, with one to six objects."""
    counts = [None, 1, 3, 6]
    plans = itertools.islice(zip(itertools.cycle(SHAPES), itertools.cycle(counts)), 48)
    return [
        make_scene(seed, width=width, height=height, num_objects=count)
        for seed, ((width, height), count) in enumerate(plans)
    ]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "collection"
    return write_collection(folder, num_scenes=9, seed=3)


def digest(scene: Scene) -> str:
    whole = hashlib.sha256(scene.pixels_HW3.tobytes())
    whole.update(scene.boxes_N4.tobytes() + scene.masks_NHW.tobytes())
    whole.update(",".join(scene.category_N).encode())
    return whole.hexdigest()


def covering_box(mask_HW: NDArray[np.bool_]) -> list[int]:
    """Row by row and column by column, written to be obviously right."""
    ys = [y for y, row_W in enumerate(mask_HW.tolist()) if any(row_W)]
    xs = [x for x, column_H in enumerate(mask_HW.T.tolist()) if any(column_H)]
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


def test_boxes_are_tight_around_the_visible_pixels(scenes: list[Scene]) -> None:
    for scene in scenes:
        expected = [covering_box(mask_HW) for mask_HW in scene.masks_NHW]
        assert scene.boxes_N4.tolist() == expected


def test_every_part_of_a_scene_has_the_promised_type_and_shape(scenes: list[Scene]) -> None:
    for scene, (width, height) in zip(scenes, itertools.cycle(SHAPES), strict=False):
        count = len(scene.category_N)
        assert scene.pixels_HW3.dtype == np.uint8
        assert scene.pixels_HW3.shape == (height, width, 3)
        assert scene.boxes_N4.dtype == np.float64
        assert scene.boxes_N4.shape == (count, 4)
        assert scene.masks_NHW.dtype == bool
        assert scene.masks_NHW.shape == (count, height, width)


def test_no_pixel_belongs_to_two_objects(scenes: list[Scene]) -> None:
    assert max(scene.masks_NHW.sum(axis=0).max() for scene in scenes) == 1


def test_every_object_can_be_seen(scenes: list[Scene]) -> None:
    for scene in scenes:
        visible_N = scene.masks_NHW.sum(axis=(1, 2))
        assert visible_N.min() >= 40
        # A thin flower fills least of its box.
        assert (visible_N / area(scene.boxes_N4)).min() > 0.15


def test_objects_differ_from_the_ground_beside_them(scenes: list[Scene]) -> None:
    """A mask that lay beside its object would see the same colours inside and around it."""
    differences = []
    for scene in scenes:
        x0, y0, x1, y1 = scene.boxes_N4[0].astype(int)
        crop, inside = scene.pixels_HW3[y0:y1, x0:x1], scene.masks_NHW[0, y0:y1, x0:x1]
        outside = (scene.masks_NHW.sum(axis=0) == 0)[y0:y1, x0:x1]
        differences.append(np.abs(crop[inside].mean(axis=0) - crop[outside].mean(axis=0)).max())
    assert np.median(differences) > 25


@pytest.mark.parametrize("count", range(1, 7))
def test_num_objects_is_kept(count: int) -> None:
    for seed in range(5):
        assert len(make_scene(seed, width=96, height=64, num_objects=count).boxes_N4) == count


def test_scenes_left_to_themselves_hold_one_to_three_objects() -> None:
    counts = [len(make_scene(seed, width=64, height=64).boxes_N4) for seed in range(60)]
    assert set(counts) == {1, 2, 3}
    assert counts.count(1) > counts.count(3)


def test_the_same_seed_gives_the_same_bytes_whatever_was_made_before() -> None:
    first = digest(make_scene(11, width=160, height=120))
    make_scene(12, width=100, height=100)
    assert digest(make_scene(11, width=160, height=120)) == first


def test_another_process_makes_the_same_scene() -> None:
    code = (
        "import hashlib; from pipeline.scenes.scenes import make_scene; "
        "print(hashlib.sha256(make_scene(11, width=160, height=120).pixels_HW3).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    here = hashlib.sha256(make_scene(11, width=160, height=120).pixels_HW3.tobytes()).hexdigest()
    assert done.stdout.strip() == here


def test_scenes_of_different_seeds_differ() -> None:
    assert len({digest(make_scene(seed, width=64, height=64)) for seed in range(40)}) == 40


def test_all_kinds_of_object_appear_and_fill_a_tenth_of_the_picture_or_more() -> None:
    main = [make_scene(seed, width=120, height=90, num_objects=1) for seed in range(150)]
    assert len({scene.category_N[0] for scene in main}) >= 10
    shares = np.concatenate([area(scene.boxes_N4) for scene in main]) / (120 * 90)
    assert shares.min() > 0.04
    assert 0.12 < np.median(shares) < 0.35
    assert shares.max() < 0.48


def test_boxes_that_ignore_the_picture_find_little() -> None:
    """Full image and central 70 %: CorLoc must come from looking, or the demo shows nothing."""
    width, height = 120, 90
    scenes = [make_scene(seed, width=width, height=height) for seed in range(200)]
    scale = [width, height, width, height]
    guesses: Boxes = np.array([[0.0, 0.0, 1.0, 1.0], [0.15, 0.15, 0.85, 0.85]]) * scale
    hits = [pairwise_iou(guesses, scene.boxes_N4).max(axis=1) >= 0.5 for scene in scenes]
    full, central = np.mean(hits, axis=0)
    assert full < 0.1
    assert central < 0.3


@pytest.mark.parametrize(
    ("seed", "width", "height", "count", "message"),
    [
        (-1, 64, 64, None, r"seed must be an integer from 0, got -1"),
        (0, 63, 64, None, r"at least 64, got 63x64"),
        (0, 64, 0, None, r"at least 64, got 64x0"),
        (0, 64, 64, 0, r"num_objects must be in \[1, 6\], got 0"),
        (0, 64, 64, 7, r"num_objects must be in \[1, 6\], got 7"),
    ],
)
def test_values_outside_their_range_are_named(
    seed: int, width: int, height: int, count: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scene(seed, width=width, height=height, num_objects=count)


def test_collection_lists_exactly_the_images_on_disk(collection: Path) -> None:
    images = json.loads(collection.read_text())["images"]
    root = collection.parent / "images"
    on_disk = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {image["file_name"] for image in images} == on_disk
    assert len(images) == len(on_disk) == 9
    for image in images:
        with Image.open(root / image["file_name"]) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert picture.size == (image["width"], image["height"])


def test_collection_holds_the_sizes_in_turn_in_folders_by_form(collection: Path) -> None:
    images = json.loads(collection.read_text())["images"]
    sizes = [(image["width"], image["height"]) for image in images]
    assert sizes == list(itertools.islice(itertools.cycle(SIZES), 9))
    assert {image["file_name"].split("/")[0] for image in images} == {
        "landscape",
        "portrait",
        "square",
    }
    for image in images:
        form = image["file_name"].split("/")[0]
        assert (form == "portrait") == (image["width"] < image["height"])
        assert (form == "square") == (image["width"] == image["height"])


def test_pycocotools_reads_the_collection_as_it_was_made(collection: Path) -> None:
    coco = COCO(str(collection))
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(annotations) >= 9
    assert {category["id"] for category in coco.loadCats(coco.getCatIds())} >= {
        annotation["category_id"] for annotation in annotations
    }
    for annotation in annotations:
        mask_HW = coco.annToMask(annotation).astype(bool)
        assert mask_HW.sum() == annotation["area"]
        box = xywh_to_xyxy(annotation["bbox"])[0]
        assert box.tolist() == covering_box(mask_HW)
        image = coco.loadImgs(annotation["image_id"])[0]
        assert (box >= 0).all()
        assert box[2] <= image["width"]
        assert box[3] <= image["height"]


def test_the_same_collection_is_made_again(collection: Path, tmp_path: Path) -> None:
    again = write_collection(tmp_path / "again", num_scenes=9, seed=3)
    assert again.read_bytes() == collection.read_bytes()
    for path in collection.parent.rglob("*.jpg"):
        twin = again.parent / path.relative_to(collection.parent)
        assert twin.read_bytes() == path.read_bytes()


def test_a_larger_collection_begins_with_the_smaller_one(collection: Path, tmp_path: Path) -> None:
    longer = json.loads(write_collection(tmp_path / "x", num_scenes=11, seed=3).read_text())
    shorter = json.loads(collection.read_text())
    assert longer["images"][:9] == shorter["images"]
    assert longer["annotations"][: len(shorter["annotations"])] == shorter["annotations"]


def test_collections_of_neighbouring_seeds_share_no_scene(tmp_path: Path) -> None:
    folders = [tmp_path / str(seed) for seed in (3, 4)]
    for seed, folder in zip((3, 4), folders, strict=True):
        write_collection(folder, num_scenes=6, seed=seed, sizes=[(MIN_SIDE, MIN_SIDE)])
    first, second = ({path.read_bytes() for path in folder.rglob("*.jpg")} for folder in folders)
    assert len(first) == len(second) == 6
    assert not first & second


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(StorageError, match="is not empty; name a new folder"):
        write_collection(tmp_path, num_scenes=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("num_scenes", "seed", "sizes", "message"),
    [
        (0, 0, SIZES, "num_scenes must be at least 1, got 0"),
        (1, -1, SIZES, "seed must be an integer from 0, got -1"),
        (1, 0, [], "sizes must name at least one"),
        (1, 0, [(100, 100), (100, 10)], "at least 64, got 100x10"),
    ],
)
def test_nothing_is_written_where_the_plan_is_wrong(
    num_scenes: int, seed: int, sizes: list[tuple[int, int]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_collection(tmp_path / "new", num_scenes=num_scenes, seed=seed, sizes=sizes)
    assert not (tmp_path / "new").exists()
