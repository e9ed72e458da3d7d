"""What anchors are trained on, and what that costs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pipeline.detection.detector import build_detector, default_options
from pipeline.detection.proposals import draw_balanced, sampling_generator


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    labels=st.lists(st.sampled_from([-1, 0, 1, 2]), max_size=40),
    num=st.integers(1, 50),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_what_is_drawn_is_as_many_as_there_are_and_never_the_ignored(
    labels: list[int], num: int, fraction: float
) -> None:
    drawn = draw_balanced(torch.tensor(labels), num, fraction, torch.Generator().manual_seed(0))
    taken = [label for label, is_in in zip(labels, drawn.tolist(), strict=True) if is_in]
    num_positive = min(sum(label > 0 for label in labels), int(num * fraction))
    assert sum(label > 0 for label in taken) == num_positive
    assert taken.count(0) == min(labels.count(0), num - num_positive)
    assert -1 not in taken


def test_every_candidate_is_as_likely_as_any_other() -> None:
    labels = torch.tensor([1] * 5 + [0] * 20 + [-1] * 5)
    generator = torch.Generator().manual_seed(0)
    times = torch.stack([draw_balanced(labels, 8, 0.25, generator) for _ in range(2000)]).sum(0)
    # 2 of 5 positives, 6 of 20 negatives.
    assert (times[:5] / 2000 - 2 / 5).abs().max() < 0.05
    assert (times[5:25] / 2000 - 6 / 20).abs().max() < 0.05


def test_a_key_decides_what_is_drawn_and_anchors_and_regions_differ() -> None:
    labels = torch.zeros(100)

    def drawn(key: int | None, purpose: str) -> list[bool]:
        target = {} if key is None else {"key": torch.tensor(key)}
        return draw_balanced(labels, 10, 0.5, sampling_generator(target, purpose)).tolist()

    assert drawn(3, "anchors") == drawn(3, "anchors")
    assert drawn(3, "anchors") != drawn(4, "anchors")
    assert drawn(3, "anchors") != drawn(3, "regions")
    torch.manual_seed(0)
    first, second = drawn(None, "anchors"), drawn(None, "anchors")
    assert first != second
    torch.manual_seed(0)
    assert drawn(None, "anchors") == first


def test_the_loss_is_a_sum_over_what_was_drawn_over_a_constant() -> None:
    """Detectron2: binary cross-entropy and L1, both over 256 anchors an image, present or not."""
    rpn = build_detector(default_options("nano", rpn_batch=6)).rpn
    generator = torch.Generator().manual_seed(0)
    labels = [torch.tensor([1.0, 0.0, -1.0, 1.0]), torch.tensor([0.0, 0.0, -1.0, -1.0])]
    logits = torch.randn(8, 1, generator=generator)
    codes, wanted = torch.randn(2, 8, 4, generator=generator)
    entropy, distance = 0.0, 0.0
    for anchor, label in enumerate(torch.cat(labels).tolist()):
        if label >= 0:
            goal = torch.tensor([label])
            entropy += float(functional.binary_cross_entropy_with_logits(logits[anchor], goal))
        if label == 1:
            distance += float((codes[anchor] - wanted[anchor]).abs().sum())
    found: tuple[Tensor, Tensor] = rpn.compute_loss(logits, codes, labels, [wanted[:4], wanted[4:]])
    assert float(found[0]) == pytest.approx(entropy / 12, rel=1e-6)
    assert float(found[1]) == pytest.approx(distance / 12, rel=1e-6)


def test_only_drawn_anchors_keep_their_label() -> None:
    rpn: Any = build_detector(default_options("nano", rpn_batch=8)).rpn
    grid = torch.arange(0, 128, 8).float()
    corners = torch.cartesian_prod(grid, grid)
    anchors = torch.cat([corners, corners + 32], dim=1)
    target = {"boxes": torch.tensor([[40.0, 40, 72, 72]]), "key": torch.tensor(5)}
    (labels,), _ = rpn.assign_targets_to_anchors([anchors], [target])
    # One anchor is the box; its neighbours overlap it by .6, which is neither.
    assert (labels == 1).sum() == 1
    assert (labels == 0).sum() == 7
    assert labels[(anchors == target["boxes"]).all(dim=1)].tolist() == [1]
