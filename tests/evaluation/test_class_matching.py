"""Clusters and classes: the matrix box by box, and the best of all assignments tried one by one."""

from itertools import permutations

import numpy as np
import pytest

from pipeline.data.ground_truth import GroundTruth
from pipeline.errors import DataError
from pipeline.evaluation.class_matching import ClassObjects, match_classes, voc_average_precision
from pipeline.evaluation.predictions import Detections
from tests.evaluation.annotated import found, truth

A, B, C = [0, 0, 20, 20], [30, 30, 60, 60], [70, 70, 99, 99]


def test_each_class_gets_the_cluster_that_finds_it() -> None:
    truths = [
        truth([A, B], classes=["cat", "dog"]),
        truth([C], name="2.jpg", classes=["dog"]),
    ]
    boxes = [
        found([A, B], [0.9, 0.8], labels=[7, 4]),
        found([C, A], [0.7, 0.6], labels=[4, 9]),
    ]
    result = match_classes(truths, boxes)
    assert (result.classes, result.clusters) == (("cat", "dog"), (4, 7, 9))
    assert result.cluster_of == {"cat": 7, "dog": 4}
    assert result.ap50_KC.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert result.mean_ap50 == 1


def test_class_that_no_cluster_is_left_for_counts_as_nothing() -> None:
    truths = [truth([A, B], classes=["cat", "dog"])]
    result = match_classes(truths, [found([A, B, C], [0.3, 0.9, 0.5], labels=[2, 2, 2])])
    # As dogs, the first box is true; as cats, the third.
    assert result.cluster_of == {"cat": None, "dog": 2}
    assert result.ap50_of == {"cat": 0, "dog": 1}
    assert result.mean_ap50 == 0.5


def test_without_any_box_every_class_counts_as_nothing() -> None:
    result = match_classes([truth([A], classes=["cat"])], [found()])
    assert (result.clusters, result.cluster_of, result.mean_ap50) == ((), {"cat": None}, 0)


def test_class_of_difficult_objects_only_is_none() -> None:
    truths = [truth([A, B], [True, False], classes=["cat", "dog"])]
    assert match_classes(truths, [found([B])]).classes == ("dog",)
    with pytest.raises(DataError, match="no object that is not difficult"):
        match_classes([truth([A], [True], classes=["cat"])], [found([A])])


def test_annotations_without_classes_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"1 images have no class .* those of 3\.jpg"):
        match_classes([truth([A], name="3.jpg")], [found([A])])


def random_images() -> tuple[list[GroundTruth], list[Detections]]:
    rng = np.random.default_rng(3)
    truths, boxes = [], []
    for number in range(40):
        classes = rng.choice(["a", "b", "c", "d"], 3).tolist()
        truths.append(
            truth([A, B, C], (rng.random(3) < 0.2).tolist(), name=f"{number}.jpg", classes=classes)
        )
        # Cluster 5 - k for class k, wrong in four of ten boxes, in boxes a little off.
        right = [5 - "abcd".index(name) for name in classes]
        labels = [one if rng.random() < 0.6 else int(rng.integers(1, 6)) for one in right]
        near = (np.array([A, B, C]) + rng.normal(0, 2, (3, 4))).tolist()
        boxes.append(found(near, rng.random(3).tolist(), labels=labels))
    return truths, boxes


def test_matrix_equals_one_class_and_cluster_at_a_time() -> None:
    truths, boxes = random_images()
    result = match_classes(truths, boxes)
    for row, name in enumerate(result.classes):
        objects = []
        for one in truths:
            mine = np.array([label == name for label in one.classes_N])
            objects.append(ClassObjects(one.boxes_N4[mine], one.difficult_N[mine]))
        for column, cluster in enumerate(result.clusters):
            members = [one.labels_D == cluster for one in boxes]
            expected = voc_average_precision(
                [one.boxes_D4[m] for one, m in zip(boxes, members, strict=True)],
                [one.scores_D[m] for one, m in zip(boxes, members, strict=True)],
                objects,
            )
            assert result.ap50_KC[row, column] == pytest.approx(expected, abs=1e-12)


def test_no_other_assignment_is_better() -> None:
    result = match_classes(*random_images())
    assert result.ap50_KC.shape == (4, 5)
    best = max(
        np.mean([result.ap50_KC[row, column] for row, column in enumerate(order)])
        for order in permutations(range(5), 4)
    )
    assert result.mean_ap50 == pytest.approx(best, abs=1e-12)
    assert result.cluster_of == {"a": 5, "b": 4, "c": 3, "d": 2}
