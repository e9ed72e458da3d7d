"""k-means against a loop, its restarts, its corners; LOST's own against SciPy called by hand."""

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, whiten
from threadpoolctl import threadpool_limits

from pipeline.clustering import kmeans as module
from pipeline.clustering.kmeans import Clustering, cluster, kmeans, kmeans_of_lost
from pipeline.errors import DataError


def blobs(num: int = 90, dim: int = 5, groups: int = 6, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors around a few directions, close enough that k-means can go wrong."""
    generator = np.random.default_rng(seed)
    middles = generator.normal(size=(groups, dim))
    vectors = middles[generator.integers(groups, size=num)] + 0.4 * generator.normal(
        size=(num, dim)
    )
    unit: NDArray[np.float32] = vectors.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit


def slow_lloyd(vectors: Any, centres: Any) -> tuple[list[int], Any, float]:
    """One vector and one centre at a time, written to be obviously right; no cluster gets empty."""
    points = [[float(value) for value in vector] for vector in vectors]
    centres = [[float(value) for value in centre] for centre in centres]
    labels: list[int] = []
    while True:
        distances = [
            [sum((a - b) ** 2 for a, b in zip(point, centre, strict=True)) for centre in centres]
            for point in points
        ]
        new = [row.index(min(row)) for row in distances]
        if new == labels:
            return labels, np.array(centres), sum(map(min, distances))
        labels = new
        for number in range(len(centres)):
            members = [
                point for point, label in zip(points, labels, strict=True) if label == number
            ]
            assert members
            centres[number] = [sum(column) / len(members) for column in zip(*members, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_the_result_is_at_rest_for_the_slow_loop(seed: int) -> None:
    vectors = blobs(seed=seed)
    found = kmeans(vectors, 6, restarts=1, seed=seed)
    labels, means, inertia = slow_lloyd(vectors, found.centres_KD)
    assert found.labels_N.tolist() == labels
    np.testing.assert_allclose(found.centres_KD, means, atol=1e-12)
    assert found.inertia == pytest.approx(inertia, rel=1e-9)


def test_the_slow_loop_finds_nothing_better_from_any_start() -> None:
    vectors, generator = blobs(num=24, groups=3), np.random.default_rng(0)
    found = kmeans(vectors, 3, restarts=20, seed=0)
    starts = [vectors[generator.choice(24, 3, replace=False)] for _ in range(100)]
    assert found.inertia == pytest.approx(min(slow_lloyd(vectors, one)[2] for one in starts))


def test_clusters_are_numbered_by_their_size() -> None:
    found = kmeans(blobs(), 6, restarts=8, seed=3)
    assert found.sizes_K.tolist() == sorted(found.sizes_K, reverse=True)
    assert len(set(found.sizes_K.tolist())) > 1


def test_the_best_restart_counts() -> None:
    singles = [kmeans(blobs(), 6, restarts=1, seed=seed).inertia for seed in range(20)]
    assert max(singles) > 1.01 * kmeans(blobs(), 6, restarts=20, seed=0).inertia


@pytest.mark.parametrize("seed", range(4))
def test_more_restarts_are_never_worse(seed: int) -> None:
    inertias = [kmeans(blobs(), 7, restarts=n, seed=seed).inertia for n in range(1, 9)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(inertias))


def test_a_seed_repeats_itself_and_another_is_another() -> None:
    one, same = (kmeans(blobs(), 6, restarts=2, seed=5) for _ in range(2))
    assert one.labels_N.tolist() == same.labels_N.tolist()
    assert one.inertia == same.inertia
    seeds = (*range(5), 2**40)
    others = {kmeans(blobs(), 6, restarts=1, seed=seed).inertia for seed in seeds}
    assert len(others) > 1


def test_the_number_of_threads_decides_nothing() -> None:
    # Enough vectors that several threads would share them, and add up as they come.
    vectors = blobs(num=4000, dim=32)
    before = vectors.copy()
    # Limits hold for the libraries that are there already.
    found = [kmeans(vectors, 6, restarts=2, seed=1)]
    for threads in (1, 4, 4):
        with threadpool_limits(threads):
            found.append(kmeans(vectors, 6, restarts=2, seed=1))
    for one in found[1:]:
        np.testing.assert_array_equal(one.labels_N, found[0].labels_N)
        np.testing.assert_array_equal(one.centres_KD, found[0].centres_KD)
        assert one.inertia == found[0].inertia
    np.testing.assert_array_equal(vectors, before)


def test_no_place_is_a_cluster_twice_while_another_is_none() -> None:
    places = np.repeat([[0.0], [1.0], [5.0], [6.0]], 5, axis=0)
    for seed in range(30):
        found = kmeans(places, 4, restarts=1, seed=seed)
        assert sorted(found.centres_KD[:, 0].tolist()) == pytest.approx([0, 1, 5, 6])
        assert found.sizes_K.tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("num_clusters", [1, 4, 5])
def test_as_many_clusters_as_vectors_and_one_for_all(num_clusters: int) -> None:
    vectors = blobs(num=5)
    found = kmeans(vectors, num_clusters, restarts=3, seed=0)
    assert sorted(set(found.labels_N.tolist())) == list(range(num_clusters))
    if num_clusters == 5:
        assert found.inertia == pytest.approx(0, abs=1e-12)
    if num_clusters == 1:
        np.testing.assert_allclose(found.centres_KD[0], vectors.mean(0), atol=1e-6)


def test_fewer_distinct_vectors_than_clusters_leave_some_empty() -> None:
    vectors = np.repeat(np.eye(2, dtype=np.float32), 4, axis=0)
    found = kmeans(vectors, 3, restarts=2, seed=0)
    assert found.sizes_K.tolist() == [4, 4, 0]
    assert found.inertia == 0


@pytest.mark.parametrize("method", ["kmeans++", "lost"])
@pytest.mark.parametrize("num_clusters", [0, 6])
def test_more_clusters_than_vectors_are_refused(method: Any, num_clusters: int) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[1, 5\].*got {num_clusters}$"):
        cluster(blobs(num=5), num_clusters, method=method, restarts=1, seed=0)
    with pytest.raises(ValueError, match="restarts must be at least 1, got 0"):
        kmeans(blobs(num=5), 2, restarts=0, seed=0)


# ---- as LOST


def by_hand(vectors: NDArray[np.float32], num_clusters: int) -> tuple[Any, Any]:
    white = whiten(vectors)
    white = white / np.linalg.norm(white, axis=1)[:, None]
    np.random.seed(123)
    return kmeans2(white, num_clusters)


@pytest.mark.filterwarnings("ignore:One of the clusters is empty")
@pytest.mark.parametrize(("dim", "num_clusters"), [(5, 6), (5, 20), (384, 20)])
def test_lost_is_scipy_called_by_hand(
    dim: int, num_clusters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    vectors = blobs(num=200, dim=dim)
    centres, labels = by_hand(vectors, num_clusters)
    before = [str(part) for part in np.random.get_state(legacy=True)]
    found = cluster(vectors, num_clusters, method="lost", restarts=1, seed=123)
    assert found.labels_N.tolist() == labels.tolist()
    np.testing.assert_array_equal(found.centres_KD, centres)
    white = whiten(vectors) / np.linalg.norm(whiten(vectors), axis=1)[:, None]
    own = ((white.astype(np.float64) - centres[labels]) ** 2).sum()
    assert found.inertia == pytest.approx(own, rel=1e-9)
    assert [str(part) for part in np.random.get_state(legacy=True)] == before


def test_empty_clusters_and_flat_channels_of_lost_are_no_warnings() -> None:
    vectors = np.hstack([blobs(num=200), np.full((200, 1), 0.5, np.float32)])
    found: Clustering = kmeans_of_lost(vectors, 60)
    assert found.labels_N.max() < 60
    assert (found.sizes_K == 0).any()
    assert found.sizes_K.sum() == 200
    assert np.isfinite(found.inertia)


def test_repeated_vectors_end_lost_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"finds no initial centres for 40 .*--method kmeans\+\+"):
        kmeans_of_lost(np.ones((40, 3), np.float32), 3)
