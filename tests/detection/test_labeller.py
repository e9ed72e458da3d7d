"""A batch of images becomes rows of many boxes: those the detector finds in each image alone."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.data.pixels import load_pixels
from pipeline.data.pseudo_labels import SCHEMA
from pipeline.detection.box_loader import SeenSize
from pipeline.detection.detector import Detector, build_detector, default_options
from pipeline.detection.labeller import DetectionLabeller, method_of
from pipeline.detection.predictor import Predictor
from pipeline.labelling.rows import Provenance

DECODE: dict[str, Any] = {
    "min_side": 16,
    "max_side": 2666,
    "max_pixels": 10**8,
    "background": (255, 255, 255),
}
PROVENANCE = Provenance("run", "config", "weights")
SIZES = [(96, 64), (64, 96), (96, 64), (150, 100), (80, 80), (96, 64), (33, 91)]


def detector(**options: Any) -> Detector:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_detector(default_options("nano", **options))


class Scripted(Detector):
    """Finds the same boxes in each image it is shown, and notes what it was shown."""

    def __init__(self, boxes: list[list[float]], scores: list[float], *, room: int = 99) -> None:
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.options = default_options("nano")
        self.boxes, self.scores, self.room = torch.tensor(boxes), torch.tensor(scores), room
        self.shown: list[tuple[int, ...]] = []

    def forward(self, images: list[torch.Tensor], targets: Any = None, canvas: Any = None) -> Any:
        self.shown.append((len(images), *images[0].shape[1:]))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        labels = torch.arange(1, len(self.scores) + 1)
        return [{"boxes": self.boxes, "scores": self.scores, "labels": labels} for _ in images]


def labeller(
    network: Detector, *, short_side: int = 64, max_side: int = 128, **options: Any
) -> DetectionLabeller:
    predictor = Predictor(network, SeenSize(short_side, max_side))
    return DetectionLabeller(predictor, PROVENANCE, **options)


def decoded(uris: list[str], **changes: int) -> pa.Table:
    inputs = pa.table({"image_id": [str(i) for i in range(len(uris))], "uri": uris})
    return load_pixels(inputs, **{**DECODE, **changes})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(len(SIZES))]
    for path, (width, height) in zip(paths, SIZES, strict=True):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def test_a_row_holds_what_the_detector_finds_in_the_image_alone(photos: list[str]) -> None:
    label = labeller(detector())
    table = label(decoded(photos))
    assert table.schema == SCHEMA
    for uri, row in zip(photos, table.to_pylist(), strict=True):
        found = label.predictor.predict(uri)
        assert len(found) > 1
        assert np.array_equal(np.float32(row["boxes"]), np.float32(found.boxes_D4))
        assert np.array_equal(np.float32(row["scores"]), np.float32(found.scores_D))
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert (row["seed_xy"], row["seed_degree"], row["method"]) == (None, None, "cad")
        assert (row["run_id"], row["config_hash"], row["weights_sha256"]) == tuple(
            vars(PROVENANCE).values()
        )


def test_images_have_the_same_boxes_in_any_company(photos: list[str]) -> None:
    alone = labeller(detector(), batch_size=1)(decoded(photos)).to_pylist()
    shuffled = random.Random(0).sample(photos, len(photos))
    together = labeller(detector(), batch_size=8)(decoded(shuffled)).to_pylist()
    rows = {row["uri"]: row for row in together}
    for row in alone:
        other = rows[row["uri"]]
        np.testing.assert_allclose(row["boxes"], other["boxes"], atol=1e-3)
        np.testing.assert_allclose(row["scores"], other["scores"], atol=1e-5)


def test_only_images_of_one_size_to_the_detector_share_a_pass(photos: list[str]) -> None:
    network = Scripted([[0, 0, 9, 9]], [0.9])
    labeller(network, batch_size=3)(decoded(photos))
    # 150 x 100 is 96 x 64 too, once it is resized.
    assert sorted(network.shown) == [
        (1, 64, 64),
        (1, 64, 96),
        (1, 96, 64),
        (1, 128, 46),
        (3, 64, 96),
    ]


def test_boxes_of_an_image_that_was_scaled_down_are_in_its_own_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (1200, 800)).save(tmp_path / "big.png")
    network = Scripted([[10, 20, 50, 60], [0, 0, 96, 64]], [0.9, 0.4])
    table = decoded([str(tmp_path / "big.png")], max_side=300)
    assert table["pixel_columns"][0].as_py() == 300
    row = labeller(network)(table).to_pylist()[0]
    assert (row["width"], row["height"]) == (1200, 800)
    np.testing.assert_allclose(row["boxes"], [[125, 250, 625, 750], [0, 0, 1200, 800]], rtol=1e-6)
    assert row["labels"] == [1, 2]
    # Of the surest box, which touches nothing.
    assert row["area_fraction"] == pytest.approx(500 * 500 / (1200 * 800))
    assert row["touches_border"] is False


def test_a_box_without_area_in_the_table_is_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    uris = [str(tmp_path / "a.png")]
    thin = [90.0, 1.0, 90.000001, 9.0]
    some = labeller(Scripted([thin, [1, 2, 3, 4]], [0.9, 0.8]))(decoded(uris)).to_pylist()[0]
    assert (some["boxes"], some["labels"]) == ([[1, 2, 3, 4]], [2])
    none = labeller(Scripted([thin], [0.9]))(decoded(uris)).to_pylist()[0]
    assert (none["status"], none["boxes"]) == ("no_object", [])


def test_an_image_in_which_nothing_is_found_is_no_object(photos: list[str]) -> None:
    rows = labeller(detector(score_threshold=1.0))(decoded(photos)).to_pylist()
    for row in rows:
        assert (row["status"], row["boxes"], row["scores"]) == ("no_object", [], [])
        assert row["error"] == "the detector found nothing with a score above 1"


def test_rows_keep_their_order_and_bad_ones_their_status(photos: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.new("RGB", (8, 64)).save(tmp_path / "small.png")
    bad = [str(tmp_path / name) for name in ("text.jpg", "gone.png", "small.png")]
    uris = [bad[0], photos[0], bad[1], photos[1], bad[2], photos[2]]
    table = labeller(detector())(decoded(uris))
    assert table["uri"].to_pylist() == uris
    assert table["status"].to_pylist() == [
        *("error_decode", "ok", "error_read", "ok", "skipped_too_small", "ok")
    ]
    for row in table.to_pylist():
        assert (row["boxes"] is not None) == (row["status"] == "ok")
    assert labeller(detector())(decoded([])).num_rows == 0


def test_a_batch_too_big_for_memory_is_halved_and_one_image_costs_only_itself(
    photos: list[str],
) -> None:
    same = [photos[0], photos[2], photos[5], photos[3]]
    network = Scripted([[0, 0, 9, 9]], [0.9], room=1)
    table = labeller(network, batch_size=4)(decoded(same))
    assert table["status"].to_pylist() == ["ok"] * 4
    assert [number for number, *_ in network.shown] == [4, 2, 1, 1, 2, 1, 1]
    hopeless = labeller(Scripted([[0, 0, 9, 9]], [0.9], room=0))(decoded(photos[:1]))
    assert hopeless["status"].to_pylist() == ["error_memory"]
    assert "96x64 pixels" in hopeless["error"][0].as_py()


@pytest.mark.parametrize(
    ("made_by", "method"),
    [
        ({}, "cad"),
        ({"config": None}, "cad"),
        ({"config": {"round": 1}}, "cad"),
        ({"config": {"round": 3}}, "cad_r3"),
    ],
)
def test_the_method_names_the_round_of_self_training(made_by: dict[str, Any], method: str) -> None:
    assert method_of(made_by) == method
