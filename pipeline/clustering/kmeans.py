"""Vectors -> clusters: scikit-learn's k-means++ with restarts, and the k-means that LOST runs.

To try another way: a function that returns a ``Clustering``, a case in ``cluster``, its name in
``ClusteringMethod`` of config/clustering.py.

Shape letters:  N vectors   D channels   K clusters
"""

import warnings
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

    Each run goes on until no label changes, and more of them are never worse: the first ones stay
    what they were. A cluster is empty only where there are less distinct vectors than clusters.

    Arthur & Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007; scikit-learn's,
    which takes the best of several candidates for each next centre. In float64, and on one thread:
    more of them would add up in another order each time, and the seed would not decide the result.

    Raises:
        ValueError: there are less vectors than clusters, or no cluster or restart is asked for.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    _check(vectors_ND, num_clusters)
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    runs = KMeans(
        num_clusters,
        n_init=restarts,
        max_iter=_MOST_ITERATIONS,
        tol=0,
        # Of any whole number, as every seed of ours: scikit-learn's own stop at 32 bits.
        random_state=np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))),
        copy_x=False,
        algorithm="lloyd",
    )
    with threadpool_limits(1), warnings.catch_warnings():
        # Vectors that repeat leave clusters empty, which are told by their sizes.
        warnings.simplefilter("ignore", ConvergenceWarning)
        best = runs.fit(vectors_ND.astype(np.float64))
    sizes_K = np.bincount(best.labels_, minlength=num_clusters)
    order_K = np.argsort(-sizes_K, kind="stable")
    labels_N = np.argsort(order_K)[best.labels_]
    return Clustering(labels_N, best.cluster_centers_[order_K], float(best.inertia_))


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
    inertia = 0.0
    for first in range(0, len(white_ND), _CHUNK):
        rows = slice(first, first + _CHUNK)
        off_ND = white_ND[rows].astype(np.float64) - centres_KD[labels_N[rows]]
        inertia += float((off_ND**2).sum())
    return Clustering(labels_N, centres_KD, inertia)


def _check(vectors_ND: Vectors, num_clusters: int) -> None:
    if not 1 <= num_clusters <= len(vectors_ND):
        raise ValueError(
            f"the number of clusters must be in [1, {len(vectors_ND)}], the number of vectors, "
            f"got {num_clusters}"
        )
