"""Pyramids on timm's networks: built, trained a step, given weights, written and read again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pipeline.config import TrainDetectorJob
from pipeline.config.detection import presets
from pipeline.detection.batch_norm import PooledBatchNorm2d, fused
from pipeline.detection.box_loader import SeenSize
from pipeline.detection.detector import Detector, build_detector, default_options, initialise
from pipeline.detection.exported_detector import load_detector, write_detector
from pipeline.detection.predictor import Predictor
from pipeline.detection.setup import build, options_of, read_start
from pipeline.detection.timm_pyramid import NormThenAct
from pipeline.errors import ConfigError, WeightsError
from pipeline.storage import Location
from tests.detection.toy import pictures

SMALL: dict[str, Any] = {
    "rpn_pre_nms_train": 50,
    "rpn_post_nms_train": 30,
    "rpn_post_nms_test": 20,
    "roi_batch": 8,
    "rpn_batch": 32,
    "pool_size": 3,
}
# Plain batch norms, batch norms with their activation, layer norms, and maps with channels last.
SWIN: Any = pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)
NAMES = ["resnet10t", "regnetx_002", "convnext_atto", SWIN]


def built(name: str, **changes: Any) -> Detector:
    torch.manual_seed(0)
    return build_detector(default_options("fpn", backbone=f"timm/{name}", **SMALL, **changes))


def timm_state(name: str) -> dict[str, Tensor]:
    """Weights as a file of that network has them, all unlike a fresh network's."""
    torch.manual_seed(7)
    state: dict[str, Tensor] = timm.create_model(name).state_dict()
    return {
        key: torch.rand_like(one) * 0.1 + 0.05 if one.is_floating_point() else one
        for key, one in state.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_finite_losses_and_its_gradient_reaches_every_weight(name: str) -> None:
    detector = built(name, norm="pooled")
    data = pictures(2, 1, side=64)
    losses = detector([image for image, _ in data], [target for _, target in data])
    total = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(total)
    total.backward()  # type: ignore[no-untyped-call]
    # Several workers would wait for ever for a weight that gets none.
    assert [key for key, one in detector.named_parameters() if one.grad is None] == []
    # The first layer of the network, too.
    first = next(one for one in detector.backbone.body.parameters() if one.ndim == 4)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_its_maps_are_timms(name: str) -> None:
    sizes = {"strict_img_size": False} if name.startswith("swin") else {}
    whole = timm.create_model(name, **sizes).eval()
    state = timm_state(name)
    whole.load_state_dict(state)
    detector = built(name, norm="pooled")
    initialise(detector, state, "a file")
    body = detector.backbone.body.eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        found = body(image)
        *_, last_BCHW = whole.forward_intermediates(
            image, intermediates_only=True, output_fmt="NCHW"
        )
    assert list(found) == ["0", "1", "2", "3"]
    grids = [tuple(one.shape[2:]) for one in found.values()]
    assert grids == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert torch.allclose(found["3"], last_BCHW, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["regnetx_002", SWIN])
def test_a_written_detector_is_read_again_and_predicts_the_same(tmp_path: Path, name: str) -> None:
    detector = built(name, norm="pooled", normalize="half", score_threshold=0.0)
    size = SeenSize(64, 96)
    place = Location.parse(str(tmp_path))
    write_detector(detector, place, size=size, classes=["object"], made_by={})
    photo = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    again = load_detector(str(tmp_path))
    assert again.detector.options == detector.options
    found = again.predict(photo)
    expected = Predictor(detector, again.size).predict(photo)
    assert len(found) > 0
    assert np.array_equal(found.boxes_D4, expected.boxes_D4)
    assert np.array_equal(found.scores_D, expected.scores_D)


def kinds(detector: Detector) -> set[type[nn.Module]]:
    return {
        type(one)
        for one in detector.backbone.body.modules()
        if isinstance(one, nn.BatchNorm2d | FrozenBatchNorm2d | nn.SyncBatchNorm)
    }


@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002"])
@pytest.mark.parametrize(("norm", "kind"), [("pooled", PooledBatchNorm2d), ("frozen", None)])
def test_batch_norms_become_the_detectors(name: str, norm: Any, kind: Any) -> None:
    detector = built(name, norm=norm)
    assert kinds(detector) == {kind or FrozenBatchNorm2d}
    # All of timm's compute as before: at the start mean 0 and variance 1.
    image = torch.rand(1, 3, 64, 64)
    plain = built(name, norm="batch").backbone.body.eval()
    with torch.no_grad():
        expected, found = plain(image)["3"], detector.backbone.body.eval()(image)["3"]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_on_gpus_a_pooled_norm_keeps_its_activation() -> None:
    detector = fused(built("regnetx_002", norm="pooled"))
    both = [one for one in detector.modules() if isinstance(one, NormThenAct)]
    assert both
    assert all(isinstance(one.norm, nn.SyncBatchNorm) for one in both)
    assert any(isinstance(one.act, nn.ReLU) for one in both)


def test_weights_of_another_network_are_refused_and_nothing_is_changed() -> None:
    detector = built("convnext_atto")
    before = {key: one.clone() for key, one in detector.state_dict().items()}
    with pytest.raises(WeightsError, match=r"a file does not fit the network"):
        initialise(detector, timm_state("resnet10t"), "a file")
    state = timm_state("convnext_atto")
    state["stages.0.blocks.0.norm.weight"][0] = float("nan")
    with pytest.raises(WeightsError, match="not finite"):
        initialise(detector, state, "a file")
    del state["stages.0.blocks.0.norm.weight"]
    with pytest.raises(WeightsError, match=r"1 missing \(stages_0.blocks.0.norm.weight\)"):
        initialise(detector, state, "a file")
    assert all(torch.equal(one, before[key]) for key, one in detector.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "c4"}, "backbone timm/resnet10t needs kind fpn, got c4: give --detector.kind"),
        ({"freeze_at": 2}, "freeze_at must be 0 with backbone timm/resnet10t, got 2"),
        ({"width": 32}, "width and stem_width have no effect on backbone timm/resnet10t"),
        ({"size_divisible": 8}, "size_divisible must be a multiple of 32"),
        ({"normalize": "own"}, "normalize must be one of imagenet, half, got 'own'"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(changes: dict[str, Any], message: str) -> None:
    options = {"kind": "fpn", "backbone": "timm/resnet10t", **changes}
    with pytest.raises(ConfigError, match=message):
        default_options(options.pop("kind"), **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_atoo", r"a name of timm's, got timm/convnext_atoo; did you mean convnext_atto"),
        ("convnext_atto.nope", r"a name of timm's, got timm/convnext_atto\.nope"),
        ("vit_tiny_patch16_224", r"no maps of all strides \(4, 8, 16, 32\); take another"),
        ("maxvit_tiny_tf_224", r"no maps for images of any size .*; take another backbone"),
    ],
)
def test_networks_that_carry_no_pyramid_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        built(name)
    assert "\n" not in str(caught.value)


def test_a_net_without_batch_norm_has_none_to_freeze() -> None:
    with pytest.raises(ConfigError, match=r"norm frozen needs .* timm/convnext_atto is without"):
        built("convnext_atto", norm="frozen")


def job(**detector: Any) -> TrainDetectorJob:
    settings = {"kind": "fpn", "backbone": "timm/convnext_atto", "init": "none", **detector}
    return TrainDetectorJob.model_validate(
        {"labels": "t", **presets()["sane"], "detector": settings}
    )


def test_settings_give_a_detector_that_starts_from_a_file_of_timms(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    state = timm_state("convnext_atto")
    torch.save(state, file)
    settings = job(init=str(file))
    start = read_start(settings.detector.init, settings.detector.backbone)
    detector = build(settings, start, num_classes=1)
    assert (detector.options.freeze_at, detector.options.norm) == (0, "pooled")
    stem = detector.backbone.body.network.state_dict()["stem_0.weight"]
    assert torch.equal(stem, state["stem.0.weight"])


def test_pixels_are_normalised_as_for_the_published_weights() -> None:
    def normalize(name: str) -> str:
        settings = job(backbone=f"timm/{name}")
        return options_of(settings, from_scratch=True, num_classes=1).normalize

    assert normalize("convnext_atto") == "imagenet"
    assert normalize("tf_efficientnetv2_b0.in1k") == "imagenet"
    assert normalize("tf_efficientnetv2_s.in1k") == "half"


def test_published_weights_that_cannot_be_fetched_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="weights of convnext_atto cannot be fetched") as caught:
        read_start("timm", "timm/convnext_atto")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean convnext_atto"):
        read_start("timm", "timm/convnext_atoo")


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ({"kind": "c4"}, "timm/convnext_atto needs --detector.kind fpn, got c4"),
        ({"init": "dino"}, "--detector.init dino is a ResNet-50: .* give timm, none, or a file"),
        ({"init": "timm", "backbone": "resnet50"}, "needs --detector.backbone timm/NAME, got"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    detector: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        job(**detector)
