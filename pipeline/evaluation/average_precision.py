"""Boxes with scores against all objects: COCO's average precision and recall, class-agnostic.

pycocotools does the matching and the arithmetic (Lin et al., 2014; 101 recall points, at most 100
boxes per image), as in the tables of LOST and CutLER. What differs between papers is what becomes
of VOC's difficult objects, which moves AP50 by about ten points, so every result names its rule:

    drop    they are no objects, and a box on one is false (Detectron2, LOST)
    ignore  a box on one counts neither way, one box for each (as the VOC devkit has it)
    keep    they are objects like all others

How sure an AP50 is, the bootstrap over images tells without matching anything again. A box is true
or false by its own image alone, so drawing an image twice doubles its boxes and its objects and
changes no match. AP50 of a resample is then a weighted sum over the boxes sorted once: equal to
COCOeval's on the images drawn, and in microseconds per thousand boxes. (Only where boxes of one
image have equal scores, whose order means nothing: copies of a box stay together here, while
COCOeval goes through one copy of the image after the other.)

To add a number: its name beside ``STATS``, or a function of ``Matches`` below
``recall_by_num_objects``.

Shape letters:  N images   D boxes of all images   P true boxes   T IoU thresholds   Q recall points
                R resamples
"""

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.boxes import Boxes, area, as_boxes, xywh_to_xyxy, xyxy_to_xywh
from pipeline.config.labelling import Difficult
from pipeline.data.ground_truth import GroundTruth
from pipeline.evaluation.corloc import interval_95
from pipeline.evaluation.predictions import Detections

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

STATS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)
"""Names of COCOeval's twelve numbers, in its order."""

MAX_BOXES = 100
CURVES = (0.5, 0.75)
"""IoU thresholds whose precision over recall is kept for the picture."""

NUM_GROUPS = ((1, 1), (2, 2), (3, 4), (5, 9), (10, None))
"""From and to how many objects an image has."""


@dataclass(frozen=True, eq=False)
class Matches:
    """What became of every box and object at IoU 0.5. Boxes are ordered by image, best first.

    Boxes that count neither way (on an ignored object) are not here.

    Attributes:
        image_D: whose box it is, an index of the images.
        score_D: as given.
        true_D: it found an object; else it is a false positive.
        boxes_D4: the boxes.
        num_objects_N: objects that count, per image.
        missed_N: the boxes ``(M, 4)`` of the objects that no box found, per image.
    """

    image_D: Ints
    score_D: Floats
    true_D: Bools
    boxes_D4: Boxes
    num_objects_N: Ints
    missed_N: tuple[Boxes, ...]

    @property
    def num_found_N(self) -> Ints:
        """Objects that a box found, per image."""
        return self.num_objects_N - np.array([len(one) for one in self.missed_N], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class AveragePrecision:
    """COCO's numbers.

    Attributes:
        difficult: what became of objects marked difficult.
        stats: fractions by the names of ``STATS``; None where there is no object of that size.
        precision_Q: over the recalls 0, 0.01 ... 1, for each of ``CURVES``; empty without objects.
        matches: box by box.
    """

    difficult: Difficult
    stats: dict[str, float | None]
    precision_Q: dict[float, Floats]
    matches: Matches

    @property
    def num_objects(self) -> int:
        """Objects that count."""
        return int(self.matches.num_objects_N.sum())


@dataclass(frozen=True)
class RecallGroup:
    """Images with so many objects, and how many of these are found at IoU 0.5."""

    num_images: int
    num_objects: int
    num_found: int


class _HonouringIgnore(COCOeval):  # type: ignore[misc]
    """COCOeval overwrites ``ignore`` with ``iscrowd``; here ``difficult`` is ignored as well.

    A crowd takes any number of boxes by their own area; an ignored object takes one, by IoU.
    """

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for item in objects:
                item["ignore"] = bool(item["iscrowd"] or item["set_aside"])


def average_precision(
    truths: Sequence[GroundTruth], found: Sequence[Detections], *, difficult: Difficult = "drop"
) -> AveragePrecision:
    """COCO's numbers of the boxes ``found``, one entry per image of ``truths`` and in its order.

    All images count: boxes in an image without objects are false. Boxes of equal score stand in the
    order of the images, which is part of the result.

    Raises:
        ValueError: other numbers of images, or no such rule for difficult objects.
    """
    if len(truths) != len(found) or difficult not in get_args(Difficult):
        raise ValueError(
            f"found must have {len(truths)} entries, got {len(found)}; difficult must be one of "
            f"{', '.join(get_args(Difficult))}, got {difficult!r}"
        )
    # pycocotools tells its steps on stdout.
    with redirect_stdout(io.StringIO()):
        judge = _HonouringIgnore(
            _coco(truths, _objects(truths, difficult)), _coco(truths, _boxes(found)), "bbox"
        )
        judge.params.maxDets = [1, 10, MAX_BOXES]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    values = (float(value) for value in judge.stats)
    stats = {name: None if value < 0 else value for name, value in zip(STATS, values, strict=True)}
    curves = {at: _curve(judge, at) for at in CURVES} if stats["ap50"] is not None else {}
    return AveragePrecision(difficult, stats, curves, _matches(judge, len(truths), found))


def recall_by_num_objects(matches: Matches) -> dict[str, RecallGroup]:
    """By the number of objects in the image, such as ``"3-4"``; groups without images are absent.

    One box per image finds at most a share of 1 / n where there are n objects.
    """
    num_N, found_N = matches.num_objects_N, matches.num_found_N
    groups: dict[str, RecallGroup] = {}
    for low, high in NUM_GROUPS:
        member_N = (num_N >= low) & (num_N <= (np.inf if high is None else high))
        name = f"{low}+" if high is None else f"{low}" if low == high else f"{low}-{high}"
        if member_N.any():
            groups[name] = RecallGroup(
                int(member_N.sum()), int(num_N[member_N].sum()), int(found_N[member_N].sum())
            )
    return groups


def equally_sure(found: Sequence[Detections]) -> list[Detections]:
    """The same boxes, each with the score 1."""
    return [replace(one, scores_D=np.ones(len(one))) for one in found]


# ---- to pycocotools and back


def _objects(truths: Sequence[GroundTruth], difficult: Difficult) -> list[dict[str, Any]]:
    """COCO's annotations; numbers count from 1, as COCOeval takes 0 for no match."""
    entries: list[dict[str, Any]] = []
    for number, truth in enumerate(truths):
        shown = truth.without_difficult() if difficult == "drop" else truth
        areas_N = area(shown.boxes_N4) if shown.areas_N is None else shown.areas_N
        aside_N = shown.difficult_N & (difficult == "ignore")
        for box, size, aside in zip(shown.boxes_N4, areas_N, aside_N, strict=True):
            entries.append(_entry(number, box, float(size)) | {"set_aside": bool(aside)})
        for box, size in zip(truth.crowds_M4, area(truth.crowds_M4), strict=True):
            entries.append(_entry(number, box, float(size)) | {"iscrowd": 1})
    return _numbered(entries)


def _boxes(found: Sequence[Detections]) -> list[dict[str, Any]]:
    return _numbered(
        [
            _entry(number, box, float(size)) | {"score": float(score)}
            for number, one in enumerate(found)
            for box, size, score in zip(one.boxes_D4, area(one.boxes_D4), one.scores_D, strict=True)
        ]
    )


def _entry(image: int, box: Floats, size: float) -> dict[str, Any]:
    return {
        "image_id": image,
        "category_id": 1,
        "bbox": xyxy_to_xywh(box)[0].tolist(),
        "area": size,
        "iscrowd": 0,
        "set_aside": False,
    }


def _numbered(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, entry in enumerate(entries):
        entry["id"] = number + 1
    return entries


def _coco(truths: Sequence[GroundTruth], annotations: list[dict[str, Any]]) -> Any:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(len(truths))],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    coco.createIndex()
    return coco


def _curve(judge: Any, threshold: float) -> Floats:
    index = int(np.argmin(np.abs(judge.params.iouThrs - threshold)))
    # Axes: threshold, recall, category, area range (the first is all), number of boxes.
    curve: Floats = judge.eval["precision"][index, :, 0, 0, -1]
    return curve


def _matches(judge: Any, num_images: int, found: Sequence[Detections]) -> Matches:
    """At the first threshold, 0.5, and of objects of any size: the first of its entries."""
    every_D4 = as_boxes(np.concatenate([np.zeros((0, 4)), *(one.boxes_D4 for one in found)]))
    parts: list[tuple[int, list[float], Bools, Boxes]] = []
    num_objects_N = np.zeros(num_images, dtype=np.int64)
    missed = [as_boxes([])] * num_images
    for number, entry in enumerate(judge.evalImgs[:num_images]):
        if entry is None:
            continue
        counts_D = ~entry["dtIgnore"][0].astype(bool)
        index_D = np.array(entry["dtIds"], dtype=np.int64) - 1
        scores_D = np.array(entry["dtScores"], dtype=np.float64)[counts_D]
        true_D = entry["dtMatches"][0][counts_D] > 0
        parts.append((number, scores_D.tolist(), true_D, every_D4[index_D[counts_D]]))
        object_ids = np.array(entry["gtIds"], dtype=np.int64)
        wanted = entry["gtIgnore"] == 0 if len(object_ids) else np.zeros(0, dtype=bool)
        num_objects_N[number] = int(wanted.sum())
        lost = object_ids[wanted & (entry["gtMatches"][0] == 0)]
        missed[number] = xywh_to_xyxy([judge.cocoGt.anns[int(one)]["bbox"] for one in lost])
    return Matches(
        image_D=np.repeat([part[0] for part in parts], [len(part[1]) for part in parts]).astype(
            np.int64
        ),
        score_D=np.array([score for part in parts for score in part[1]], dtype=np.float64),
        true_D=np.concatenate([np.zeros(0, dtype=bool), *(part[2] for part in parts)]),
        boxes_D4=as_boxes(np.concatenate([np.zeros((0, 4)), *(part[3] for part in parts)])),
        num_objects_N=num_objects_N,
        missed_N=tuple(missed),
    )


# COCOeval's own: the last recall must come out as exactly 1.
_RECALLS_Q = np.linspace(0.0, 1.0, 101)

Weighted = Callable[[NDArray[np.integer]], float]


def weighted_ap50(matches: Matches) -> Weighted:
    """A function from how often each image is there, ``(N,)``, to the AP50 of that collection.

    It gives NaN where the images hold no object. With all ones it is COCOeval's AP50.
    """
    order_D = np.argsort(-matches.score_D, kind="stable")
    true_D = matches.true_D[order_D]
    # Nothing after the last true box moves an average precision: recall has ended there.
    last = int(np.flatnonzero(true_D)[-1]) + 1 if true_D.any() else 0
    image_D = matches.image_D[order_D][:last]
    at_P = np.flatnonzero(true_D[:last])
    image_P = image_D[at_P]

    def ap50(count_N: NDArray[np.integer]) -> float:
        num_objects = int(count_N @ matches.num_objects_N)
        if not num_objects:
            return float("nan")
        if not last:
            return 0.0
        boxes_P = np.cumsum(count_N[image_D])[at_P]
        true_P = np.cumsum(count_N[image_P])
        # As COCOeval adds it: precision 0 where no box has been drawn yet.
        precision_P = true_P / (boxes_P + np.spacing(1))
        envelope_P = np.maximum.accumulate(precision_P[::-1])[::-1]
        first_Q = np.searchsorted(true_P / num_objects, _RECALLS_Q, side="left")
        reached_Q = first_Q[first_Q < len(envelope_P)]
        return float(envelope_P[reached_Q].sum() / len(_RECALLS_Q))

    return ap50


def resampled_ap50(matches: Matches, *, num_resamples: int, rng: np.random.Generator) -> Floats:
    """``(R,)`` AP50 of resamples of the images with replacement; those without objects are NaN."""
    ap50 = weighted_ap50(matches)
    num_images = len(matches.num_objects_N)
    share_N = np.full(num_images, 1 / num_images)
    return np.array([ap50(rng.multinomial(num_images, share_N)) for _ in range(num_resamples)])


def ap50_interval(matches: Matches, *, num_resamples: int, seed: int) -> tuple[float, float] | None:
    """The middle 95 % of the resamples' AP50; None where there is no object."""
    if not len(matches.num_objects_N):
        return None
    rng = np.random.default_rng(seed)
    ap50_R = resampled_ap50(matches, num_resamples=num_resamples, rng=rng)
    known_R = ap50_R[~np.isnan(ap50_R)]
    return interval_95(known_R) if len(known_R) else None
