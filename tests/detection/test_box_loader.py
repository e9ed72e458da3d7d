"""Images with boxes as a detector sees them: the same numbers however the work is shared, and no
box on a picture that it was not made for.
"""

import logging
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.detection import BoxDataConfig
from pipeline.config.settings import LoaderConfig
from pipeline.data.labelled_images import decode_rgb
from pipeline.data.loader import pack
from pipeline.detection.box_loader import (
    BoxBatch,
    BoxLoader,
    BoxSample,
    BoxTransform,
    SeenSize,
    pack_samples,
    train_box_loader,
)
from pipeline.detection.box_sampler import BucketBatchSampler
from pipeline.detection.box_table import BoxTable, read_box_table
from pipeline.errors import DataError
from pipeline.storage import Location
from tests.data.pictures import encode
from tests.tables import Row, label_row, write_table

NUM = 12
SMALL = BoxDataConfig(short_sides=(16, 20, 24), max_side=40)


def picture(number: int) -> Image.Image:
    """Every third one is upright; the object is black, the rest bright noise."""
    width, height = (30, 44) if number % 3 == 0 else (44 + number, 30)
    pixels = np.random.default_rng(number).integers(160, 256, (height, width, 3), dtype=np.uint8)
    x0, y0, x1, y1 = map(int, box_of(number))
    pixels[y0:y1, x0:x1] = 0
    return Image.fromarray(pixels)


def box_of(number: int) -> list[float]:
    return [4.0 + number % 5, 6.0, 20.0, 24.0]


def row_of(number: int, uri: str) -> Row:
    """Two boxes in images of even number; the second one is the whole picture."""
    width, height = picture(number).size
    boxes = [box_of(number), [0.0, 0.0, float(width), float(height)]][: 2 - number % 2]
    return label_row(
        f"{number:02}",
        uri=uri,
        width=width,
        height=height,
        boxes=boxes,
        scores=[number / 16, 0.5][: len(boxes)],
        labels=[1, 3][: len(boxes)],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table of pictures in ``labels`` beside the pictures."""
    for number in range(NUM):
        (tmp_path / f"{number:02}.png").write_bytes(encode(picture(number), "PNG"))
    rows = [row_of(number, str(tmp_path / f"{number:02}.png")) for number in range(NUM)]
    write_table(tmp_path / "labels", rows)
    return tmp_path


def table_in(folder: Path) -> BoxTable:
    return read_box_table(Location.parse(str(folder / "labels")))


def loader(
    table: BoxTable,
    *,
    num_workers: int = 0,
    max_bad_fraction: float = 1.0,
    data: BoxDataConfig = SMALL,
    steps: int = 4,
    **sharding: int,
) -> BoxLoader:
    known: dict[str, int] = {"batch_size": 5, "seed": 1} | sharding
    sampler = BucketBatchSampler(table.is_wide_N, steps_per_epoch=steps, **known)
    config = LoaderConfig(loader_workers=num_workers, max_bad_fraction=max_bad_fraction)
    return train_box_loader(table, BoxTransform(data), sampler=sampler, config=config)


def shared(batch: BoxBatch) -> dict[str, Any]:
    """What a batch says of its step."""
    return dict(zip(batch._fields[5:], batch[5:], strict=True))


def batches(table: BoxTable, *epochs: int, **options: Any) -> list[BoxBatch]:
    one = loader(table, **options)
    found: list[BoxBatch] = []
    for epoch in epochs:
        one.set_epoch(epoch)
        # Copies, so that no more than a few batches lie in shared memory.
        mine = [pack_samples(batch.samples)._replace(**shared(batch)) for batch in one]
        assert len(mine) == len(one)
        found += mine
    return found


def samples(found: Sequence[BoxBatch]) -> list[BoxSample]:
    return [sample for batch in found for sample in batch.samples]


def plain(sample: BoxSample) -> tuple[Any, ...]:
    return tuple(part.tolist() if isinstance(part, torch.Tensor) else part for part in sample)


def plain_all(found: Sequence[BoxBatch]) -> list[tuple[Any, ...]]:
    return [plain(sample) for sample in samples(found)]


# One sample.


def test_a_sample_is_the_picture_with_its_boxes_on_the_object(folder: Path) -> None:
    for sample in samples(batches(table_in(folder), 0, 1, 2)):
        number = int(sample.image_id)
        image_3HW, boxes_N4 = sample.image_3HW, sample.boxes_N4
        _, height, width = image_3HW.shape
        assert (sample.original_width, sample.original_height) == picture(number).size
        assert min(height, width) in SMALL.short_sides or max(height, width) == SMALL.max_side
        assert image_3HW.dtype == torch.uint8
        assert (boxes_N4.dtype, sample.scores_N.dtype) == (torch.float32, torch.float32)
        assert sample.labels_N.tolist() == [1, 3][: 2 - number % 2]
        assert sample.scores_N.tolist() == [number / 16, 0.5][: 2 - number % 2]
        assert 0 <= sample.key < 1 << 63
        if number % 2 == 0:
            assert boxes_N4[1].tolist() == [0, 0, width, height]
        # Where it is dark, but for the pixel in which two colours mix.
        dark = (image_3HW.float().mean(dim=0) < 104).nonzero()
        (y0, x0), (y1, x1) = dark.min(dim=0).values, dark.max(dim=0).values + 1
        assert (boxes_N4[0] - torch.tensor([x0, y0, x1, y1])).abs().max() <= 1


def test_pixels_are_those_of_decoding_and_pillow_and_flips_mirror_the_boxes(folder: Path) -> None:
    (path,) = folder.glob("07.png")
    image = decode_rgb(path.read_bytes(), "07")
    boxes_N4 = np.array([[2.0, 4.0, 12.0, 20.0]], np.float32)
    transform = BoxTransform(BoxDataConfig(short_sides=(45,), max_side=1000, flip=0))
    straight_3HW, straight_N4 = transform(image, boxes_N4, random.Random(0))
    expected = image.resize((77, 45), Image.Resampling.BILINEAR)
    assert torch.equal(straight_3HW, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    # 51 x 30 becomes 77 x 45, so boxes are stretched by 77 / 51 and not by 45 / 30.
    scale = np.array([77 / 51, 1.5, 77 / 51, 1.5])
    assert straight_N4.dtype == np.float32
    np.testing.assert_allclose(straight_N4, boxes_N4 * scale, rtol=1e-6)
    flip = BoxTransform(BoxDataConfig(short_sides=(45,), max_side=1000, flip=1))
    flipped_3HW, flipped_N4 = flip(image, boxes_N4, random.Random(0))
    assert torch.equal(flipped_3HW, straight_3HW.flip(2))
    x0, y0, x1, y1 = straight_N4[0]
    np.testing.assert_allclose(flipped_N4, [[77 - x1, y0, 77 - x0, y1]], rtol=1e-6)
    assert boxes_N4.tolist() == [[2, 4, 12, 20]]


# Loading.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_loader_processes_change_no_bit_not_even_around_a_bad_file(folder: Path) -> None:
    (folder / "05.png").unlink()
    table = table_in(folder)
    expected = batches(table, 0, 1)
    assert sum(batch.num_replaced for batch in expected) >= 1
    for num_workers in (1, 2):
        found = batches(table, 0, 1, num_workers=num_workers)
        assert plain_all(found) == plain_all(expected)
        assert [batch[5:] for batch in found] == [batch[5:] for batch in expected]


def test_workers_together_have_the_batches_of_one(folder: Path) -> None:
    table = table_in(folder)
    whole = batches(table, 0, 1)
    ranks = [batches(table, 0, 1, rank=rank, world_size=2) for rank in range(2)]
    for one, first, second in zip(whole, *ranks, strict=True):
        assert plain_all([first, second]) == plain_all([one])
        assert one.num_global == first.num_global == second.num_global == 5
        assert (one.first, first.first, second.first) == (0, 0, len(first.samples))


def test_a_run_resumed_at_an_epoch_goes_on_like_one_never_stopped(folder: Path) -> None:
    table = table_in(folder)
    assert plain_all(batches(table, 2)) == plain_all(batches(table, 0, 1, 2)[8:])


def test_an_image_differs_by_step_and_seed(folder: Path) -> None:
    table = table_in(folder)
    keys = [sample.key for seed in (1, 2) for sample in samples(batches(table, 0, 1, seed=seed))]
    assert len(set(keys)) == len(keys) == 2 * 2 * 4 * 5


def test_batches_are_of_one_orientation_even_around_a_bad_file(folder: Path) -> None:
    (folder / "05.png").write_bytes(b"")
    (folder / "03.png").unlink()
    for batch in batches(table_in(folder), 0, 1, 2):
        wide = {sample.original_width > sample.original_height for sample in batch.samples}
        assert len(wide) == 1


def test_loading_leaves_the_global_generators_alone(folder: Path) -> None:
    table = table_in(folder)
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(3).tolist(), random.random()
    torch.manual_seed(3)
    random.seed(3)
    batches(table, 0)
    assert (torch.rand(3).tolist(), random.random()) == expected


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text"])
def test_a_bad_file_gives_way_to_the_next_of_its_orientation(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "05.png"
    broken = {"empty": b"", "truncated": path.read_bytes()[:900], "text": b"no picture"}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(broken[damage])
    table = table_in(folder)
    sampler = BucketBatchSampler(table.is_wide_N, batch_size=5, steps_per_epoch=4, seed=1)
    wanted = [(step, place, index) for keys in sampler for step, place, index in keys]
    with caplog.at_level(logging.WARNING):
        found = batches(table, 0)
    # 06 is upright, so 07 it is.
    expected = [7 if index == 5 else index for _, _, index in wanted]
    assert [int(sample.image_id) for sample in samples(found)] == expected
    assert [int(Path(sample.name).stem) for sample in samples(found)] == expected
    num_bad = sum(index == 5 for _, _, index in wanted)
    assert sum(batch.num_replaced for batch in found) == num_bad > 0
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert record.getMessage().endswith("the next image of its orientation takes its place")


def test_bad_files_in_a_row_are_passed_over_and_the_search_wraps_around(folder: Path) -> None:
    for number in (10, 11, 1):
        (folder / f"{number:02}.png").unlink()
    found = samples(batches(table_in(folder), 0, 1, 2))
    assert {sample.image_id for sample in found} == {
        f"{number:02}" for number in range(NUM) if number not in (10, 11, 1)
    }


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_too_many_bad_files_end_the_run_with_one_line(folder: Path, num_workers: int) -> None:
    for number in (5, 7, 8):
        (folder / f"{number:02}.png").unlink()
    with pytest.raises(DataError, match=r"more than max-bad-fraction 0\.05 of 20") as e:
        batches(table_in(folder), 0, max_bad_fraction=0.05, num_workers=num_workers)
    assert "\n" not in str(e.value)


def test_no_readable_image_ends_the_run_with_one_line(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"of 8 in a row must be readable.*not found") as e:
        batches(table_in(folder), *range(3))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_another_file_than_the_boxes_were_made_of_is_an_error(
    folder: Path, num_workers: int
) -> None:
    first, second = folder / "04.png", folder / "08.png"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(DataError) as e:
        batches(table_in(folder), 0, 1, 2, num_workers=num_workers)
    told = str(e.value)
    assert "\n" not in told
    assert {"48x30", "52x30"} <= {word.strip(":,") for word in told.split()}
    assert (str(first) in told) or (str(second) in told)


def test_boxes_of_a_turned_photograph_are_in_its_upright_frame(tmp_path: Path) -> None:
    upright = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    path = tmp_path / "turned.jpg"
    path.write_bytes(encode(stored, "JPEG", quality=100, subsampling=0, exif=exif))
    write_table(tmp_path / "labels", [row_of(3, str(path))])
    data = BoxDataConfig(short_sides=(30,), max_side=100, flip=0)
    (batch,) = batches(table_in(tmp_path), 0, data=data, steps=1, batch_size=1)
    (sample,) = batch.samples
    assert sample.image_3HW.shape == (3, 44, 30)
    assert sample.boxes_N4.tolist() == [box_of(3)]
    x0, y0, x1, y1 = map(int, box_of(3))
    assert sample.image_3HW[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].max() < 40
    assert sample.image_3HW.float().mean() > 100


def test_images_come_from_a_store_like_from_a_disk(folder: Path, s3_bucket: str) -> None:
    rows = []
    for number in range(NUM):
        uri = f"{s3_bucket}/photos/{number:02}.png"
        Location.parse(uri).write_bytes((folder / f"{number:02}.png").read_bytes())
        rows.append(row_of(number, uri))
    write_table(folder / "remote", rows)
    remote = read_box_table(Location.parse(str(folder / "remote")))
    there, here = (samples(batches(table, 0)) for table in (remote, table_in(folder)))
    assert [one.name for one in there] == [rows[int(one.image_id)]["uri"] for one in here]
    assert [plain(one._replace(name="")) for one in there] == [
        plain(one._replace(name="")) for one in here
    ]


def test_a_table_survives_the_way_through_shared_memory(folder: Path) -> None:
    table = table_in(folder)
    there = pack(table).unpack()
    assert (there.uri(3), there.image_id(3)) == (table.uri(3), table.image_id(3))
    np.testing.assert_array_equal(there.boxes_M4, table.boxes_M4)


def test_a_batch_that_crosses_processes_is_four_arrays(folder: Path) -> None:
    (batch,) = batches(table_in(folder), 0, steps=1)
    assert sum(isinstance(part, torch.Tensor) for part in batch) == 4
    assert plain_all([pickle.loads(pickle.dumps(batch))]) == plain_all([batch])
    assert batch.num_images == len(batch.samples) > 0


# Detecting.


@pytest.mark.parametrize("number", range(NUM))
def test_a_detector_sees_a_picture_at_its_fixed_size(number: int) -> None:
    image, size = picture(number), SeenSize(20, 30)
    scale = min(20 / min(image.size), 30 / max(image.size))
    expected = tuple(int(side * scale + 0.5) for side in image.size)
    assert size.of(*image.size) == expected
    resized = np.array(image.resize(expected, Image.Resampling.BILINEAR))
    assert torch.equal(size.pixels_of(image), torch.from_numpy(resized).permute(2, 0, 1))
