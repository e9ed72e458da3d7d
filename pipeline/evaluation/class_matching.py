"""Clusters against classes: which cluster is which, and how well it then detects that class.

Unsupervised labels have no names, so every cluster's boxes are measured against every class's
objects by the VOC metric, and the Hungarian method gives each class the cluster that makes the mean
AP50 highest (LOST, BMVC 2021, section 4.3). The matching is made on the very images that are
measured, as published. With more clusters than classes the rest go unused; with fewer, the classes
that go without one count as 0.

Shape letters:  K classes   C clusters   D boxes of all images
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pipeline.boxes import as_boxes
from pipeline.data.ground_truth import GroundTruth
from pipeline.errors import DataError
from pipeline.evaluation.predictions import Detections
from pipeline.evaluation.voc_metric import ClassObjects, claimed_average_precision, claims


@dataclass(frozen=True, eq=False)
class ClassMatching:
    """The result. Fractions in [0, 1].

    Attributes:
        classes: names of those with an object that is not difficult, sorted.
        clusters: the labels that occur, sorted.
        ap50_KC: every cluster measured as every class.
        cluster_of: by class; None for a class that no cluster is left for.
    """

    classes: tuple[str, ...]
    clusters: tuple[int, ...]
    ap50_KC: NDArray[np.float64]
    cluster_of: dict[str, int | None]

    @property
    def ap50_of(self) -> dict[str, float]:
        """By class, of its own cluster; 0 without one."""
        column = {cluster: index for index, cluster in enumerate(self.clusters)}
        return {
            name: 0.0 if cluster is None else float(self.ap50_KC[row, column[cluster]])
            for row, (name, cluster) in enumerate(self.cluster_of.items())
        }

    @property
    def mean_ap50(self) -> float:
        """Over all classes."""
        return float(np.mean(list(self.ap50_of.values())))


def match_classes(truths: Sequence[GroundTruth], found: Sequence[Detections]) -> ClassMatching:
    """Measure every cluster as every class, and choose.

    Raises:
        DataError: the ground truth has no classes, or no object that is not difficult.
    """
    _refuse_classless(truths)
    easy = [truth.without_difficult() for truth in truths]
    classes = tuple(sorted({name for truth in easy for name in truth.classes_N}))
    if not classes:
        raise DataError("the ground truth has no object that is not difficult: nothing to match")
    scores_D = np.concatenate([np.zeros(0), *(one.scores_D for one in found)])
    label_D = np.concatenate([np.zeros(0, np.int64), *(one.labels_D for one in found)])
    clusters = tuple(np.unique(label_D).tolist())
    ap50_KC = np.zeros((len(classes), len(clusters)))
    boxes = [one.boxes_D4 for one in found]
    for row, name in enumerate(classes):
        claimed = claims(boxes, [_objects(truth, name) for truth in truths])
        for column, cluster in enumerate(clusters):
            ap50_KC[row, column] = claimed_average_precision(claimed, scores_D, label_D == cluster)
    return ClassMatching(classes, clusters, ap50_KC, _best(classes, clusters, ap50_KC))


def _refuse_classless(truths: Sequence[GroundTruth]) -> None:
    bare = [truth for truth in truths if len(truth.classes_N) != len(truth.boxes_N4)]
    if bare:
        raise DataError(
            f"--class-aware: objects of {len(bare)} images have no class in the ground truth, for "
            f"example those of {bare[0].file_name}; measure without classes, or give annotations "
            "with them"
        )


def _objects(truth: GroundTruth, name: str) -> ClassObjects:
    member_N = np.array([one == name for one in truth.classes_N], dtype=bool)
    return ClassObjects(as_boxes(truth.boxes_N4[member_N]), truth.difficult_N[member_N])


def _best(
    classes: tuple[str, ...], clusters: tuple[int, ...], ap50_KC: NDArray[np.float64]
) -> dict[str, int | None]:
    rows, columns = linear_sum_assignment(-ap50_KC)
    chosen = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return {
        name: clusters[chosen[row]] if row in chosen else None for row, name in enumerate(classes)
    }
