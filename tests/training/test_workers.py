"""Several processes count as one: sums are exact, and all hear what rank 0 says."""

import time
from pathlib import Path
from typing import Any

import torch

from pipeline.training.workers import Workers, current_workers
from tests.training.two_workers import TwoWorkers


def who_am_i(workers: Workers) -> tuple[int, int, bool, str]:
    return workers.rank, workers.size, workers.is_first, workers.device.type


def test_each_process_knows_its_rank_and_rank_0_is_the_first(pair: TwoWorkers) -> None:
    assert pair.run(who_am_i) == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]


def sum_by_name(workers: Workers) -> dict[str, float]:
    rank = workers.rank
    values = {"images": 2.0**53 - 2 if rank == 0 else 1.0, "b": 0.1 * (rank + 1), "a": -rank}
    # In another order on each rank: sums must not go by position.
    return workers.totals({name: values[name] for name in sorted(values, reverse=rank == 1)})


def test_totals_are_sums_by_name_that_a_float32_could_not_hold(pair: TwoWorkers) -> None:
    for totals in pair.run(sum_by_name):
        assert totals == {"a": -1.0, "b": 0.1 + 0.2, "images": 2.0**53 - 1}


def sum_of_counts(workers: Workers) -> torch.Tensor:
    return workers.total(torch.tensor([workers.rank + 1, 2**40]))


def test_a_total_of_integers_is_exact_and_stays_one(pair: TwoWorkers) -> None:
    for total in pair.run(sum_of_counts):
        assert total.tolist() == [3, 2**41]
        assert total.dtype == torch.int64


def hear(workers: Workers) -> list[Any]:
    said = {"epoch": 7, "best": None, "path": Path("a/b")} if workers.is_first else "not this"
    return [workers.from_first(said), workers.from_first(None if workers.is_first else "nor this")]


def test_all_get_what_rank_0_gave(pair: TwoWorkers) -> None:
    assert pair.run(hear) == [[{"epoch": 7, "best": None, "path": Path("a/b")}, None]] * 2


def wait_for_the_last(workers: Workers, mark: Path) -> bool:
    if workers.rank == 1:
        time.sleep(0.5)
        mark.touch()
    workers.wait()
    return mark.exists()


def test_nobody_goes_on_before_the_last_has_come(pair: TwoWorkers, tmp_path: Path) -> None:
    assert pair.run(wait_for_the_last, tmp_path / "late") == [True, True]


def test_alone_everything_is_what_was_given() -> None:
    workers = current_workers()
    assert workers == Workers(0, 1, torch.device("cpu"))
    assert workers.is_first
    assert workers.totals({"b": 0.5, "a": 2}) == {"a": 2.0, "b": 0.5}
    assert workers.total(torch.tensor([3])).tolist() == [3]
    thing = object()
    assert workers.from_first(thing) is thing
    workers.wait()


def test_alone_on_a_device_of_choice() -> None:
    assert current_workers(torch.device("meta")) == Workers(0, 1, torch.device("meta"))
