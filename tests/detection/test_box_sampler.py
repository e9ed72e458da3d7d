"""The endless order of a detector's training: proved against the loop that it stands for."""

import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.seeding import key_of
from pipeline.detection.box_sampler import BoxKey, BucketBatchSampler
from pipeline.errors import ConfigError, DataError


def slow_batches(buckets: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """One image at a time: into its bucket, and out with the bucket when that is full."""
    waiting: dict[int, list[int]] = {bucket: [] for bucket in buckets}
    for number in itertools.count():
        generator = torch.Generator().manual_seed(key_of("box order", seed, number))
        for index in torch.randperm(len(buckets), generator=generator).tolist():
            mine = waiting[buckets[index]]
            mine.append(index)
            if len(mine) == batch_size:
                yield mine.copy()
                mine.clear()


def sampler(
    buckets: list[int], batch_size: int, steps: int, *, world: int = 1, rank: int = 0, seed: int = 3
) -> BucketBatchSampler:
    return BucketBatchSampler(
        np.array(buckets),
        batch_size=batch_size,
        steps_per_epoch=steps,
        rank=rank,
        world_size=world,
        seed=seed,
    )


def epochs(one: BucketBatchSampler, *numbers: int) -> list[list[BoxKey]]:
    found = []
    for number in numbers:
        one.set_epoch(number)
        batches = list(one)
        assert len(batches) == len(one)
        found += batches
    return found


def indices(batches: list[list[BoxKey]]) -> list[list[int]]:
    return [[index for _, _, index in batch] for batch in batches]


BUCKETS = st.lists(st.integers(0, 1), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(BUCKETS, st.integers(1, 9), st.integers(1, 30), st.integers(0, 4))
def test_batches_are_those_of_a_loop_over_single_images(
    buckets: list[int], batch_size: int, steps: int, epoch: int
) -> None:
    found = epochs(sampler(buckets, batch_size, steps), epoch)
    expected = itertools.islice(
        slow_batches(buckets, batch_size, 3), epoch * steps, (epoch + 1) * steps
    )
    assert indices(found) == list(expected)
    assert [[key[:2] for key in batch] for batch in found] == [
        [(epoch * steps + step, place) for place in range(batch_size)] for step in range(steps)
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(BUCKETS, st.integers(1, 9))
def test_every_image_comes_once_in_a_pass_and_buckets_stay_pure(
    buckets: list[int], batch_size: int
) -> None:
    found = indices(epochs(sampler(buckets, batch_size, 60), 0))
    streams: dict[int, list[int]] = {0: [], 1: []}
    for batch in found:
        (bucket,) = {buckets[index] for index in batch}
        streams[bucket] += batch
    for bucket, stream in streams.items():
        members = [index for index, one in enumerate(buckets) if one == bucket]
        for begin in range(0, len(stream) - len(members) + 1, max(1, len(members))):
            assert sorted(stream[begin : begin + len(members)]) == members
        # A bucket is served as often as its size deserves, but for a batch that waits.
        if members:
            share = len(found) * len(members) / len(buckets)
            assert abs(len(stream) / batch_size - share) <= 2 + len(members) / batch_size


@settings(max_examples=40, deadline=None, derandomize=True)
@given(BUCKETS, st.integers(1, 5), st.integers(0, 12), st.integers(0, 2))
def test_any_number_of_workers_cuts_the_same_batches(
    buckets: list[int], world: int, more: int, epoch: int
) -> None:
    batch_size = world + more
    whole = epochs(sampler(buckets, batch_size, 7), epoch)
    ranks = [sampler(buckets, batch_size, 7, world=world, rank=rank) for rank in range(world)]
    shares = [epochs(one, epoch) for one in ranks]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == whole
    for one, share in zip(ranks, shares, strict=True):
        assert {len(batch) for batch in share} == {one.num_local}
        assert {batch[0][1] for batch in share} == {one.first}
        assert one.num_global == batch_size
    sizes = [one.num_local for one in ranks]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(BUCKETS, st.integers(1, 9), st.integers(1, 10), st.integers(0, 5))
def test_resuming_equals_running_on_and_windows_of_other_lengths_agree(
    buckets: list[int], batch_size: int, steps: int, stopped: int
) -> None:
    whole = epochs(sampler(buckets, batch_size, steps), *range(6))
    assert (
        epochs(sampler(buckets, batch_size, steps), *range(stopped, 6)) == whole[stopped * steps :]
    )
    assert epochs(sampler(buckets, batch_size, 6 * steps), 0) == whole


def test_seeds_differ_and_an_iteration_keeps_the_epoch_it_began_with() -> None:
    one = sampler([0, 1] * 10, 4, 5)
    begun = iter(one)
    first = next(begun)
    one.set_epoch(7)
    assert [first, *begun] == epochs(one, 0)
    orders = [
        tuple(map(tuple, indices(epochs(sampler([0, 1] * 10, 4, 5, seed=seed), 0))))
        for seed in range(4)
    ]
    assert len(set(orders)) == 4


def test_one_bucket_is_a_plain_stream_of_permutations() -> None:
    stream = list(itertools.chain(*indices(epochs(sampler([0] * 10, 5, 6), 0))))
    assert [sorted(stream[begin : begin + 10]) for begin in (0, 10, 20)] == [list(range(10))] * 3
    assert stream[:10] != stream[10:20]


def test_a_long_run_is_resumed_within_a_second() -> None:
    wide = np.random.default_rng(0).random(5011) < 0.7
    one = BucketBatchSampler(wide, batch_size=16, steps_per_epoch=1000)
    one.set_epoch(23)
    started = time.process_time()
    list(one)
    assert time.process_time() - started < 1


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size must be at least 3.*got 2"):
        sampler([0], 2, 1, world=3)
    with pytest.raises(ConfigError, match=r"steps_per_epoch must be at least 1, got 0"):
        sampler([0], 2, 0)
    with pytest.raises(DataError, match="at least 1 image"):
        sampler([], 2, 1)
    with pytest.raises(ValueError, match="rank"):
        sampler([0], 2, 1, rank=1)
