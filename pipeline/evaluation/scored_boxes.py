"""Boxes with scores against objects, box by box -> what the scores are worth.

A box is right where it has IoU >= 0.5 with some object, difficult ones included: as in CorLoc, and
unlike in AP, two boxes on one object are both right. The arithmetic is calibration.py.

Shape letters:  D boxes of all images   C coverages
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.boxes import pairwise_iou
from pipeline.data.ground_truth import GroundTruth
from pipeline.evaluation.calibration import (
    Bools,
    Ints,
    Reliability,
    are_probabilities,
    auroc_interval,
    brier_score,
    precision_at_coverage,
    reliability,
)
from pipeline.evaluation.corloc import THRESHOLD, Floats
from pipeline.evaluation.predictions import EVIDENCE, Detections
from pipeline.localization.ranking import weighted_area_under_curve

COVERAGES = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class ScoredBoxes:
    """The boxes of all images, one after another.

    Attributes:
        image_D: whose box it is, an index of the images.
        score_D: as in the table.
        hit_D: the box is right.
        evidence: what scores rest on, by the names of ``EVIDENCE``; NaN where the table does not
            say, and absent where it says nothing of any box.
        fold_D: boxes of different folds are not ranked against each other: their scores are of
            different maps. None ranks all.
    """

    image_D: Ints
    score_D: Floats
    hit_D: Bools
    evidence: dict[str, Floats]
    fold_D: Ints | None = None

    def __len__(self) -> int:
        return len(self.score_D)


@dataclass(frozen=True)
class Ranking:
    """How often a right box is above a wrong one; None where there are not both."""

    auroc: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class ScoreQuality:
    """What the scores of boxes are worth.

    Attributes:
        num_boxes: of all images.
        num_right: of them.
        span: the lowest and the highest score.
        ranking: of ``scores``, and of what they rest on where the table has it of every box.
        precision_at: the share of right ones among the best boxes, by the share that is kept.
        reliability: None where scores are no probabilities.
        brier: likewise.
    """

    num_boxes: int
    num_right: int
    span: tuple[float, float]
    ranking: dict[str, Ranking]
    precision_at: dict[float, float]
    reliability: Reliability | None
    brier: float | None

    @property
    def ece(self) -> float | None:
        """Expected calibration error; None where scores are no probabilities."""
        return None if self.reliability is None else self.reliability.error


def scored_boxes(truths: Sequence[GroundTruth], found: Sequence[Detections]) -> ScoredBoxes:
    """The boxes ``found``, one entry per image of ``truths`` and in its order."""
    hits = [
        pairwise_iou(one.boxes_D4, truth.boxes_N4).max(axis=1, initial=0) >= THRESHOLD
        for truth, one in zip(truths, found, strict=True)
    ]
    evidence = {
        name: _joined([one.evidence.get(name, np.full(len(one), np.nan)) for one in found])
        for name in EVIDENCE
    }
    return ScoredBoxes(
        np.repeat(np.arange(len(found)), [len(one) for one in found]),
        _joined([one.scores_D for one in found]),
        _joined(hits).astype(bool),
        {name: values for name, values in evidence.items() if not np.isnan(values).all()},
    )


def measure_scores(boxes: ScoredBoxes, *, num_resamples: int, seed: int) -> ScoreQuality | None:
    """What the scores are worth; None where there are none: all are 1, as where a file has none."""
    if (boxes.score_D == 1).all():
        return None
    complete = {name: v for name, v in boxes.evidence.items() if not np.isnan(v).any()}
    precision_C = precision_at_coverage(boxes.score_D, boxes.hit_D, COVERAGES)
    probable = are_probabilities(boxes.score_D)
    return ScoreQuality(
        num_boxes=len(boxes),
        num_right=int(boxes.hit_D.sum()),
        span=(float(boxes.score_D.min()), float(boxes.score_D.max())),
        ranking={
            name: ranking(boxes, value_D, num_resamples=num_resamples, seed=seed)
            for name, value_D in ({"scores": boxes.score_D} | complete).items()
        },
        precision_at=dict(zip(COVERAGES, precision_C.tolist(), strict=True)),
        reliability=reliability(boxes.score_D, boxes.hit_D) if probable else None,
        brier=brier_score(boxes.score_D, boxes.hit_D) if probable else None,
    )


def ranking_of(
    truths: Sequence[GroundTruth], found: Sequence[Detections], *, num_resamples: int = 2000
) -> Ranking:
    """How well the scores of these boxes rank them."""
    boxes = scored_boxes(truths, found)
    return ranking(boxes, boxes.score_D, num_resamples=num_resamples, seed=0)


def ranking(boxes: ScoredBoxes, value_D: Floats, *, num_resamples: int, seed: int) -> Ranking:
    """How well some value ranks the boxes, with its interval over images."""
    area = weighted_area_under_curve(value_D, boxes.hit_D, boxes.fold_D)
    whole = area(np.ones(len(boxes)))
    if np.isnan(whole):
        return Ranking(None, None)
    return Ranking(
        whole, auroc_interval(area, boxes.image_D, num_resamples=num_resamples, seed=seed)
    )


def _joined(parts: Sequence[Floats] | Sequence[Bools]) -> Floats:
    joined: Floats = np.concatenate([np.zeros(0), *parts])
    return joined
