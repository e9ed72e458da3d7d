"""A batch of decoded images -> rows of many boxes each, by a trained detector.

The counterpart of labelling/labeller.py, and like it without Ray: a notebook can call
``DetectionLabeller`` on a table of ``data.pixels.load_pixels``.

Shape letters:  D boxes of one image
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.boxes import area, clip, rescale
from pipeline.config.settings import Precision
from pipeline.detection.exported_detector import StoredDetector
from pipeline.detection.predictor import Predictor
from pipeline.evaluation.predictions import Detections
from pipeline.labelling.rows import (
    Image,
    Outcome,
    Provenance,
    decoded_images,
    label_rows,
    no_object,
    rows_in_groups,
    too_large,
)
from pipeline.models.features import as_fits, in_precision

METHOD = "cad"
# The head of c4 sees a thousand regions of each image: more images at once save it nothing.
BATCH_SIZES = {"cpu": 1, "cuda": 4}


def method_of(made_by: Mapping[str, Any]) -> str:
    """What rows of this detector name as their method: ``cad``, and ``cad_r2`` of a second round.

    Args:
        made_by: what the detector's folder tells of the run that trained it.
    """
    number = (made_by.get("config") or {}).get("round", 1)
    return METHOD if number == 1 else f"{METHOD}_r{number}"


class DetectionLabeller:
    """Gives each row of decoded pixels its boxes; a row without pixels keeps its status.

    Args:
        predictor: the detector, on the device to compute on.
        provenance: copied into every row.
        method: what each row says found its boxes.
        precision: of the detector's forward pass.
        batch_size: images per forward pass; None is what suits the device (``BATCH_SIZES``).
    """

    def __init__(
        self,
        predictor: Predictor,
        provenance: Provenance,
        *,
        method: str = METHOD,
        precision: Precision = "fp32",
        batch_size: int | None = None,
    ) -> None:
        self.predictor = predictor
        self.provenance = provenance
        self.method = method
        self.precision: Precision = precision
        self.batch_size = batch_size or BATCH_SIZES[predictor.device.type]

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Rows of ``PIXELS_SCHEMA`` -> as many rows of ``pseudo_labels.SCHEMA``, in their order.

        Boxes are in pixels of the original, the surest first. Images that the detector sees in one
        size go through it together, at most ``batch_size`` at once; none is padded to another's
        size.
        """
        images = decoded_images(decoded)
        sizes = decoded.select(["width", "height"]).to_pylist()
        outcomes: dict[int, Outcome] = {}
        for rows in self.batches(images):
            batch = [image for row in rows if (image := images[row]) is not None]
            for row, image, found in zip(rows, batch, self._detect(batch), strict=True):
                if not isinstance(found, Detections):
                    outcomes[row] = found
                else:
                    outcomes[row] = self._outcome(found, image, **sizes[row])
        return label_rows(decoded, outcomes, method=self.method, provenance=self.provenance)

    def batches(self, images: Sequence[Image | None]) -> Iterator[list[int]]:
        """Row numbers of one size to the detector, in groups of at most ``batch_size``."""
        seen = [
            None if image is None else self.predictor.seen_size(image.shape[1], image.shape[0])
            for image in images
        ]
        yield from rows_in_groups(seen, self.batch_size)

    def _detect(self, images: Sequence[Image]) -> list[Detections | Outcome]:
        """In pixels of the images given; an outcome where memory has no room for one."""
        device = str(self.predictor.device)

        def detect(batch: Sequence[Image]) -> list[Detections | Outcome]:
            with in_precision(self.precision, device):
                return list(self.predictor.predict_all(batch))

        return as_fits(detect, images, refuse=lambda one: too_large(one, device), device=device)

    def _outcome(self, found: Detections, image: Image, *, width: int, height: int) -> Outcome:
        """The row of an image whose original, of this size, may have been scaled down."""
        rows, columns, _ = image.shape
        boxes_D4 = rescale(found.boxes_D4, width / columns, height / rows)
        boxes_D4 = clip(boxes_D4, width, height).astype(np.float32)
        # A hair's breadth may be gone in float32; a reader must not meet a box without area.
        whole_D = (boxes_D4[:, 2:] > boxes_D4[:, :2]).all(axis=1)
        if not whole_D.any():
            least = self.predictor.detector.options.score_threshold
            return no_object(f"the detector found nothing with a score above {least:g}")
        boxes_D4 = boxes_D4[whole_D]
        best_4 = boxes_D4[0]
        return {
            "status": "ok",
            "error": None,
            "boxes": list(boxes_D4),
            "scores": found.scores_D[whole_D],
            "labels": found.labels_D[whole_D],
            "area_fraction": float(area(best_4)[0]) / (width * height),
            "touches_border": bool(
                (best_4[:2] <= 0).any() or (best_4[2:] >= (width, height)).any()
            ),
        }


@dataclass(frozen=True, eq=False)
class DetectedBoxes:
    """Many boxes per image, found by a trained detector: a recipe for a labeller.

    To be pickled once and called where the images are.
    """

    stored: StoredDetector
    method: str = METHOD
    precision: Precision = "fp32"
    batch_size: int | None = None

    def __call__(self, provenance: Provenance, device: str) -> DetectionLabeller:
        """The labeller, its detector on ``device`` (``cpu``, ``cuda``)."""
        detector = self.stored.detector.to(torch.device(device))
        return DetectionLabeller(
            Predictor(detector, self.stored.size),
            provenance,
            method=self.method,
            precision=self.precision,
            batch_size=self.batch_size,
        )
