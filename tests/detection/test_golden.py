"""Detectron2's R50-C4 with the norm after layer4, narrow: same weights in, same numbers out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.detection.detector import Detector, DetectorOptions, build_detector
from tests.conftest import ReadGolden

# 200 pixels have a last digit of 1.5e-5.
CLOSE_PX = 6e-5
OPTIONS = DetectorOptions(width=4, stem_width=8, anchor_sizes=(16, 32, 64, 96, 128))
EVERYTHING = replace(
    OPTIONS,
    rpn_batch=100_000,
    rpn_positive_fraction=1.0,
    roi_batch=100_000,
    roi_positive_fraction=1.0,
    rpn_pre_nms_train=500,
    rpn_post_nms_train=24,
)


@pytest.fixture(scope="module")
def golden(read_golden: ReadGolden) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in read_golden("cad.npz").items()}


@pytest.fixture(scope="module")
def images(golden: dict[str, Any]) -> list[Tensor]:
    return [golden[f"image{index}"].float() / 255 for index in range(2)]


def with_weights(options: DetectorOptions, golden: dict[str, Any]) -> Detector:
    detector = build_detector(options)
    weights = {name[3:]: one for name, one in golden.items() if name.startswith("sd/")}
    missing, unexpected = detector.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return detector


@pytest.fixture(scope="module")
def detector(golden: dict[str, Any]) -> Detector:
    detector = with_weights(OPTIONS, golden)
    detector.eval()
    return detector


def far(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@torch.no_grad()
def test_features_anchors_pooled_regions_and_proposals_are_detectron2s(
    detector: Detector, golden: dict[str, Any], images: list[Tensor]
) -> None:
    batch, _ = detector.transform(images)
    features = detector.backbone(batch.tensors)
    assert far(features["0"], golden["res4"]) < 2e-6
    (anchors_A4, _) = detector.rpn.anchor_generator(batch, [features["0"]])
    assert len(anchors_A4) == golden["n_anchors"]
    assert torch.equal(anchors_A4[:45], golden["anchors_head"])
    assert torch.equal(anchors_A4[-45:], golden["anchors_tail"])
    boxes = [golden["gt0"], golden["gt1"]]
    pooled = detector.roi_heads.box_roi_pool(features, boxes, batch.image_sizes)
    assert far(pooled[:, :4], golden["roialign"]) < 2e-6
    proposals, _ = detector.rpn(batch, features)
    for index, found in enumerate(proposals):
        assert far(found[:60], golden[f"prop{index}"]) < CLOSE_PX


@torch.no_grad()
def test_detections_are_detectron2s(
    detector: Detector, golden: dict[str, Any], images: list[Tensor]
) -> None:
    for index, found in enumerate(detector(images)):
        assert far(found["boxes"], golden[f"det{index}_boxes"]) < CLOSE_PX
        assert far(found["scores"], golden[f"det{index}_scores"]) < 3e-7
        assert found["labels"].tolist() == [1] * 100


def test_losses_and_moving_averages_are_detectron2s(
    golden: dict[str, Any], images: list[Tensor]
) -> None:
    detector = with_weights(replace(EVERYTHING, roi_normaliser="batch"), golden)
    targets = [
        {"boxes": golden[name], "labels": torch.ones(len(golden[name]), dtype=torch.int64)}
        for name in ("gt0", "gt1")
    ]
    with torch.no_grad():
        losses = detector(images, targets)
    theirs = {
        "loss_classifier": "cls",
        "loss_box_reg": "box_reg",
        "loss_objectness": "rpn_cls",
        "loss_rpn_box_reg": "rpn_loc",
    }
    assert losses.keys() == theirs.keys()
    for ours, name in theirs.items():
        assert float(losses[ours]) == pytest.approx(float(golden[f"train_loss_{name}"]), rel=3e-5)
    for name in ("backbone.layer3.5.bn3", "box_head.norm"):
        part = detector.get_submodule(name.replace("box_head", "roi_heads.box_head"))
        assert far(part.running_mean, golden[f"running_mean_after/{name}"]) < 1e-6
