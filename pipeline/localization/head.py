"""A linear head that finds objects: one product a patch, and nothing between patches.

It is fitted without labels on the cuts of a collection's own images (head_fit.py). What becomes of
its map of objects is objects.py.

Shape letters:  B images   N patches   D channels
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Far below any level at which objects are looked for.
_NO_OBJECT = -1.0


@dataclass(frozen=True, eq=False)
class Head:
    """``z = weight . x + bias - threshold`` of a patch ``x`` of length 1: above 0 is an object.

    Attributes:
        weight_D: float64.
        bias: of the regression, whose aim is 1 on objects and 0 elsewhere.
        threshold: ``weight . x + bias`` above which the patch is an object's.
        share: of the patches it was fitted on that are.
    """

    weight_D: NDArray[np.float64]
    bias: float
    threshold: float
    share: float

    def map(self, unit_BND: Tensor, usable_BN: Tensor) -> Tensor:
        """``z`` of patches of length 1, ``(B, N)`` fp32; -1 where a patch is unusable.

        Raises:
            ValueError: the head is of features with another number of channels.
        """
        if unit_BND.shape[-1] != len(self.weight_D):
            raise ValueError(
                f"features must have the head's {len(self.weight_D)} channels, "
                f"got {unit_BND.shape[-1]}"
            )
        weight_D = torch.from_numpy(self.weight_D).float().to(unit_BND.device)
        z_BN = (unit_BND * weight_D).sum(dim=-1) + (self.bias - self.threshold)
        return torch.where(usable_BN, z_BN, _NO_OBJECT)
