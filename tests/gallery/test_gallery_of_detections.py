"""A detector's table as pictures: many boxes per image, no seeds, no maps."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DrawJob
from pipeline.drawing.images import METHOD_COLOURS
from pipeline.gallery.gallery import SHEET_NAME, draw_gallery
from tests.tables import label_row, write_table


def test_its_surest_boxes_are_drawn_and_no_maps_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.new("RGB", (240, 180)).save(photo)
    row = label_row(
        "a",
        uri=str(photo),
        width=240,
        height=180,
        method="cad_r2",
        # Not in the order of their scores, and the last one hardly believed.
        boxes=[[120, 20, 160, 60], [20, 20, 60, 60], [180, 120, 220, 160]],
        scores=[0.6, 0.9, 0.1],
        labels=[1, 1, 1],
    )
    write_table(tmp_path / "found", [row], config={"detector.weights_sha256": "w1"})
    job = DrawJob(labels=str(tmp_path / "found"), output=str(tmp_path / "out"))
    with caplog.at_level(logging.WARNING):
        assert draw_gallery(job) == 0
    assert not caplog.records
    with Image.open(tmp_path / "out" / SHEET_NAME) as sheet:
        pixels_HW3 = np.asarray(sheet.convert("RGB")).astype(int)
    blue_HW = (abs(pixels_HW3 - METHOD_COLOURS["cad"]) < 24).all(axis=-1)
    columns = np.flatnonzero(blue_HW.sum(axis=0) > 30)
    left = (sheet.width - 240) // 2
    edges = [column - left for column in columns]
    assert min(edges) == pytest.approx(20, abs=2)
    assert max(edges) == pytest.approx(160, abs=2)
