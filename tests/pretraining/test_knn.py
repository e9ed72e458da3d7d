"""Nearest neighbours against votes counted one by one."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.pretraining.probe import knn_accuracy


def slow_accuracy(
    train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, truth_M: Tensor, k: int, t: float
) -> float:
    right = 0
    for one, truth in zip(test_MD.double(), truth_M.tolist(), strict=True):
        similar = []
        for other, label in zip(train_ND.double(), labels_N.tolist(), strict=True):
            similar.append((float(one @ other / one.norm() / other.norm()), label))
        votes: dict[int, float] = {}
        for similarity, label in sorted(similar, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / t)
        right += max(votes, key=lambda label: votes[label]) == truth
    return right / len(test_MD)


@pytest.mark.parametrize(("k", "t"), [(1, 0.07), (5, 0.07), (20, 1.0), (500, 0.3)])
def test_votes_are_those_counted_one_by_one(k: int, t: float) -> None:
    generator = torch.Generator().manual_seed(k)
    train_ND, test_MD = (torch.randn(n, 6, generator=generator) for n in (120, 40))
    labels_N, truth_M = (torch.randint(4, (n,), generator=generator) for n in (120, 40))
    found = knn_accuracy(train_ND, labels_N, test_MD, truth_M, num_neighbours=k, temperature=t)
    assert found == slow_accuracy(train_ND, labels_N, test_MD, truth_M, k, t)
    assert 0 < found < 1


def test_classes_apart_are_told_apart_and_length_does_not_count() -> None:
    centre_KD = torch.eye(3)
    labels_N = torch.arange(30) % 3
    train_ND = centre_KD[labels_N] * torch.linspace(0.1, 90, 30)[:, None]
    assert knn_accuracy(train_ND, labels_N, centre_KD, torch.arange(3)) == 1.0


def test_no_images_and_missing_labels_are_refused() -> None:
    empty, some, labels = torch.zeros(0, 2), torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="there must be images"):
        knn_accuracy(empty, labels[:0], some, labels)
    with pytest.raises(ValueError, match="each image needs a label"):
        knn_accuracy(some, labels[:2], some, labels)
