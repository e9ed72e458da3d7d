"""What an actor is made of: pickled once, fetched once a node, built where its device is.

Another way to label is another recipe here, and a door like detect_images.py. Imported by the
actors: nothing of a driver's (MLflow, rich) belongs in here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import torch

from pipeline.config import BackboneConfig
from pipeline.detection.exported_detector import StoredDetector
from pipeline.detection.labeller import DetectionLabeller
from pipeline.detection.predictor import Predictor
from pipeline.labelling.labeller import Method, PseudoBoxLabeller
from pipeline.labelling.rows import Provenance
from pipeline.models.backbones import Weights, build_backbone
from pipeline.models.features import Precision

Labeller = Callable[[pa.Table], pa.Table]
"""Rows of ``PIXELS_SCHEMA`` in, as many rows of ``pseudo_labels.SCHEMA`` out."""

Recipe = Callable[[Provenance, str], Labeller]
"""What rows say of their making, and a device (``cpu``, ``cuda``), give a labeller."""


@dataclass(frozen=True, eq=False)
class PseudoBoxes:
    """One box per image, found in the features of a backbone."""

    backbone: BackboneConfig
    weights: Weights
    method: Method

    def __call__(self, provenance: Provenance, device: str) -> PseudoBoxLabeller:
        network = build_backbone(
            self.backbone.name,
            self.weights,
            feature=self.backbone.feature,
            block=self.backbone.block,
        )
        return PseudoBoxLabeller(network, self.method, provenance, device=device)


@dataclass(frozen=True, eq=False)
class DetectedBoxes:
    """Many boxes per image, found by a trained detector."""

    stored: StoredDetector
    method: str
    precision: Precision
    batch_size: int | None

    def __call__(self, provenance: Provenance, device: str) -> DetectionLabeller:
        detector = self.stored.detector.to(torch.device(device))
        return DetectionLabeller(
            Predictor(detector, self.stored.size),
            provenance,
            method=self.method,
            precision=self.precision,
            batch_size=self.batch_size,
        )
