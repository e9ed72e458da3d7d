"""Images without labels are the same from wherever they come, and whether they are kept or not."""

import logging
import pickle
import tarfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.config.settings import LoaderConfig
from pipeline.data.labelled_images import LabelledImages
from pipeline.data.loader import ShardedBatchSampler, train_loader
from pipeline.data.seeding import seeded
from pipeline.errors import ConfigError, DataError
from pipeline.pretraining.images import (
    Joined,
    Preloaded,
    preload,
    random_square,
    read_unlabelled,
    shrink,
)
from tests.data.labelled import greys, names
from tests.data.pictures import Pixels, encode

SIZES = [(20, 30), (30, 20), (16, 16), (50, 20), (17, 19), (9, 12), (12, 40)]
SIDE = 16


def picture(index: int) -> Pixels:
    """Noise, but its first pixel tells which it is."""
    pixels = np.random.default_rng(index).integers(0, 256, (*SIZES[index], 3), dtype=np.uint8)
    pixels[0, 0] = index
    return pixels


def plant(root: Path, chosen: Iterable[int] = range(len(SIZES))) -> Path:
    """Image ``index`` at root/<odd or even>/<index>.png, and a file that is none."""
    root.mkdir(parents=True)
    (root / "README.md").touch()
    for index in chosen:
        path = root / ("odd" if index % 2 else "even") / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture(index), "PNG"))
    return root


def images_below(root: Path) -> list[Path]:
    return sorted(root.rglob("*.png"))


def as_folder(root: Path) -> str:
    return str(root)


def as_glob(root: Path) -> str:
    return f"{root}/*/*.png"


def as_list(root: Path) -> str:
    lines = [str(path.relative_to(root)) for path in reversed(images_below(root))]
    (root / "list.txt").write_text("# backwards\n" + "\n".join(lines))
    return str(root / "list.txt")


def as_parquet_list(root: Path) -> str:
    uris = [str(path) for path in reversed(images_below(root))]
    pq.write_table(pa.table({"uri": uris}), root / "list.parquet")
    return str(root / "list.parquet")


def as_table(root: Path) -> str:
    data = [path.read_bytes() for path in images_below(root)]
    pq.write_table(pa.table({"image": data}), root / "table.parquet", row_group_size=2)
    return str(root / "table.parquet")


def as_archive(root: Path, ending: str = "tar") -> str:
    with tarfile.open(f"{root}.{ending}", "w:gz" if ending != "tar" else "w") as tar:
        for path in reversed(sorted(root.rglob("*.*"))):
            tar.add(path, path.relative_to(root))
    return f"{root}.{ending}"


def as_zipped_archive(root: Path) -> str:
    return as_archive(root, "tar.gz")


FORMS = [as_folder, as_glob, as_list, as_parquet_list, as_table, as_archive, as_zipped_archive]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_images_are_the_same_in_every_form_and_order(
    tmp_path: Path, form: Callable[[Path], str]
) -> None:
    images = read_unlabelled([form(plant(tmp_path / "set"))])
    # By path: the even ones come first.
    assert greys(images) == [0, 2, 4, 6, 1, 3, 5]
    for place, index in enumerate(greys(images)):
        assert np.array_equal(np.asarray(images.image(place)), picture(index))
    assert len(images) == len(SIZES)
    assert images.targets.tolist() == [0] * len(SIZES)
    assert len(set(names(images))) == len(SIZES)


def test_several_texts_are_one_collection_in_their_order(tmp_path: Path) -> None:
    first = plant(tmp_path / "first", [3, 1])
    second = as_archive(plant(tmp_path / "second", [0]))
    third = as_list(plant(tmp_path / "third", [6, 2, 5]))
    images = read_unlabelled([str(first), second, third])
    assert greys(images) == [1, 3, 0, 2, 6, 5]
    assert images.targets.tolist() == [0] * 6
    assert names(images) == [
        f"{first}/odd/1.png",
        f"{first}/odd/3.png",
        "even/0.png",
        *(f"{tmp_path}/third/{name}.png" for name in ("even/2", "even/6", "odd/5")),
    ]
    swapped = read_unlabelled([third, str(first)])
    assert greys(swapped) == [2, 6, 5, 1, 3]


def test_nothing_to_read_is_said_of_what(tmp_path: Path) -> None:
    plant(tmp_path / "none", [])
    with pytest.raises(DataError, match=r"no images in .*none"):
        read_unlabelled([str(tmp_path / "none")])
    with pytest.raises(DataError, match=r"none\.tar must hold images, got none"):
        read_unlabelled([as_archive(tmp_path / "none")])
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.tar"):
        read_unlabelled([str(tmp_path / "nowhere.tar")])
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_unlabelled([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="ftp"):
        read_unlabelled(["ftp://host/images"])


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (16, 16), (7, 9), (333, 21), (1, 5)])
@pytest.mark.parametrize("side", [16, 5, 40])
def test_the_shorter_side_becomes_what_it_should(size: tuple[int, int], side: int) -> None:
    small = shrink(Image.new("RGB", size), side)
    assert min(small.size) == side
    wanted = [length * side / min(size) for length in size]
    assert small.size == pytest.approx(wanted, abs=0.5)
    # Kept images are asked for again.
    assert shrink(small, side) is small


@pytest.mark.parametrize("size", [(16, 19), (20, 16), (16, 16)])
def test_squares_lie_everywhere_along_the_longer_side_and_nowhere_else(
    size: tuple[int, int],
) -> None:
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    found = set()
    for index in range(100):
        with seeded("augment", 0, 0, index):
            square = random_square(Image.fromarray(pixels), side=16)
        assert (square.shape, square.dtype) == ((3, 16, 16), torch.uint8)
        x0, y0 = (int(corner) for corner in square[:2, 0, 0])
        wanted = pixels[y0 : y0 + 16, x0 : x0 + 16].transpose(2, 0, 1)
        assert np.array_equal(square.numpy(), wanted)
        found.add((x0, y0))
    assert found == {(x, y) for x in range(width - 15) for y in range(height - 15)}


def batches(images: LabelledImages, *, num_workers: int = 0, bad: float = 1.0) -> list[Tensor]:
    """Two epochs of squares."""
    loader = train_loader(
        images,
        partial(random_square, side=SIDE),
        sampler=ShardedBatchSampler(len(images), batch_size=3, seed=5),
        config=LoaderConfig(loader_workers=num_workers, max_bad_fraction=bad),
    )
    found = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found += [batch.images_B3HW for batch in loader]
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_kept_images_give_the_squares_that_streamed_ones_give(
    tmp_path: Path, form: Callable[[Path], str]
) -> None:
    streamed = read_unlabelled([form(plant(tmp_path / "set"))])
    kept = preload(streamed, SIDE, limit_mib=1)
    assert isinstance(kept, Preloaded)
    assert names(kept) == names(streamed)
    assert kept.targets.tolist() == streamed.targets.tolist()
    squares = batches(streamed)
    assert same(batches(kept), squares)
    # Or one epoch's squares would do for all.
    assert not torch.equal(torch.cat(squares[:2]), torch.cat(squares[2:]))


@pytest.mark.slow
def test_loader_processes_give_the_same_squares(tmp_path: Path) -> None:
    archive = as_archive(plant(tmp_path / "packed", [0, 5, 6]))
    images = read_unlabelled([str(plant(tmp_path / "set", [1, 2, 3, 4])), archive])
    kept = preload(images, SIDE, limit_mib=1)
    wanted = batches(images)
    for one in (images, kept):
        assert same(batches(one, num_workers=1), wanted)


def test_collections_survive_pickling(tmp_path: Path) -> None:
    images = read_unlabelled([str(plant(tmp_path / "a", [1, 2])), str(plant(tmp_path / "b", [3]))])
    assert isinstance(images, Joined)
    for one in (images, preload(images, SIDE, limit_mib=1)):
        copied = pickle.loads(pickle.dumps(one))
        assert names(copied) == names(images)
        for index in range(3):
            assert copied.image(index).tobytes() == one.image(index).tobytes()


def test_kept_images_take_no_more_than_the_limit(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    # 3 * 256 * 512 bytes once shrunk: 0.375 MiB each.
    for index in range(8):
        Image.new("RGB", (100, 50), (index, 0, 0)).save(root / f"{index}.png")
    images = read_unlabelled([str(root)])
    assert isinstance(preload(images, 256, limit_mib=3), Preloaded)
    assert preload(images, 256, limit_mib=2) is images
    assert preload(images, 256, limit_mib=0) is images
    assert isinstance(preload(images, 128, limit_mib=1), Preloaded)


def damaged(root: Path) -> Path:
    """A folder in which 2 is no image, 3 is cut short and 5 is empty."""
    plant(root)
    (root / "even/2.png").write_text("no picture")
    (root / "odd/3.png").write_bytes((root / "odd/3.png").read_bytes()[:300])
    (root / "odd/5.png").write_bytes(b"")
    return root


@pytest.mark.parametrize("form", [as_folder, as_list, as_archive], ids=lambda form: form.__name__)
@pytest.mark.parametrize("is_kept", [False, True], ids=["streamed", "kept"])
def test_bad_files_are_named_once_and_others_take_their_place(
    tmp_path: Path,
    form: Callable[[Path], str],
    is_kept: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = read_unlabelled([form(damaged(tmp_path / "set"))])
    if is_kept:
        images = preload(images, SIDE, limit_mib=1)
        assert isinstance(images, Preloaded)
    for place, index in {1: 2, 5: 3, 6: 5}.items():
        for _ in range(2):
            with pytest.raises(DataError, match=rf"{index}\.png.*(cannot be decoded|empty)"):
                images.image(place)
    with caplog.at_level(logging.WARNING):
        squares = torch.cat(batches(images))
    # Six of seven images an epoch, two of them in both: every bad one was asked for.
    assert len(squares) == 12
    warnings = [record.getMessage() for record in caplog.records]
    assert sorted(int(w.partition(".png")[0][-1]) for w in warnings) == [2, 3, 5]
    with pytest.raises(DataError, match=r"more than .*max-bad-fraction 0\.1 .*\.png"):
        batches(images, bad=0.1)


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", [0, 2])
    images = read_unlabelled([str(root)])
    (root / "even/0.png").unlink()
    with pytest.raises(DataError, match=rf"cannot read {root}/even/0\.png: "):
        images.image(0)
    assert np.array_equal(np.asarray(images.image(1)), picture(2))
    # The other one tells the size, and the fault is kept.
    kept = preload(images, SIDE, limit_mib=1)
    with pytest.raises(DataError, match=rf"cannot read {root}/even/0\.png: "):
        kept.image(0)
    assert kept.image(1).tobytes() == shrink(images.image(1), SIDE).tobytes()


@pytest.mark.parametrize("limit_mib", [0, 1])
def test_a_collection_of_bad_files_alone_ends_the_run_with_a_name(
    tmp_path: Path, limit_mib: int
) -> None:
    (tmp_path / "set").mkdir()
    for index in range(3):
        (tmp_path / "set" / f"{index}.png").write_text("no picture")
    images = preload(read_unlabelled([str(tmp_path / "set")]), SIDE, limit_mib=limit_mib)
    with pytest.raises(DataError, match=r"[012]\.png cannot be decoded"):
        batches(images)


def test_names_that_are_no_utf8_are_read_and_printable(tmp_path: Path) -> None:
    path = bytes(tmp_path) + b"/\xff.png"
    with open(path, "wb") as file:
        file.write(encode(picture(4), "PNG"))
    images = read_unlabelled([str(tmp_path)])
    for one in (images, preload(images, SIDE, limit_mib=1)):
        (name,) = names(one)
        assert name.endswith("/%FF.png")
        assert name.isprintable()
        assert one.image(0).width >= SIDE
