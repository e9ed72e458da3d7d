"""The weights that come with the package: small, loadable by name without a network, and useful."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.evaluation.corloc import best_ious, central_boxes, corloc
from pipeline.localization.localize import localize
from pipeline.models import published_weights
from pipeline.models.backbones import build_backbone, build_vit, load_weights
from pipeline.models.exported_backbone import CONFIG, WEIGHTS, name_beside
from pipeline.models.features import NORMALIZATIONS, normalize_and_pad
from pipeline.scenes.scenes import make_scene

FOLDER = Path(published_weights.__file__).parent / "weights" / "vit_nano_patch8"
NAME = "vit_nano_patch8.dino"
SIDE = 224
"""Of the scenes, pixels."""


def corloc_on_scenes(name: str, *, trained: bool, feature: str, block: int, count: int) -> float:
    """CorLoc of SoLOST on held-out scenes: the training scenes have other seeds."""
    torch.manual_seed(0)
    weights = load_weights(name, None) if trained else None
    backbone = build_backbone(name, weights, feature=feature, block=block)  # type: ignore[arg-type]
    mean, std = NORMALIZATIONS["imagenet"]
    boxes, truths = [], []
    for seed in range(count):
        scene = make_scene(9_000_000 + seed, width=SIDE, height=SIDE * 3 // 4)
        batch = normalize_and_pad([scene.pixels_HW3], multiple=8, mean=mean, std=std)
        with torch.inference_mode():
            found = localize(backbone(batch).tokens_BHWD)
        boxes.append(np.minimum(found.boxes_B4[0].numpy() * 8, [SIDE, SIDE * 3 // 4] * 2))
        truths.append(scene.boxes_N4)
    return corloc(best_ious(np.array(boxes), truths))


def test_they_are_small_and_whole() -> None:
    assert (FOLDER / WEIGHTS).stat().st_size <= 8_000_000
    assert name_beside(FOLDER / WEIGHTS) == NAME.partition(".")[0]


def test_the_card_and_the_config_say_how_they_were_made() -> None:
    made_by = json.loads((FOLDER / CONFIG).read_text())["patchseed"]["made_by"]
    assert made_by["kind"] == "dino"
    assert made_by["num_images"] > 0
    assert "/" not in "".join(made_by["config"]["images"])
    card = (FOLDER / "README.md").read_text()
    for word in ("jobs/pretrain_dino.py", "CorLoc", "non-commercial", "k-NN"):
        assert word in card


def test_their_name_alone_loads_them_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = load_weights(NAME, None)
    vit = build_vit(NAME, weights=weights)
    assert torch.isfinite(vit(torch.randn(1, 3, 64, 64))).all()


def test_they_find_objects_that_a_random_network_and_the_middle_do_not() -> None:
    found = corloc_on_scenes(NAME, trained=True, feature="value", block=3, count=40)
    noise = corloc_on_scenes("vit_nano_patch8", trained=False, feature="value", block=3, count=40)
    sizes_N2 = np.array([[SIDE, SIDE * 3 // 4]] * 40, float)
    truths = [
        make_scene(9_000_000 + seed, width=SIDE, height=SIDE * 3 // 4).boxes_N4
        for seed in range(40)
    ]
    middle = corloc(best_ious(central_boxes(sizes_N2, 0.7), truths))
    assert found >= noise + 0.1
    assert found >= middle + 0.2
