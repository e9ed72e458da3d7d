"""A detector learns: one picture by heart, and many so that it finds the object of others."""

import pytest
import torch

from pipeline.detection.detector import build_detector, default_options
from tests.detection.toy import average_precision, detect, fit, pictures


def test_one_picture_is_learnt_by_heart() -> None:
    torch.manual_seed(0)
    detector = build_detector(default_options("nano"))
    data = pictures(1, 5, side=96)
    fit(detector, data, steps=40, batch=1, lr=0.02)
    (found,) = detect(detector, data)
    first, best = float(found["scores"][0]), found["boxes"][0]
    assert first > 0.5
    torch.testing.assert_close(best, data[0][1]["boxes"][0], rtol=0, atol=12)


@pytest.mark.slow
def test_the_objects_of_other_pictures_are_found_after_120_steps() -> None:
    torch.manual_seed(0)
    detector = build_detector(default_options("nano"))
    seen, held_out = pictures(32, 1), pictures(32, 2)
    before = average_precision(detect(detector, held_out), held_out)
    fit(detector, seen, steps=120, batch=4, lr=0.04)
    assert before < 0.2
    assert average_precision(detect(detector, seen), seen) > 0.9
    assert average_precision(detect(detector, held_out), held_out) > 0.85
