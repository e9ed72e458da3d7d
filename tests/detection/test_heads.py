"""What regions are pooled to and what they cost, against one region at a time."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, roi_align
from torchvision.ops.poolers import LevelMapper

from pipeline.detection.detector import build_detector, default_options
from pipeline.detection.heads import AlignedPool, BoxHeads, RegionsOfImage, region_shares


def heads(**changes: Any) -> BoxHeads:
    built: BoxHeads = build_detector(default_options("nano", **changes)).roi_heads
    return built


def random_boxes(num: int, generator: torch.Generator, span: float = 100) -> Tensor:
    corners = torch.rand(num, 2, generator=generator) * span
    return torch.cat([corners, corners + 10 + torch.rand(num, 2, generator=generator) * span], 1)


def random_regions(generator: torch.Generator, num_classes: int) -> list[RegionsOfImage]:
    """Three images: 9 regions, 4 regions, and 5 regions of one without targets."""
    regions = []
    for count, num_targets in ((9, 2), (4, 1), (5, 0)):
        target = {
            "boxes": random_boxes(num_targets, generator),
            "scores": torch.rand(num_targets, generator=generator),
        }
        labels = torch.randint(0, num_classes + 1, (count,), generator=generator)
        if not num_targets:
            labels = torch.zeros_like(labels)
        matched = torch.randint(0, max(num_targets, 1), (count,), generator=generator)
        boxes = random_boxes(count, generator)
        regions.append(RegionsOfImage(boxes, labels, matched, target))
    return regions


def encode(box: list[float], region: list[float]) -> list[float]:
    """Ren et al., "Faster R-CNN", Eq. 2, with the weights 10, 10, 5, 5."""
    width, height = region[2] - region[0], region[3] - region[1]
    x, y = (
        (box[0] + box[2] - region[0] - region[2]) / 2,
        (box[1] + box[3] - region[1] - region[3]) / 2,
    )
    return [
        10 * x / width,
        10 * y / height,
        5 * math.log((box[2] - box[0]) / width),
        5 * math.log((box[3] - box[1]) / height),
    ]


def decode(code: list[float], region: list[float]) -> list[float]:
    """Back; a side grows by 1000 / 16 at most."""
    width, height = region[2] - region[0], region[3] - region[1]
    x = (region[0] + region[2]) / 2 + code[0] / 10 * width
    y = (region[1] + region[3]) / 2 + code[1] / 10 * height
    width *= min(math.exp(code[2] / 5), 1000 / 16)
    height *= min(math.exp(code[3] / 5), 1000 / 16)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def slow_losses(
    logits: Tensor,
    codes: Tensor,
    regions: list[RegionsOfImage],
    *,
    droploss: float | None,
    by_score: bool,
    normaliser: str,
) -> tuple[float, float]:
    """Region by region; also counts nothing that a rule leaves out."""
    total, entropy, distance, row = sum(len(one.labels_R) for one in regions), 0.0, 0.0, 0
    for image in regions:
        count = len(image.labels_R)
        share = 1 / total if normaliser == "batch" else 1 / count / len(regions)
        for index in range(count):
            label, region = int(image.labels_R[index]), image.boxes_R4[index].tolist()
            weight = share
            best = 1 + logits[row, 1:].tolist().index(float(logits[row, 1:].max()))
            predicted = torch.tensor([decode(codes[row, best].tolist(), region)])
            overlaps = box_iou(predicted, image.target["boxes"])[0].tolist()
            if droploss is not None and all(iou <= droploss for iou in overlaps):
                weight = 0.0
            if by_score and label:
                weight *= float(image.target["scores"][image.matched_R[index]])
            entropy -= weight * float(logits[row].log_softmax(0)[label])
            if label:
                box = image.target["boxes"][image.matched_R[index]].tolist()
                wanted = encode(box, region)
                pairs = zip(codes[row, label].tolist(), wanted, strict=True)
                distance += share * sum(abs(a - b) for a, b in pairs)
            row += 1
    return entropy, distance


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("normaliser", ["image", "batch"])
@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("droploss", [None, 0.01, 0.3])
def test_losses_are_those_of_a_loop_over_regions(
    droploss: float | None, by_score: bool, normaliser: str, num_classes: int
) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    regions = random_regions(generator, num_classes)
    logits = torch.randn(18, num_classes + 1, generator=generator)
    codes = torch.randn(18, num_classes + 1, 4, generator=generator) * 4
    rules: Any = {"droploss": droploss, "weight_by_score": by_score, "roi_normaliser": normaliser}
    found = heads(num_classes=num_classes, **rules).losses(logits, codes, regions)
    entropy, distance = slow_losses(
        logits, codes, regions, droploss=droploss, by_score=by_score, normaliser=normaliser
    )
    assert float(found["loss_classifier"]) == pytest.approx(entropy, rel=1e-5)
    assert float(found["loss_box_reg"]) == pytest.approx(distance, rel=1e-5)


def test_droploss_takes_away_some_but_not_all_and_only_from_the_class() -> None:
    """The cases above would not tell a rule that never applies."""
    generator = torch.Generator().manual_seed(1)
    regions = random_regions(generator, 1)
    logits, codes = torch.randn(18, 2, generator=generator), torch.zeros(18, 2, 4)
    plain = heads().losses(logits, codes, regions)
    dropped = heads(droploss=0.3).losses(logits, codes, regions)
    assert 0 < dropped["loss_classifier"] < plain["loss_classifier"]
    assert dropped["loss_box_reg"] == plain["loss_box_reg"]


def test_droploss_asks_where_the_predicted_box_is_not_the_region() -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 40, 40]])}
    region = torch.tensor([[100.0, 0, 140, 40]])
    image = RegionsOfImage(region, torch.tensor([0]), torch.tensor([0]), target)
    codes = torch.zeros(1, 2, 4)
    rules = heads(droploss=0.01)
    assert rules.losses(torch.zeros(1, 2), codes, [image])["loss_classifier"] == 0
    # 100 pixels to the left, onto the target.
    codes[0, 1, 0] = -25.0
    found = rules.losses(torch.zeros(1, 2), codes, [image])["loss_classifier"]
    assert float(found) == pytest.approx(math.log(2), rel=1e-6)


def test_scores_that_should_weigh_must_be_there() -> None:
    image = RegionsOfImage(
        torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), {"boxes": torch.zeros(0, 4)}
    )
    with pytest.raises(ValueError, match="weight_by_score needs scores in every target"):
        heads(weight_by_score=True).losses(torch.zeros(1, 2), torch.zeros(1, 2, 4), [image])


def test_images_with_few_regions_count_as_much_as_others() -> None:
    assert region_shares([2, 1, 0], "image").tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3])
    assert region_shares([2, 1, 0], "batch").tolist() == pytest.approx([1 / 3] * 3)
    assert region_shares([0], "batch").tolist() == []


def test_a_pyramids_regions_come_from_the_map_of_their_size() -> None:
    generator = torch.Generator().manual_seed(0)
    strides = {"0": 4, "1": 8, "2": 16, "3": 32}
    maps = {
        name: torch.randn(2, 3, 512 // stride, 512 // stride, generator=generator)
        for name, stride in strides.items()
    } | {"pool": torch.zeros(2, 3, 8, 8)}
    boxes = [random_boxes(20, generator, 200), random_boxes(12, generator, 60)]
    boxes[0][:4] = torch.tensor([[0.0, 0, side, side] for side in (8, 112, 300, 500)])
    pooled = AlignedPool(strides, 7)(maps, boxes, [(512, 512)] * 2)
    levels = LevelMapper(2, 5)(boxes).tolist()
    assert set(levels) == {0, 1, 2, 3}
    rows = [(image, box) for image in range(2) for box in boxes[image]]
    for cells, level, (image, box) in zip(pooled, levels, rows, strict=True):
        one_map = maps[str(level)][image : image + 1]
        scale = 1 / strides[str(level)]
        expected = roi_align(one_map, [box[None]], 7, scale, sampling_ratio=0, aligned=True)[0]
        torch.testing.assert_close(cells, expected)
