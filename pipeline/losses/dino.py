"""Self-distillation without labels: what a student says of one view, a teacher says of another.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, Eq. 1-4 and
Algorithm 1. Both networks give K numbers per view; the teacher's are centred, sharpened by a low
temperature and then a target. The centre keeps one prototype from winning everywhere, the
temperature keeps all of them from winning alike; ``entropy`` and ``divergence`` tell which of the
two is failing (section 5.3).

To weigh pairs of views otherwise: ``_pairs_of`` and ``_targets``. To centre otherwise: a module
beside ``Center`` with the same ``add`` and ``update``.

Shape letters:  G global (teacher's) views   V all views of the student, the first G of them the
                teacher's in the same order   B images   K prototypes
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class DINOTerms(NamedTuple):
    """What one look at the views gives: means over images and over the pairs of unequal views.

    Batches of equal size average right. All three are in nats: ``loss = entropy + divergence``.
    """

    loss: Tensor
    """Scalar with gradient for the student: the cross-entropy."""
    entropy: Tensor
    """Scalar without gradient: the teacher's own. Near 0 everything is one prototype's, near log K
    every prototype's alike, if ``divergence`` is near 0 as well: the two kinds of collapse."""
    divergence: Tensor
    """Scalar without gradient: KL of the student from the teacher. Rounding may put a perfect
    student a hair below 0."""


def dino_loss(
    student_VBK: Tensor,
    teacher_GBK: Tensor,
    center_K: Tensor,
    *,
    student_temp: float = 0.1,
    teacher_temp: float,
) -> DINOTerms:
    """Cross-entropy of the student's views with the teacher's other views, Eq. 3, centred.

    It is computed in float32 (float64 if that comes in), also under autocast. Neither the teacher
    nor the centre gets a gradient, and both may be changed before the backward pass.

    Args:
        student_VBK: the head's outputs of all views, any float type; the teacher's views first.
        teacher_GBK: the teacher's outputs of its views, in the same order.
        center_K: what is subtracted from the teacher's outputs (``Center.center_K``).
        student_temp: above 0.
        teacher_temp: above 0, below the student's to sharpen (``schedules.teacher_temperature``).

    Raises:
        ValueError: a temperature is not above 0, shapes do not fit, or there is no image or no
            pair of unequal views.
    """
    _check(student_VBK, teacher_GBK, center_K)
    if not (student_temp > 0 and teacher_temp > 0):
        raise ValueError(
            f"student_temp and teacher_temp must be above 0, got {student_temp} and {teacher_temp}"
        )
    with torch.no_grad():
        logit_GBK = (_at_least_float32(teacher_GBK) - center_K) / teacher_temp
        log_GBK = logit_GBK.log_softmax(dim=-1)
        probability_GBK = log_GBK.exp()
        # Every teacher view has V - 1 pairs, so the mean over pairs is that over teacher views.
        entropy = -(probability_GBK * log_GBK).sum(dim=-1).mean()
    loss: Tensor = _CrossEntropy.apply(student_VBK, probability_GBK, student_temp)
    return DINOTerms(loss, entropy, loss.detach() - entropy)


class _CrossEntropy(Function):
    """Mean cross-entropy over images and pairs, by ``-sum t log p = logsumexp(s) - <t, s>``.

    Kept for the backward pass are the inputs alone: a float32 softmax of all views (10 views, 64
    images and 65,536 prototypes: 168 MB) would be the largest tensor of a step. Both passes go
    view by view, and hold no matrix product that autocast or TF32 could make coarser.
    """

    @staticmethod
    def forward(ctx: Any, student_VBK: Tensor, probability_GBK: Tensor, temp: float) -> Tensor:
        ctx.save_for_backward(student_VBK, probability_GBK)
        ctx.temp = temp
        targets = _targets(probability_GBK, len(student_VBK))
        view_terms = [
            (_pairs_of(view, probability_GBK) * logit_BK.logsumexp(dim=-1)).sum()
            - (target_BK * logit_BK).sum()
            for view, target_BK in enumerate(targets)
            for logit_BK in [_at_least_float32(student_VBK[view]) / temp]
        ]
        return torch.stack(view_terms).sum() / _terms(student_VBK, probability_GBK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        student_VBK, probability_GBK = ctx.saved_tensors
        scale = gradient / (ctx.temp * _terms(student_VBK, probability_GBK))
        gradient_VBK = torch.empty_like(student_VBK)
        for view, target_BK in enumerate(_targets(probability_GBK, len(student_VBK))):
            own_BK = (_at_least_float32(student_VBK[view]) / ctx.temp).softmax(dim=-1)
            gradient_VBK[view] = (_pairs_of(view, probability_GBK) * own_BK - target_BK) * scale
        return gradient_VBK, None, None


def _targets(probability_GBK: Tensor, views: int) -> list[Tensor]:
    """For each view of the student, the teacher's other views added: V tensors ``(B, K)``."""
    total_BK = probability_GBK.sum(dim=0)
    others = [total_BK - own_BK for own_BK in probability_GBK]
    return others + [total_BK] * (views - len(others))


def _pairs_of(view: int, probability_GBK: Tensor) -> int:
    """With how many of the teacher's views a view of the student is paired: all but itself."""
    return len(probability_GBK) - (view < len(probability_GBK))


def _terms(student_VBK: Tensor, probability_GBK: Tensor) -> int:
    """Images times pairs of unequal views: ``B * (G * V - G)``."""
    views, images, _ = student_VBK.shape
    return images * len(probability_GBK) * (views - 1)


class Center(nn.Module):
    """The running mean of the teacher's outputs, Eq. 4: ``c <- m c + (1 - m) mean``.

    ``add`` the outputs of every part of a batch, ``update`` once per step. What was added since the
    last update is in no checkpoint, nor is it a buffer: DistributedDataParallel would overwrite it
    with that of rank 0.
    """

    center_K: Tensor

    def __init__(self, num_prototypes: int, *, momentum: float = 0.9) -> None:
        """A centre of zeros.

        Args:
            num_prototypes: K.
            momentum: how much of the old centre stays, in [0, 1].

        Raises:
            ValueError: an argument is outside its range.
        """
        super().__init__()
        if num_prototypes < 1:
            raise ValueError(f"num_prototypes must be at least 1, got {num_prototypes}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"the centre's momentum must be in [0, 1], got {momentum}")
        self.momentum = momentum
        self.register_buffer("center_K", torch.zeros(num_prototypes))
        self._sum_K: Tensor | float = 0.0
        self._count = 0

    @torch.no_grad()
    def add(self, teacher_GBK: Tensor) -> None:
        """Remember the outputs of some images for the next ``update``.

        Raises:
            ValueError: they are not ``(G, B, K)`` with the centre's K.
        """
        if teacher_GBK.ndim != 3 or teacher_GBK.shape[-1] != len(self.center_K):
            raise ValueError(
                f"the teacher's outputs must be (G, B, {len(self.center_K)}), "
                f"got {tuple(teacher_GBK.shape)}"
            )
        self._sum_K = self._sum_K + _at_least_float32(teacher_GBK).sum(dim=(0, 1))
        self._count += teacher_GBK.shape[0] * teacher_GBK.shape[1]

    @torch.no_grad()
    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        """Move the centre towards the mean of all that was added, and forget that.

        If no worker added an image, the centre stays. Every worker must call this, also one that
        added none: they exchange sums.

        Args:
            total: gives the sum of a tensor over all workers (``Workers.total``).
        """
        mine_K1 = self.center_K.new_empty(len(self.center_K) + 1)
        mine_K1[:-1] = self._sum_K
        mine_K1[-1:].fill_(self._count)
        self._sum_K, self._count = 0.0, 0
        all_K1 = total(mine_K1)
        mean_K, count_1 = all_K1[:-1] / all_K1[-1:].clamp(min=1), all_K1[-1:]
        moved_K = self.momentum * self.center_K + (1 - self.momentum) * mean_K
        # Not an if: reading the count would stall a GPU.
        self.center_K.copy_(torch.where(count_1 > 0, moved_K, self.center_K))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check(student_VBK: Tensor, teacher_GBK: Tensor, center_K: Tensor) -> None:
    student, teacher, center = (tuple(x.shape) for x in (student_VBK, teacher_GBK, center_K))
    fits = len(student) == len(teacher) == 3 and student[1:] == teacher[1:]
    if not fits or center != student[2:]:
        raise ValueError(
            "the outputs must be (V, B, K) of the student, (G, B, K) of the teacher and (K,) of "
            f"the centre, got {student}, {teacher} and {center}"
        )
    if not 1 <= teacher[0] <= student[0] or student[0] < 2:
        raise ValueError(
            "the student must have at least 2 views, the teacher between 1 and as many, "
            f"got {student[0]} and {teacher[0]}"
        )
    if 0 in student:
        raise ValueError(f"there must be an image and a prototype, got (V, B, K) = {student}")
