"""How often a classifier is right, counted over a whole set: accuracy, and who is taken for whom.

Shape letters:  B images   K classes
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Confusion:
    """Counts of images; rows are the true classes, columns the predicted ones."""

    counts_KK: NDArray[np.int64]

    @property
    def num_images(self) -> int:
        """All images that were looked at."""
        return int(self.counts_KK.sum())

    @property
    def accuracy(self) -> float:
        """Share of the images whose class was found, in [0, 1]; NaN without images."""
        total = self.num_images
        return float(np.trace(self.counts_KK)) / total if total else float("nan")

    @property
    def accuracy_per_class_K(self) -> NDArray[np.float64]:
        """Share of each class's images, in [0, 1]; NaN for a class without any."""
        of_class_K = self.counts_KK.sum(axis=1)
        right_K = np.diag(self.counts_KK).astype(np.float64)
        found_K: NDArray[np.float64] = np.full(len(right_K), np.nan)
        np.divide(right_K, of_class_K, out=found_K, where=of_class_K > 0)
        return found_K


def count_confusion(true_B: Tensor, predicted_B: Tensor, num_classes: int) -> Tensor:
    """``(K, K)`` int64 counts of a batch, on its device: rows true, columns predicted."""
    cell_B = true_B * num_classes + predicted_B
    counts = torch.bincount(cell_B, minlength=num_classes * num_classes)
    return counts.view(num_classes, num_classes)
