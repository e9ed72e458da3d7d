"""Vectors -> clusters: k-means++ with restarts, and the k-means that LOST runs.

To try another way: a function that returns a ``Clustering``, a case in ``cluster``, its name in
``ClusteringMethod`` of config/clustering.py.

Shape letters:  N vectors   D channels   K clusters
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, whiten

from pipeline.config.clustering import ClusteringMethod
from pipeline.errors import DataError

Vectors: TypeAlias = NDArray[np.floating[Any]]

# Sums are of float64, and the vectors may be many: so many are converted at a time.
_CHUNK = 8192
_MOST_ITERATIONS = 300


@dataclass(frozen=True, eq=False)
class Clustering:
    """Which vector is in which cluster."""

    labels_N: NDArray[np.int64]
    """From 0 to K - 1; a cluster may be empty."""

    centres_KD: NDArray[np.float64]
    inertia: float
    """Sum over the vectors of the squared distance to their centre."""

    @property
    def sizes_K(self) -> NDArray[np.int64]:
        """How many vectors each cluster has."""
        sizes: NDArray[np.int64] = np.bincount(self.labels_N, minlength=len(self.centres_KD))
        return sizes


def cluster(
    vectors_ND: Vectors, num_clusters: int, *, method: ClusteringMethod, restarts: int, seed: int
) -> Clustering:
    """The clusters by ``method``; ``restarts`` is k-means++'s alone.

    Raises:
        ValueError: there are less vectors than clusters, or no cluster is asked for.
        DataError: the vectors are such that LOST's way has no solution.
    """
    if method == "lost":
        return kmeans_of_lost(vectors_ND, num_clusters, seed=seed)
    return kmeans(vectors_ND, num_clusters, restarts=restarts, seed=seed)


def kmeans(vectors_ND: Vectors, num_clusters: int, *, restarts: int, seed: int) -> Clustering:
    """The best of ``restarts`` runs of Lloyd's algorithm from k-means++ centres, largest first.

    Each run has random numbers of its own, made of the seed and its place, so more restarts are
    never worse. A cluster is empty only where there are less distinct vectors than clusters.

    Arthur & Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007.

    Raises:
        ValueError: there are less vectors than clusters, or no cluster or restart is asked for.
    """
    _check(vectors_ND, num_clusters)
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    best: Clustering | None = None
    for restart in range(restarts):
        generator = np.random.default_rng([seed, restart])
        found = lloyd(vectors_ND, spread_centres(vectors_ND, num_clusters, generator))
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None
    order_K = np.argsort(-best.sizes_K, kind="stable")
    return Clustering(np.argsort(order_K)[best.labels_N], best.centres_KD[order_K], best.inertia)


def spread_centres(
    vectors_ND: Vectors, num_clusters: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """``(K, D)`` of the vectors: each next one with a probability as the square of its distance."""
    chosen = [int(generator.integers(len(vectors_ND)))]
    squared_N = np.full(len(vectors_ND), np.inf)
    for _ in range(1, num_clusters):
        _, to_last_N = nearest(vectors_ND, vectors_ND[chosen[-1:]].astype(np.float64))
        squared_N = np.minimum(squared_N, to_last_N)
        # A vector is never its own neighbour, whatever rounding says.
        squared_N[chosen] = 0
        reach_N = squared_N.cumsum()
        if reach_N[-1] > 0:
            place = int(np.searchsorted(reach_N, generator.random() * reach_N[-1], side="right"))
        else:
            place = int(generator.integers(len(vectors_ND)))
        chosen.append(min(place, len(vectors_ND) - 1))
    return vectors_ND[chosen].astype(np.float64)


def lloyd(vectors_ND: Vectors, centres_KD: NDArray[np.float64]) -> Clustering:
    """Assign to the nearest centre (of equals the first), move centres to means, until at rest.

    An empty cluster's centre moves to the vector that is farthest from its own.
    """
    labels_N, squared_N = nearest(vectors_ND, centres_KD)
    for _ in range(_MOST_ITERATIONS):
        centres_KD = _means(vectors_ND, labels_N, squared_N, centres_KD)
        before_N = labels_N
        labels_N, squared_N = nearest(vectors_ND, centres_KD)
        if np.array_equal(labels_N, before_N):
            break
    return Clustering(labels_N, centres_KD, float(squared_N.sum()))


def nearest(
    vectors_ND: Vectors, centres_KD: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """``(N,)`` number of the nearest centre, and the squared distance to it."""
    labels_N = np.zeros(len(vectors_ND), np.int64)
    squared_N = np.zeros(len(vectors_ND))
    for rows, some_ND in _chunks(vectors_ND):
        squared_NK = (
            (some_ND**2).sum(1)[:, None]
            - 2 * some_ND @ centres_KD.T
            + (centres_KD**2).sum(1)[None, :]
        )
        labels_N[rows] = squared_NK.argmin(1)
        squared_N[rows] = squared_NK.min(1).clip(min=0)
    return labels_N, squared_N


def kmeans_of_lost(vectors_ND: Vectors, num_clusters: int, *, seed: int = 123) -> Clustering:
    """What LOST runs: SciPy's ``kmeans2`` on whitened, then normalised vectors; its own numbering.

    Random centres, 10 iterations, no restarts: clusters may be empty. The vectors are taken as they
    are (float32 in LOST); LOST's seed is 123.

    Raises:
        ValueError: there are less vectors than clusters, or no cluster is asked for.
        DataError: SciPy finds no initial centres, because vectors repeat.
    """
    _check(vectors_ND, num_clusters)
    with warnings.catch_warnings():
        # Channels without any variance, and empty clusters, which are told by their sizes.
        warnings.simplefilter("ignore")
        white_ND = whiten(vectors_ND)
        white_ND = white_ND / np.linalg.norm(white_ND, axis=1, keepdims=True)
        try:
            # The old generator: NumPy's new ones draw other numbers from a seed.
            centres_KD, labels_N = kmeans2(
                white_ND, num_clusters, minit="random", iter=10, seed=np.random.RandomState(seed)
            )
        except np.linalg.LinAlgError as fault:
            raise DataError(
                f"the k-means of LOST finds no initial centres for {len(vectors_ND)} vectors "
                f"({fault}); take --method kmeans++"
            ) from fault
    labels_N, centres_KD = labels_N.astype(np.int64), centres_KD.astype(np.float64)
    inertia = sum(
        float(((some_ND - centres_KD[labels_N[rows]]) ** 2).sum())
        for rows, some_ND in _chunks(white_ND)
    )
    return Clustering(labels_N, centres_KD, inertia)


def _means(
    vectors_ND: Vectors,
    labels_N: NDArray[np.int64],
    squared_N: NDArray[np.float64],
    centres_KD: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The means of the clusters; an empty one's is a vector far from its own centre."""
    num_clusters = len(centres_KD)
    sums_KD = np.zeros_like(centres_KD)
    for rows, some_ND in _chunks(vectors_ND):
        member_KN = labels_N[None, rows] == np.arange(num_clusters)[:, None]
        sums_KD += member_KN.astype(np.float64) @ some_ND
    sizes_K = np.bincount(labels_N, minlength=num_clusters)
    means_KD = np.where(sizes_K[:, None] > 0, sums_KD / sizes_K.clip(min=1)[:, None], centres_KD)
    empty_K = np.flatnonzero(sizes_K == 0)
    farthest_K = np.argsort(-squared_N, kind="stable")[: len(empty_K)]
    for empty, far in zip(empty_K, farthest_K, strict=True):
        if squared_N[far] > 0:
            means_KD[empty] = vectors_ND[far]
    return means_KD


def _chunks(vectors_ND: Vectors) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    for first in range(0, len(vectors_ND), _CHUNK):
        rows = slice(first, first + _CHUNK)
        yield rows, vectors_ND[rows].astype(np.float64)


def _check(vectors_ND: Vectors, num_clusters: int) -> None:
    if not 1 <= num_clusters <= len(vectors_ND):
        raise ValueError(
            f"the number of clusters must be in [1, {len(vectors_ND)}], the number of vectors, "
            f"got {num_clusters}"
        )
