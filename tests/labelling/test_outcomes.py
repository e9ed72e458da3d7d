"""What is found in patches becomes rows in original pixels: one box, many, or a reason."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import LocalizationConfig
from pipeline.labelling.outcomes import NOTHING_FOUND, outcomes_of
from pipeline.localization.head import Head
from pipeline.localization.localize import localize

STRIDE = 16
SEEN, ORIGINAL = (96, 64), (192, 128)
HEAD = Head(np.array([1.0, 0.0]), 0.0, 0.2, 0.3)


def features(*objects: tuple[int, int, int, int], strength: float = 1.0) -> Tensor:
    """``(1, 4, 6, 2)``: the head's direction in these boxes of patches, the other elsewhere."""
    tokens = torch.zeros(1, 4, 6, 2)
    tokens[..., 1] = 1
    for x0, y0, x1, y1 in objects:
        tokens[:, y0:y1, x0:x1] = torch.tensor([strength, (1 - strength**2) ** 0.5])
    return tokens


def outcome(tokens: Tensor, **knobs: Any) -> dict[str, Any]:
    settings = LocalizationConfig(**{"rule": "head", **knobs})
    head = HEAD if settings.rule == "head" else None
    found = localize(tokens, head=head, **settings.arguments())
    pixels = np.zeros((SEEN[1], SEEN[0], 3), np.uint8)
    (one,) = outcomes_of(found, STRIDE, [pixels], np.array([ORIGINAL]), settings)
    return one


TWO = features((0, 0, 2, 2), (4, 2, 6, 4))


def test_one_box_is_in_original_pixels_with_what_its_score_rests_on() -> None:
    one = outcome(features((1, 1, 3, 3)))
    assert np.asarray(one["boxes"]).tolist() == [[32, 32, 96, 96]]
    assert one["status"] == "ok"
    assert one["scores"] == pytest.approx([(one["contrast"][0] + one["agreement"][0]) / 2])
    assert one["area_fraction"] == pytest.approx(64 * 64 / (192 * 128))
    assert not one["touches_border"]
    # A head compares no patches: its seed is its map's highest, of no degree.
    assert one["seed_degree"] is None
    assert 32 < one["seed_xy"][0] < 96


def test_many_boxes_come_best_first_and_each_has_its_contrast() -> None:
    tokens = TWO.clone()
    tokens[:, :2, :2] = torch.tensor([0.6, 0.8])
    one = outcome(tokens, max_objects=10)
    assert np.asarray(one["boxes"]).tolist() == [[128, 64, 192, 128], [0, 0, 64, 64]]
    assert one["scores"][0] > one["scores"][1]
    assert len(one["labels"]) == len(one["contrast"]) == 2
    assert "agreement" not in one
    assert "seed_xy" not in one
    assert one["touches_border"]


@pytest.mark.parametrize("rule", ["ncut", "solost", "lost"])
def test_other_rules_find_one_box_whatever_is_asked(rule: str) -> None:
    one = outcome(features((0, 0, 2, 2)), rule=rule, max_objects=10)
    assert len(one["boxes"]) == 1
    assert one["seed_degree"] is not None


def test_boxes_below_the_least_score_are_left_out() -> None:
    tokens = TWO.clone()
    tokens[:, :2, :2] = torch.tensor([0.6, 0.8])
    scores = outcome(tokens, max_objects=10)["scores"]
    one = outcome(tokens, max_objects=10, min_score=(scores[0] + scores[1]) / 2)
    assert one["scores"] == scores[:1]


def test_an_image_all_of_whose_boxes_are_left_out_has_no_object_and_says_why() -> None:
    one = outcome(TWO, min_score=100)
    assert (one["status"], one["error"]) == ("no_object", "no box scores 100 or more")
    assert (one["boxes"], one["scores"]) == ([], [])


def test_a_single_patch_is_no_object_among_many_and_the_row_says_so() -> None:
    one = outcome(features((1, 1, 2, 2)), max_objects=5)
    assert (one["status"], one["error"]) == ("no_object", "no object has 2 patches or more")
    assert outcome(features((1, 1, 2, 2)))["status"] == "ok"


def test_nothing_above_the_threshold_is_no_object() -> None:
    one = outcome(features(), max_objects=3)
    assert (one["status"], one["error"]) == ("no_object", NOTHING_FOUND["head"])
    one = outcome(torch.ones(1, 4, 6, 2), rule="ncut")
    assert (one["status"], one["error"]) == ("no_object", NOTHING_FOUND["ncut"])


@pytest.mark.parametrize("refine", [False, True])
def test_masks_are_one_per_box(refine: bool) -> None:
    one = outcome(TWO, max_objects=10, masks=True, refine_masks=refine)
    assert len(one["masks"]) == len(one["boxes"]) == 2
    assert one["masks"][0]["size"] == ([64, 96] if refine else [4, 6])
    assert one["masks"][0]["cell"] == ([2, 2] if refine else [32, 32])
