"""A detector's folder gives back the detector, with other limits where they are asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.detection.box_loader import SeenSize
from pipeline.detection.detector import build_detector, default_options
from pipeline.detection.exported_detector import StoredDetector, read_detector, write_detector
from pipeline.detection.predictor import Predictor
from pipeline.evaluation.predictions import Detections
from pipeline.storage import Location

PHOTO = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = build_detector(default_options("nano"))
    place = Location.parse(str(tmp_path))
    made_by = {"config": {"round": 2}}
    write_detector(
        detector,
        place,
        size=SeenSize(64, 128),
        classes=["object"],
        made_by=made_by,
    )
    return place


def found_by(stored: StoredDetector) -> Detections:
    return Predictor(stored.detector, stored.size).predict(PHOTO)


def test_it_is_read_as_it_was_written(folder: Location) -> None:
    stored = read_detector(folder)
    assert stored.classes == ("object",)
    assert stored.made_by == {"config": {"round": 2}}
    assert stored.size == SeenSize(64, 128)
    assert stored.detector.options == default_options("nano")


def test_limits_take_away_detections_and_nothing_else(folder: Location) -> None:
    everything = found_by(read_detector(folder))
    middle = float(np.sort(everything.scores_D)[len(everything) // 2])
    surer = found_by(read_detector(folder, score_threshold=middle))
    kept_D = everything.scores_D > middle
    assert 0 < kept_D.sum() < len(everything)
    assert np.array_equal(surer.boxes_D4, everything.boxes_D4[kept_D])
    few = found_by(read_detector(folder, max_detections=3))
    assert np.array_equal(few.boxes_D4, everything.boxes_D4[:3])
