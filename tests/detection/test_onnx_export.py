"""Detectors as ONNX files, run by ONNX Runtime."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from pipeline.detection.box_loader import SeenSize
from pipeline.detection.detector import build_detector, default_options
from pipeline.detection.exported_detector import StoredDetector
from pipeline.detection.onnx_export import Likeness, export_detector_onnx, likeness
from pipeline.errors import WeightsError
from pipeline.storage import Location

NARROW: dict[str, Any] = {"width": 16, "stem_width": 16, "freeze_at": 0}
FEW: dict[str, Any] = {"rpn_pre_nms_test": 200, "rpn_post_nms_test": 60, "score_threshold": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "nano": {},
    "c4": {"backbone": "resnet18", **NARROW, **FEW},
    "fpn": {"backbone": "resnet10", **NARROW, **FEW},
    "convnext": {"kind": "fpn", "backbone": "timm/convnext_atto", **FEW},
    "regnet": {"kind": "fpn", "backbone": "timm/regnetx_002", "norm": "pooled", **FEW},
}


@pytest.fixture
def onnxruntime() -> Any:
    """ONNX Runtime, where the extra that an export takes is installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install patchseed[export]")
    return importlib.import_module("onnxruntime")


def built(name: str, **changes: Any) -> StoredDetector:
    """A detector that finds many things, of several sizes and three classes, on any image."""
    torch.manual_seed(0)
    options = {"kind": name, "num_classes": 3, **KINDS[name], **changes}
    detector = build_detector(default_options(options.pop("kind"), **options))
    for layer in (detector.rpn.head.cls_logits, detector.roi_heads.box_predictor.cls_score):
        nn.init.normal_(layer.weight, std=0.05)
    return StoredDetector(detector, SeenSize(64, 80), ("a", "b", "c"), "", {})


def noise(height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def at(path: Path) -> Location:
    return Location.parse(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_onnx_file_finds_what_the_detector_finds(
    tmp_path: Path, name: str, onnxruntime: Any
) -> None:
    stored = built(name)
    check = export_detector_onnx(stored, at(tmp_path))
    assert stored.detector.training
    assert (check.num_images, check.num_unlike) == (3, 0)
    assert check.num_detections > 20
    assert check.max_box_difference < 1e-2
    content = (tmp_path / "model.onnx").read_bytes()
    assert check.sha256 == hashlib.sha256(content).hexdigest()
    assert [place.name for place in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["boxes", "scores", "labels"]
    stored.detector.eval()
    # Other sizes than those that were traced and compared; one no multiple of any stride.
    for image_3HW in (noise(101, 75), noise(64, 130)):
        boxes_D4, scores_D, labels_D = session.run(None, {"image": image_3HW.numpy()})
        with torch.no_grad():
            (expected,) = stored.detector([image_3HW.float() / 255])
        assert len(boxes_D4) == len(expected["boxes"]) > 0
        # In the order of the scores, equal ones in any.
        assert np.allclose(scores_D, expected["scores"], rtol=0, atol=1e-4)
        found_D4 = torch.from_numpy(boxes_D4)
        iou_DD = box_iou(found_D4, expected["boxes"]) * (
            torch.from_numpy(labels_D)[:, None] == expected["labels"][None]
        )
        nearest_D = iou_DD.argmax(dim=1)
        assert sorted(nearest_D.tolist()) == list(range(len(boxes_D4)))
        assert (found_D4 - expected["boxes"][nearest_D]).abs().max() < 1e-2


@pytest.mark.slow
def test_photos_are_compared_too(tmp_path: Path, onnxruntime: Any) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    assert export_detector_onnx(built("nano"), at(tmp_path), photos=[photo]).num_images == 4


class Fickle(nn.Module):
    """Shifts the regions by half a cell where it is traced: ROIAlign as it was before."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, features: Any, boxes: list[Tensor], shapes: Any) -> Tensor:
        shift = 8.0 if torch.onnx.is_in_onnx_export() else 0.0
        pooled: Tensor = self.pool(features, [one + shift for one in boxes], shapes)
        return pooled


class Unexportable(nn.Module):
    """Computes what no operator of ONNX does."""

    def forward(self, features: Any, boxes: list[Tensor], shapes: Any) -> Tensor:
        left: Tensor = torch.linalg.svd(torch.cat(boxes))[0]
        return left


def spoilt(pool: Any) -> StoredDetector:
    stored = built("nano")
    stored.detector.roi_heads.box_roi_pool = pool(stored.detector)
    return stored


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (
            lambda detector: Fickle(detector.roi_heads.box_roi_pool),
            r"model\.onnx was not written: on 3 images \d+ detections of \d+ are not the detector",
        ),
        (lambda _: Unexportable(), "the network cannot be exported to ONNX"),
    ],
)
def test_an_onnx_file_that_is_not_right_is_not_left_behind(
    tmp_path: Path, spoil: Any, complaint: str, onnxruntime: Any
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"of an earlier export")
    with pytest.raises(WeightsError, match=complaint) as caught:
        export_detector_onnx(spoilt(spoil), at(tmp_path))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_detector_that_finds_nothing_is_not_called_compared(
    tmp_path: Path, onnxruntime: Any
) -> None:
    with pytest.raises(WeightsError, match=r"finds nothing on 3 images .* give .* photos"):
        export_detector_onnx(built("nano", score_threshold=1.0), at(tmp_path))
    assert list(tmp_path.iterdir()) == []


def found(*rows: tuple[float, float, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of 10 px at so many pixels from the left, their scores and labels."""
    left = torch.tensor([row[0] for row in rows])
    boxes = torch.stack([left, left * 0, left + 10, left * 0 + 10], dim=-1).reshape(-1, 4)
    return boxes, torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])


NAN = float("nan")


@pytest.mark.parametrize(
    ("other", "unlike"),
    [
        ([(30.0, 0.5, 1), (0.005, 0.50005, 2)], 0),
        ([(30.0, 0.5, 1)], 1),
        ([(0.0, 0.5, 2), (30.0, 0.5, 1), (60.0, 0.5, 1)], 1),
        ([(0.0, 0.5, 2), (30.0, 0.5, 1), (30.0, 0.5, 1)], 1),
        ([(0.02, 0.5, 2), (30.0, 0.5, 1)], 1),
        ([(0.0, 0.5, 1), (30.0, 0.5, 1)], 1),
        ([(0.0, 0.4998, 2), (30.0, 0.5, 1)], 1),
        ([(NAN, 0.5, 2), (30.0, 0.5, 1)], 1),
        ([(0.0, NAN, 2), (30.0, NAN, 1)], 2),
        ([], 2),
    ],
)
def test_detections_are_alike_in_any_order_and_within_the_tolerance(
    other: list[tuple[float, float, int]], unlike: int
) -> None:
    told = likeness(found((0.0, 0.5, 2), (30.0, 0.5, 1)), found(*other))
    assert (told.num, told.unlike) == (2, unlike)


def test_differences_are_those_of_partners() -> None:
    told = likeness(found((0.0, 0.5, 2), (30.0, 0.5, 1)), found((30.0, 0.5, 1), (0.004, 0.5, 2)))
    assert told.box_difference == pytest.approx(0.004, abs=1e-6)
    assert likeness(found(), found()) == Likeness(0, 0, 0.0, 0.0)
