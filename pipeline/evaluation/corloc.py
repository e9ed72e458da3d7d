"""CorLoc: how often one box per image finds an object, and how sure that number is.

An image is a hit when its box has IoU >= 0.5 with any of its ground-truth boxes (Deselaers et al.;
LOST, BMVC 2021, section 4.1). IoU is in continuous pixels, without the "+1" of the VOC devkit and
without an epsilon: exactly one half counts.

To add a baseline: write a function from the images' sizes to boxes beside ``central_boxes`` and
name it in ``pipeline/evaluation/one_box.py``.

Shape letters:  N images   T objects of all images   M methods   P hit patterns   R resamples
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import Boxes, aligned_iou, as_boxes

Floats = NDArray[np.float64]

THRESHOLD = 0.5


def best_ious(boxes_N4: Boxes, truths: Sequence[Boxes]) -> Floats:
    """``(N,)`` IoU of each image's box with the ground-truth box it meets best.

    Args:
        boxes_N4: one box per image; an empty box (all zeros) says that there is none, and gets 0.
        truths: each image's ground-truth boxes; an image without any gets 0.
    """
    image_T = np.repeat(np.arange(len(truths)), [len(boxes) for boxes in truths])
    objects_T4 = as_boxes(np.concatenate([np.zeros((0, 4)), *truths]))
    best_N = np.zeros(len(truths))
    np.maximum.at(best_N, image_T, aligned_iou(boxes_N4[image_T], objects_T4))
    return best_N


def corloc(best_iou_N: Floats, threshold: float = THRESHOLD) -> float:
    """Fraction of the images whose box meets an object with at least that IoU; NaN for none."""
    return float(np.mean(best_iou_N >= threshold)) if best_iou_N.size else float("nan")


def central_boxes(sizes_N2: Floats, side_fraction: float) -> Boxes:
    """``(N, 4)`` boxes in the images' middle, whose sides are that fraction of the image's.

    With 1 it is the whole image. The central box of 0.7 (49 % of the area) is what a method that
    sees nothing reaches on photographs: about 41 % on VOC07.

    Args:
        sizes_N2: width and height of each image.
        side_fraction: in (0, 1].
    """
    margin_N2 = sizes_N2 * (1 - side_fraction) / 2
    return as_boxes(np.concatenate([margin_N2, sizes_N2 - margin_N2], axis=1))


def resampled_rates(
    hits_MN: NDArray[np.bool_], *, num_resamples: int, rng: np.random.Generator
) -> Floats:
    """``(R, M)`` hit rates of every method on the same bootstrap resamples of the images.

    Resampling N images with replacement and counting the patterns "which methods hit" is one draw
    from a multinomial over those patterns. There are at most ``2 ** M``, so the exact bootstrap
    takes memory for R x 2^M numbers instead of R x N, whatever N is.
    """
    num_images = hits_MN.shape[1]
    patterns_PM, count_P = np.unique(hits_MN.T, axis=0, return_counts=True)
    draws_RP = rng.multinomial(num_images, count_P / num_images, size=num_resamples)
    rates_RM: Floats = draws_RP @ patterns_PM.astype(np.float64) / num_images
    return rates_RM


def interval_95(samples_R: Floats) -> tuple[float, float]:
    """The middle 95 % of the samples (percentile bootstrap).

    It has no width where every image is a hit, or none is: then quote the number of images instead.
    """
    low, high = np.percentile(samples_R, [2.5, 97.5])
    return float(low), float(high)
