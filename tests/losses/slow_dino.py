"""DINO's loss one pair of views, one image, one prototype at a time: obviously right."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    return [power / sum(powers) for power in powers]


def log_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    log_sum = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
    return [logit - log_sum for logit in logits]


def slow_terms(
    student: Array, teacher: Array, center: Array, student_temp: float, teacher_temp: float
) -> tuple[float, float, float]:
    """Cross-entropy, the teacher's entropy and KL, each a mean over images and pairs of views."""
    loss = entropy = divergence = 0.0
    count = 0
    for g, teacher_view in enumerate(teacher):
        for v, student_view in enumerate(student):
            if g == v:
                continue
            for t, s in zip(teacher_view, student_view, strict=True):
                count += 1
                centred = [(t_k - c_k) / teacher_temp for t_k, c_k in zip(t, center, strict=True)]
                p, log_p = softmax(centred), log_softmax(centred)
                log_q = log_softmax([s_k / student_temp for s_k in s])
                for k in range(len(center)):
                    loss -= p[k] * log_q[k]
                    entropy -= p[k] * log_p[k]
                    divergence += p[k] * (log_p[k] - log_q[k])
    return loss / count, entropy / count, divergence / count
