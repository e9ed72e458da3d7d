"""Loaders: the same numbers however the work is shared, and no file that ends a run."""

import logging
import pickle
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pipeline.classification.augment import eval_transform, train_transform
from pipeline.config.classification import AugmentConfig
from pipeline.config.settings import LoaderConfig
from pipeline.data.labelled_images import LabelledImages, cached
from pipeline.data.loader import (
    Batch,
    ShardedBatchSampler,
    eval_loader,
    micro_batches,
    pack,
    train_loader,
)
from pipeline.errors import ConfigError, DataError
from pipeline.training.workers import Workers

AUGMENT, SIDE = AugmentConfig(crop="pad"), 16
ALONE = LoaderConfig(loader_workers=0)


def worker(rank: int, world: int) -> Workers:
    return Workers(rank, world, torch.device("cpu"))


class Pictures:
    """Squares of noise, every fourth one of the same class; ``bad`` ones cannot be read."""

    def __init__(self, num: int, bad: Sequence[int] = (), sides: Sequence[int] = (16,)) -> None:
        self.targets = np.arange(num, dtype=np.int64) % 4
        self.bad = frozenset(bad)
        self.sides = sides
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        self.num_read += 1
        if index in self.bad:
            raise DataError(f"cannot read {self.name(index)}: truncated")
        side = self.sides[index % len(self.sides)]
        pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def name(self, index: int) -> str:
        return f"picture_{index}.png"


class NumberedPixels:
    """The transform of a test that wants to know which image came: its index as one pixel."""

    def __init__(self, images: LabelledImages) -> None:
        self.found = {images.image(i).tobytes(): i for i in range(len(images))}

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.full((3, 1, 1), float(self.found[image.tobytes()]))


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(images, batch, world, group) of which each rank can have its share."""
    world, group = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    least = (world - 1) * group + 1
    batch = draw(st.integers(least, least + 20))
    return draw(st.integers(least, 90)), batch, world, group


def all_ranks(images: int, batch: int, world: int, group: int) -> list[ShardedBatchSampler]:
    return [
        ShardedBatchSampler(
            images, batch_size=batch, rank=rank, world_size=world, seed=3, group=group
        )
        for rank in range(world)
    ]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(splits())
def test_ranks_cut_the_same_global_batches_whatever_their_number(
    split: tuple[int, int, int, int],
) -> None:
    images, batch, _, group = split
    (alone,) = all_ranks(images, batch, 1, group)
    ranks = all_ranks(*split)
    for epoch in (0, 5):
        for sampler in (alone, *ranks):
            sampler.set_epoch(epoch)
        whole = list(alone)
        together = [list(chain(*slices)) for slices in zip(*ranks, strict=True)]
        assert together == whole
        assert len(whole) == len(alone) == max(1, images // batch)
        assert {len(keys) for keys in whole} == {min(batch, images)} == {alone.num_global}
        seen = [index for keys in whole for _, index in keys]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(images))
        assert {key[0] for keys in whole for key in keys} == {epoch}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(splits())
def test_slices_are_whole_groups_as_even_as_can_be_and_never_empty(
    split: tuple[int, int, int, int],
) -> None:
    images, batch, _, group = split
    sizes = [sampler.num_local for sampler in all_ranks(*split)]
    assert sizes == [len(next(iter(sampler))) for sampler in all_ranks(*split)]
    assert min(sizes) > 0
    assert all(size % group == 0 for size in sizes[:-1])
    groups = [-(-size // group) for size in sizes]
    assert max(groups) - min(groups) <= 1
    assert sizes[-1] % group == min(batch, images) % group


def test_epochs_and_seeds_differ_and_an_epoch_comes_back() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ShardedBatchSampler(50, batch_size=50, seed=seed)
        sampler.set_epoch(epoch)
        return [index for keys in sampler for _, index in keys]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert sorted(order(0, 1)) == list(range(50))


def test_too_small_for_the_workers_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(ConfigError, match=r"batch_size must be at least 7.*got 6"):
        ShardedBatchSampler(100, batch_size=6, world_size=4, group=2)
    with pytest.raises(DataError, match=r"at least 7 images.*got 6"):
        ShardedBatchSampler(6, batch_size=100, world_size=4, group=2)
    with pytest.raises(ValueError, match="rank"):
        ShardedBatchSampler(6, batch_size=6, rank=1)


def train(
    images: LabelledImages, *, num_workers: int = 0, epochs: Sequence[int] = (0,), **sharding: int
) -> list[Batch]:
    sampler = ShardedBatchSampler(len(images), **({"batch_size": 8, "seed": 1} | sharding))
    config = LoaderConfig(loader_workers=num_workers)
    loader = train_loader(images, train_transform(AUGMENT, SIDE), sampler=sampler, config=config)
    batches = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        # Copies, so that no more than a few batches lie in shared memory.
        batches += [Batch(b[0].clone(), b[1].clone(), *b[2:]) for b in loader]
        assert len(batches) % len(loader) == 0
    return batches


def same(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images_B3HW, b.images_B3HW)
        and torch.equal(a.targets_B, b.targets_B)
        and a[2:] == b[2:]
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_loader_processes_change_no_bit_not_even_around_a_bad_file() -> None:
    expected = train(Pictures(40, bad=[5]), epochs=(0, 1))
    assert sum(batch.num_replaced for batch in expected) == 2
    for num_workers in (1, 3):
        batches = train(Pictures(40, bad=[5]), epochs=(0, 1), num_workers=num_workers)
        assert same(batches, expected)


def test_two_ranks_together_have_the_batches_of_one() -> None:
    whole = train(Pictures(30), epochs=(0, 1), batch_size=9)
    ranks = [
        train(Pictures(30), epochs=(0, 1), batch_size=9, rank=rank, world_size=2, group=2)
        for rank in range(2)
    ]
    for one, first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([first.images_B3HW, second.images_B3HW]), one.images_B3HW)
        assert torch.equal(torch.cat([first.targets_B, second.targets_B]), one.targets_B)
        assert one.num_global == first.num_global == second.num_global == 9
        assert (one.first, first.first, second.first) == (0, 0, len(first.targets_B))


def test_a_run_resumed_at_an_epoch_goes_on_like_one_never_stopped() -> None:
    assert same(train(Pictures(24), epochs=(2,)), train(Pictures(24), epochs=(0, 1, 2))[6:])


def test_an_image_looks_different_in_every_epoch_and_at_every_seed() -> None:
    images = Pictures(8)
    seen = [
        tuple(sorted(float(image.sum()) for image in batch.images_B3HW))
        for seed in (1, 2)
        for batch in train(images, epochs=(0, 1), seed=seed)
    ]
    assert len(set(seen)) == 4


def test_equal_images_of_a_batch_are_varied_each_in_its_own_way() -> None:
    class Twins(Pictures):
        def image(self, index: int) -> Image.Image:
            return super().image(0)

    (batch,) = train(Twins(8))
    assert len({float(image.sum()) for image in batch.images_B3HW}) == 8


def test_loading_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train(Pictures(16))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("bad", "stand_in"),
    [([5], 9), ([5, 9], 13), ([29], 1), ([25, 29], 1), (list(range(5, 32, 4)), 1)],
)
def test_a_bad_file_gives_way_to_the_next_of_its_class(bad: list[int], stand_in: int) -> None:
    images = Pictures(32, bad=bad)
    sampler = ShardedBatchSampler(32, batch_size=32)
    config = LoaderConfig(loader_workers=0, max_bad_fraction=0.5)
    transform = NumberedPixels(Pictures(32))
    (batch,) = train_loader(images, transform, sampler=sampler, config=config)
    (keys,) = sampler
    wanted = [index for _, index in keys]
    got = batch.images_B3HW[:, 0, 0, 0].int().tolist()
    stands_in = {want: have for want, have in zip(wanted, got, strict=True) if want != have}
    assert set(stands_in) == set(bad)
    assert stands_in[bad[0]] == stand_in
    assert batch.targets_B.tolist() == [index % 4 for index in wanted]
    assert list(batch.names) == [f"picture_{index}.png" for index in got]
    assert batch.num_replaced == len(bad)


def test_a_bad_file_is_told_of_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(Pictures(40, bad=[5]), epochs=(0, 1, 2))
    (record,) = caplog.records
    assert record.getMessage() == (
        "cannot read picture_5.png: truncated; the next image of its class takes its place"
    )


def test_too_many_bad_files_end_the_run_with_one_line() -> None:
    told = r"more than max-bad-fraction 0\.05 of 40 images cannot be read: 3 so.*picture_\d+"
    with pytest.raises(DataError, match=told) as caught:
        train(Pictures(40, bad=[5, 6, 7]))
    assert "\n" not in str(caught.value)


def test_one_bad_file_of_a_small_set_ends_nothing() -> None:
    train(Pictures(8, bad=[5]))
    with pytest.raises(DataError, match="2 so far"):
        train(Pictures(8, bad=[5, 6]))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_class_without_a_readable_image_ends_the_run_with_one_line(
    num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match="class 1 must be readable, none of its 10 is") as caught:
        train(Pictures(40, bad=range(1, 40, 4)), num_workers=num_workers)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_warning_from_a_loader_process_reaches_the_user(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        train(Pictures(40, bad=[5]), epochs=(0, 1), num_workers=2)
    assert [record.getMessage()[:26] for record in caplog.records] == ["cannot read picture_5.png:"]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_sees_every_image_once_over_all_ranks(world: int) -> None:
    images = Pictures(11)
    transform = NumberedPixels(images)
    seen: list[list[int]] = []
    for rank in range(world):
        loader = eval_loader(
            images, transform, batch_size=3, workers=worker(rank, world), config=ALONE
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(batch.num_global == len(batch.targets_B) <= 3 for batch in batches)
        assert torch.cat([b.targets_B for b in batches]).tolist() == [
            i % 4 for i in range(rank, 11, world)
        ]
        seen.append([int(v) for b in batches for v in b.images_B3HW[:, 0, 0, 0]])
    assert seen == [list(range(rank, 11, world)) for rank in range(world)]


def test_more_ranks_than_images_leave_some_with_nothing_to_evaluate() -> None:
    images = Pictures(2)
    transform = NumberedPixels(images)
    loader = eval_loader(images, transform, batch_size=3, workers=worker(2, 3), config=ALONE)
    assert list(loader) == []


def test_evaluation_leaves_a_bad_file_out_and_counts_it(caplog: pytest.LogCaptureFixture) -> None:
    images = Pictures(9, bad=[4, 8])
    config = LoaderConfig(loader_workers=0, max_bad_fraction=0.5)
    transform = eval_transform(AUGMENT, SIDE)
    loader = eval_loader(images, transform, batch_size=4, workers=worker(0, 1), config=config)
    # The third batch is image 8 alone, and so none.
    first, second = loader
    assert (len(first.targets_B), first.num_replaced) == (4, 0)
    assert (second.targets_B.tolist(), second.num_replaced) == ([1, 2, 3], 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot read picture_{index}.png: truncated; it is left out" for index in (4, 8)
    ]


@pytest.mark.parametrize(("num", "sizes"), [(1, [7]), (2, [4, 3]), (3, [3, 2, 2]), (9, [1] * 7)])
def test_weighted_micro_batches_give_the_mean_of_the_global_batch(
    num: int, sizes: list[int]
) -> None:
    batch = Batch(torch.randn(7, 3, 2, 2), torch.arange(7), num_global=20, num_replaced=2, first=5)
    parts = list(micro_batches(batch, num))
    assert [len(part.targets_B) for part in parts] == sizes
    assert torch.equal(torch.cat([part.images_B3HW for part in parts]), batch.images_B3HW)
    assert torch.equal(torch.cat([part.targets_B for part in parts]), batch.targets_B)
    assert sum(part.num_replaced for part in parts) == 2
    # The targets count up from 0 and the slice begins at 5.
    assert [part.first for part in parts] == [5 + int(part.targets_B[0]) for part in parts]
    weighted = sum(
        part.images_B3HW.mean() * len(part.targets_B) / part.num_global for part in parts
    )
    torch.testing.assert_close(weighted, batch.images_B3HW.mean() * 7 / 20)


def test_micro_batches_split_soft_targets_too() -> None:
    soft = torch.rand(4, 5)
    batch = Batch(torch.zeros(4, 3, 1, 1), soft, num_global=4, num_replaced=0)
    assert torch.equal(torch.cat([part.targets_B for part in micro_batches(batch, 2)]), soft)


def test_cached_images_are_read_once_and_give_the_same_batches() -> None:
    images = Pictures(24)
    kept = cached(images)
    assert same(train(kept, epochs=(0, 1)), train(Pictures(24), epochs=(0, 1)))
    assert images.num_read == 24
    assert kept.name(3) == "picture_3.png"


def test_a_bad_file_is_replaced_also_from_the_cache() -> None:
    kept = cached(Pictures(40, bad=[0, 5]))
    assert same(train(kept), train(Pictures(40, bad=[0, 5])))
    with pytest.raises(DataError, match=r"cannot read picture_5\.png: truncated"):
        kept.image(5)


@pytest.mark.parametrize(
    ("images", "limit_mib", "num_read"),
    [
        (Pictures(9, sides=[16, 16, 17]), 1024, 3),
        (Pictures(1000, sides=[64]), 1, 1),
        (Pictures(3, bad=range(3)), 1024, 3),
    ],
)
def test_what_cannot_be_kept_stays_as_it_is_and_is_found_out_early(
    images: Pictures, limit_mib: int, num_read: int
) -> None:
    assert cached(images, limit_mib=limit_mib) is images
    assert images.num_read == num_read


def test_big_arrays_go_beside_the_pickle_and_come_back_as_views() -> None:
    kept = cached(Pictures(200))
    packed = pack(kept)
    assert len(packed.pickled) < 50_000 < len(pickle.dumps(kept))
    (pixels,) = packed.buffers
    there = packed.unpack()
    before = there.image(3).tobytes()
    assert before == kept.image(3).tobytes()
    pixels.zero_()
    assert there.image(3).tobytes() != before


def test_without_shared_memory_every_process_has_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.loader._free_shared_memory", lambda: 0)
    kept = cached(Pictures(200))
    packed = pack(kept)
    assert packed.buffers == []
    assert packed.unpack().image(3).tobytes() == kept.image(3).tobytes()
