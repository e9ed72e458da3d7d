"""Where actors go: one per GPU, or one per core with room left for reading and writing."""

from typing import Any

import pytest

from pipeline.cluster.label_blocks import Placement, place_actors
from pipeline.config import ComputeConfig
from pipeline.errors import ClusterError


def place(cpus: float, gpus: float, **compute: Any) -> Placement:
    return place_actors(ComputeConfig(**compute), cpus=cpus, gpus=gpus)


def test_without_gpus_every_core_gets_an_actor_and_tasks_still_find_room() -> None:
    placement = place(8, 0)
    assert (placement.num_actors, placement.threads, placement.gpus_per_actor) == (8, 1, 0.0)
    assert placement.num_actors * placement.cpus_per_actor + placement.cpus_per_load <= 8


def test_cores_per_actor_are_its_threads() -> None:
    placement = place(8, 0, cpus_per_actor=4)
    assert (placement.num_actors, placement.threads) == (2, 4)


def test_with_gpus_every_gpu_gets_an_actor_that_takes_no_core_from_decoding() -> None:
    placement = place(16, 4)
    assert (placement.num_actors, placement.gpus_per_actor) == (4, 1.0)
    assert (placement.cpus_per_actor, placement.cpus_per_load) == (0.0, 1.0)


def test_gpus_can_be_shared_or_left_alone() -> None:
    assert place(16, 2, gpus_per_actor=0.5).num_actors == 4
    assert place(16, 2, gpus_per_actor=0).gpus_per_actor == 0.0


def test_one_core_is_enough() -> None:
    assert place(1, 0).num_actors == 1


@pytest.mark.parametrize(
    ("compute", "complaint"),
    [
        ({"num_actors": 3, "gpus_per_actor": 1}, "need 3 GPUs, the cluster has 2"),
        ({"num_actors": 9, "gpus_per_actor": 0}, "9 actors with 1 cores each do not fit on 4"),
    ],
)
def test_actors_the_cluster_has_no_room_for_are_refused_unless_told_to_wait(
    compute: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ClusterError, match=complaint):
        place(4, 2, **compute)
    assert place(4, 2, wait=True, **compute).num_actors == compute["num_actors"]
