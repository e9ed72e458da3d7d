"""The detector as a whole: its size, what it may be, what is frozen, what parts of a batch cost."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d

from pipeline.detection.c4 import ResNetPlan, Trunk
from pipeline.detection.detector import (
    Detector,
    DetectorOptions,
    build_detector,
    default_options,
    initialise,
)
from pipeline.errors import ConfigError, TrainingDiverged, WeightsError
from pipeline.training.loop import (
    Hooks,
    LoopSettings,
    LoopState,
    Losses,
    Part,
    StepKey,
    train,
)
from pipeline.training.optim import parameter_groups, sgd
from pipeline.training.workers import Workers, current_workers
from tests.detection.toy import Picture, pictures
from tests.training.two_workers import TwoWorkers

NARROW_FPN: dict[str, Any] = {
    "backbone": "resnet10",
    "width": 4,
    "stem_width": 4,
    "freeze_at": 0,
    "rpn_pre_nms_train": 50,
    "rpn_post_nms_train": 30,
    "rpn_post_nms_test": 20,
    "roi_batch": 8,
    "rpn_batch": 32,
}
NARROW: list[Any] = [("nano", {}), ("fpn", NARROW_FPN)]


def built(kind: Any = "nano", **changes: Any) -> Detector:
    torch.manual_seed(0)
    return build_detector(default_options(kind, **changes))


def split(data: Sequence[Picture]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return [image for image, _ in data], [target for _, target in data]


def count(module: nn.Module, *, trainable: bool = False) -> int:
    return sum(one.numel() for one in module.parameters() if one.requires_grad or not trainable)


@pytest.mark.parametrize(
    ("kind", "total", "trainable"),
    [
        # Detectron2's 33,036,561 and 32,814,161, and 8,196 box codes of the background.
        ("c4", 33_044_757, 32_822_357),
        ("nano", 352_805, 352_805),
    ],
)
def test_the_number_of_weights(kind: Any, total: int, trainable: int) -> None:
    with torch.device("meta"):
        detector = build_detector(default_options(kind))
    assert count(detector) == total
    assert count(detector, trainable=True) == trainable


def test_the_number_of_weights_of_each_part_is_detectron2s() -> None:
    with torch.device("meta"):
        detector = build_detector(default_options("c4"))
    trunk, heads = detector.backbone, detector.roi_heads
    counts = [count(trunk.get_submodule(f"layer{stage}")) for stage in (2, 3)]
    # Frozen gains are no weights: res2 212,992 and the stem 9,408.
    assert [count(trunk.conv1), count(trunk.layer1), *counts] == [9408, 212992, 1219584, 7098368]
    assert count(detector.rpn) == 9_515_083
    assert count(heads.box_head) == 14_968_832
    norms = [type(one) for one in detector.modules()]
    assert (norms.count(FrozenBatchNorm2d), norms.count(nn.BatchNorm2d)) == (11, 43)


def test_the_pyramid_is_torchvisions_but_for_its_classes_and_norms() -> None:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    with torch.device("meta"):
        ours = build_detector(default_options("fpn", freeze_at=0))
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    shapes = {name: one.shape for name, one in ours.named_parameters()}
    expected = {name: one.shape for name, one in theirs.named_parameters()}
    assert shapes == expected


@pytest.mark.parametrize(
    ("backbone", "channels"), [("resnet18", (256, 512)), ("resnet34", (256, 512))]
)
def test_smaller_resnets_have_their_own_last_stage_as_head(
    backbone: Any, channels: tuple[int, int]
) -> None:
    with torch.device("meta"):
        detector = build_detector(default_options("c4", backbone=backbone))
    assert detector.backbone.out_channels == channels[0]
    assert detector.roi_heads.box_head.norm.num_features == channels[1]


def test_a_trunk_computes_what_torchvisions_resnet_does() -> None:
    torch.manual_seed(0)
    theirs = resnet50(weights=None).eval()
    ours = Trunk(ResNetPlan()).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    image = torch.rand(1, 3, 70, 90)
    with torch.no_grad():
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = theirs.layer3(theirs.layer2(theirs.layer1(expected)))
        assert torch.equal(ours(image)["0"], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a whole number from 1 to 1000000, got 0"),
        ({"rpn_batch": 2.5}, "rpn_batch must be a whole number"),
        ({"nms": 1.2}, "nms must be a number from 0 to 1, got 1.2"),
        ({"score_threshold": float("nan")}, "score_threshold must be .*, got nan"),
        ({"droploss": -0.1}, "droploss must be"),
        ({"freeze_at": 5}, "freeze_at must be a whole number from 0 to 4, got 5"),
        ({"norm": "sync"}, "norm must be one of batch, pooled, frozen, got 'sync'"),
        ({"backbone": "resnet101"}, "backbone must be one of resnet10"),
        ({"anchor_sizes": ()}, "anchor_sizes must be one or more numbers above 0"),
        ({"anchor_ratios": (1.0, -1.0)}, "anchor_ratios must be one or more numbers above 0"),
        ({"rpn_iou_low": 0.8}, "rpn_iou_low must be at most rpn_iou_high, got 0.8 and 0.7"),
        ({"kind": "fpn"}, "extra_norm needs layer4 as the head"),
        ({"kind": "fpn", "extra_norm": False, "anchor_sizes": (8, 16)}, "must be 5 with kind fpn"),
        ({"kind": "yolo"}, "kind must be one of c4, fpn, nano, got 'yolo'"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DetectorOptions(**changes)


def test_unknown_options_and_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="a detector has no option nmss"):
        default_options("c4", nmss=0.3)
    with pytest.raises(ConfigError, match="kind must be one of c4, fpn, nano"):
        default_options("dert")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["c4", "fpn", "nano"])
def test_options_survive_json(kind: Any) -> None:
    options = default_options(kind, droploss=0.01)
    assert DetectorOptions(**json.loads(json.dumps(asdict(options)))) == options


def step(detector: Detector, data: Sequence[Picture]) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = detector(*split(data))
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    return losses


def moved_by_training(detector: Detector) -> set[str]:
    """Which modules' weights or buffers a step with decay moves."""
    before = {name: one.clone() for name, one in detector.state_dict().items()}
    optimizer = sgd(parameter_groups(detector, weight_decay=0.1), lr=0.1, momentum=0.9)
    step(detector.train(), pictures(2, 1, side=64))
    optimizer.step()
    after = detector.state_dict()
    return {name for name, one in before.items() if not torch.equal(one, after[name])}


def test_what_is_frozen_never_moves_and_all_else_does() -> None:
    detector = built(freeze_at=2)
    for name in ("bn1", "layer1.0.bn1"):
        frozen: Any = detector.backbone.get_submodule(name)
        assert isinstance(frozen, FrozenBatchNorm2d)
        frozen.running_var.uniform_(0.5, 2.0)
    moved = moved_by_training(detector)
    still = {
        name
        for name in detector.state_dict()
        if name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))
    }
    assert len(still) > 10
    assert moved == set(detector.state_dict()) - still


def test_with_frozen_norms_no_gain_and_no_statistic_moves() -> None:
    detector = built(norm="frozen")
    assert not [one for one in detector.modules() if isinstance(one, nn.BatchNorm2d)]
    moved = moved_by_training(detector)
    assert moved == {name for name, one in detector.named_parameters()}


def narrow_resnet(seed: int) -> dict[str, Tensor]:
    """Weights of the network under ``nano``, in torchvision's names, with a classifier."""
    torch.manual_seed(seed)
    plan = default_options("nano")
    trunk = Trunk(
        ResNetPlan(plan.backbone, "batch", plan.width, plan.stem_width), num_stages=4
    ).state_dict()
    noise = {name: torch.rand_like(one.float()).to(one.dtype) for name, one in trunk.items()}
    return noise | {"fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}


@pytest.mark.parametrize(
    ("kind", "prefixes"),
    [
        ("nano", ("backbone.", "roi_heads.box_head.")),
        ("fpn", ("backbone.body.", "backbone.body.")),
    ],
)
def test_a_resnets_weights_find_their_places(kind: Any, prefixes: tuple[str, str]) -> None:
    narrow = {"backbone": "resnet10", "width": 16, "stem_width": 16, "freeze_at": 2}
    detector = built(kind, **narrow)
    before = {name: one.clone() for name, one in detector.state_dict().items()}
    weights = narrow_resnet(1)
    initialise(detector, weights, "resnet.pth")
    after = detector.state_dict()
    given = set()
    for name, tensor in weights.items():
        place = prefixes[name.startswith("layer4")] + name
        if place in after and not name.startswith("fc."):
            given.add(place)
            assert torch.equal(after[place], tensor), place
    frozen_counts = {name for name in weights if name.endswith("num_batches_tracked")}
    assert len(given) >= len(weights) - 2 - len(frozen_counts)
    assert all(torch.equal(one, before[name]) for name, one in after.items() if name not in given)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("layer4.0.conv1.weight"), r"1 missing \(layer4.0.conv1.weight\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (
            lambda state: state.update({"conv1.weight": torch.zeros(64, 3, 7, 7)}),
            r"conv1.weight expected \(16, 3, 7, 7\) found \(64, 3, 7, 7\)",
        ),
        (lambda state: state["bn1.weight"].fill_(float("nan")), "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_changed(spoil: Any, message: str) -> None:
    detector, weights = built(), narrow_resnet(1)
    before = {name: one.clone() for name, one in detector.state_dict().items()}
    spoil(weights)
    with pytest.raises(WeightsError, match=message):
        initialise(detector, weights, "resnet.pth")
    assert all(torch.equal(one, before[name]) for name, one in detector.state_dict().items())


def test_detections_are_in_the_pixels_of_each_image_and_ordered() -> None:
    detector = built(score_threshold=0.0, max_detections=7).eval()
    images = [torch.rand(3, 70, 90), torch.rand(3, 101, 64)]
    with torch.no_grad():
        found = detector(images)
    for one, (height, width) in zip(found, [(70, 90), (101, 64)], strict=True):
        assert len(one["boxes"]) == len(one["scores"]) == len(one["labels"]) == 7
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert one["scores"].tolist() == sorted(one["scores"].tolist(), reverse=True)


@pytest.mark.parametrize(("kind", "changes"), NARROW)
@pytest.mark.parametrize("rules", [{}, {"droploss": 0.01, "weight_by_score": True}])
def test_images_without_boxes_are_all_background_and_leave_no_weight_without_gradient(
    kind: Any, changes: dict[str, Any], rules: dict[str, Any]
) -> None:
    detector = built(kind, **changes, **rules)
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }
    losses = step(detector, [(torch.rand(3, 80, 96), nothing), (torch.rand(3, 64, 64), nothing)])
    assert losses["loss_rpn_box_reg"] == losses["loss_box_reg"] == 0
    assert losses["loss_objectness"] > 0
    # DropLoss: without a pseudo-box nothing says where there is no object.
    assert (losses["loss_classifier"] > 0) == (not rules)
    # Several workers would wait for ever for a weight that gets none.
    assert [name for name, one in detector.named_parameters() if one.grad is None] == []


@pytest.mark.parametrize(("kind", "changes"), NARROW)
def test_halves_of_a_batch_add_up_to_the_whole(kind: Any, changes: dict[str, Any]) -> None:
    """With norms that leave images apart, and a key an image that decides what is drawn of it."""
    detector = built(kind, norm="frozen", **changes)
    data = pictures(4, 1, side=128)
    whole = step(detector, data)
    gradients = [one.grad.clone() for one in detector.parameters() if one.grad is not None]
    detector.zero_grad()
    # Of other global random numbers, and not of equal size.
    torch.manual_seed(7)
    parts = [detector(*split(data[:1])), detector(*split(data[1:]))]
    added = {name: parts[0][name] * 0.25 + parts[1][name] * 0.75 for name in whole}
    torch.stack(list(added.values())).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(added, whole, rtol=1e-4, atol=1e-6)
    again = [one.grad for one in detector.parameters() if one.grad is not None]
    # Rounding moves a gradient of L1 by more than its own size.
    assert sum((a - b).norm() for a, b in zip(again, gradients, strict=True)) < 0.01 * sum(
        one.norm() for one in gradients
    )


def test_without_keys_what_is_drawn_changes_the_losses() -> None:
    """Else the test above would hold of any drawing."""
    detector = built(norm="frozen", roi_batch=8)
    images, targets = split(pictures(2, 1, side=128))
    keyless = [{name: one for name, one in target.items() if name != "key"} for target in targets]
    seen = {float(detector(images, keyless)["loss_objectness"].detach()) for _ in range(4)}
    assert len(seen) == 4
    assert (
        len({float(detector(images, targets)["loss_objectness"].detach()) for _ in range(4)}) == 1
    )


def loss_of_worker(workers: Workers) -> tuple[dict[str, float], float]:
    """Losses of this worker's two images of four, and the norm of all workers' gradient."""
    detector = built(norm="pooled")
    data = pictures(4, 1, side=128)
    mine = data if workers.size == 1 else data[2 * workers.rank : 2 * workers.rank + 2]
    losses = step(detector, mine)
    gradients = torch.cat(
        [one.grad.flatten() for one in detector.parameters() if one.grad is not None]
    )
    told = {name: float(one.detach()) for name, one in losses.items()}
    return told, float(workers.total(gradients).norm()) / workers.size


def test_two_workers_with_pooled_norms_cost_and_learn_as_one(pair: TwoWorkers) -> None:
    whole, norm = loss_of_worker(current_workers())
    halves = pair.run(loss_of_worker)
    for name, expected in whole.items():
        found = (halves[0][0][name] + halves[1][0][name]) / 2
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert halves[0][1] == pytest.approx(norm, rel=0.02)


def test_under_bfloat16_boxes_scores_and_losses_are_float32() -> None:
    detector, data = built(), pictures(2, 1, side=96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector(*split(data))
        detector.eval()
        with torch.no_grad():
            found = detector(split(data)[0])
    expected = {name: torch.float32 for name in losses}
    assert {name: one.dtype for name, one in losses.items()} == expected
    assert all(torch.isfinite(one) for one in losses.values())
    assert all(one["boxes"].dtype == one["scores"].dtype == torch.float32 for one in found)


class OneBatch:
    """A task of one step."""

    steps_per_epoch = 1

    def __init__(self, detector: Detector) -> None:
        self.objective: nn.Module = detector

    def begin_epoch(self, epoch: int) -> Iterable[Any]:
        return [split(pictures(2, 1, side=64))]

    def parts(self, batch: Any, key: StepKey) -> Sequence[Part]:
        return [Part(batch, 2, 2)]

    def losses(self, network: nn.Module, part: Part) -> Losses:
        return Losses(network(*part.inputs))

    def constants(self, epoch: int) -> Mapping[str, float]:
        return {}


@pytest.mark.parametrize(
    "part", ["rpn.head.bbox_pred", "backbone.layer2", "roi_heads.box_predictor"]
)
def test_the_loop_stops_at_losses_that_are_not_finite(part: str) -> None:
    """The detector passes them on, whichever part they come from, and does not crash before."""
    detector = built()
    for weight in detector.get_submodule(part).parameters():
        torch.nn.init.constant_(weight, float("nan"))
    optimizer = sgd(parameter_groups(detector, weight_decay=0), lr=0.1, momentum=0)
    state = LoopState(detector, optimizer, None, torch.amp.GradScaler(enabled=False))
    settings = LoopSettings(num_epochs=1, learning_rate=lambda step: 0.1, seed=0)
    with pytest.raises(TrainingDiverged, match="loss or gradient is not finite at epoch 1, step 0"):
        train(OneBatch(detector), state, settings, current_workers(), Hooks(lambda *_: None))
