"""Boxes, seeds, degrees and masks equal those of the published LOST and SoLOST code.

The cases are described in golden/lost.md beside the data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.localization.localize import Localization, localize
from tests.conftest import ReadGolden


@dataclass(frozen=True)
class Golden:
    data: dict[str, Any]

    def features(self, case: int) -> Tensor:
        rows, columns = self.data["dims"][case]
        return torch.from_numpy(self.data[f"feats_{case:03d}"]).reshape(1, rows, columns, -1)

    def cases(self, allowed: NDArray[np.bool_]) -> Iterator[int]:
        yield from np.flatnonzero(allowed).tolist()


@pytest.fixture(scope="module")
def golden(read_golden: ReadGolden) -> Golden:
    return Golden(read_golden("lost.npz"))


def grid_box(found: Localization, image: int = 0) -> list[int]:
    """[r0, c0, r1, c1], as the golden data has it."""
    x0, y0, x1, y1 = found.boxes_B4[image].tolist()
    return [y0, x0, y1, x1]


def test_lost_equals_the_published_boxes_for_every_k(golden: Golden) -> None:
    compared = 0
    for column, k in enumerate(golden.data["k_list"]):
        for case in golden.cases(golden.data["lost_ok_stable"][:, column] == 1):
            found = localize(
                golden.features(case), rule="lost", similarity="dot", num_candidates=int(k)
            )
            assert grid_box(found) == golden.data["lost_gridbox_stable"][case, column].tolist(), (
                f"case {case} {golden.data['family'][case]} k={k}"
            )
            compared += 1
    assert compared > 800


def test_solost_equals_the_published_boxes_for_every_m(golden: Golden) -> None:
    compared = 0
    no_exact_zero = golden.data["n_exact_zero_A"] == 0
    for column, m in enumerate(golden.data["m_list"]):
        allowed = no_exact_zero & (golden.data["solost_ok_stable"][:, column] == 1)
        for case in golden.cases(allowed):
            found = localize(
                golden.features(case), rule="solost", similarity="cosine", keep_fraction=float(m)
            )
            assert grid_box(found) == golden.data["solost_gridbox_stable"][case, column].tolist(), (
                f"case {case} {golden.data['family'][case]} m={m}"
            )
            compared += 1
    assert compared > 400


@pytest.mark.parametrize(("similarity", "key"), [("cosine", "cos"), ("pearson", "pcc")])
def test_lost_under_other_similarities_equals_the_published_boxes(
    golden: Golden, similarity: Any, key: str
) -> None:
    allowed = (golden.data[f"lost_{key}_ok"] == 1) & (golden.data["n_exact_zero_A"] == 0)
    cases = list(golden.cases(allowed))
    assert len(cases) > 50
    for case in cases:
        found = localize(golden.features(case), rule="lost", similarity=similarity)
        scale_y, scale_x = golden.data["scales"][case]
        height, width = golden.data["im_size"][case]
        pixels = found.boxes_B4[0].double() * torch.tensor([scale_x, scale_y, scale_x, scale_y])
        pixels[2:] = torch.minimum(pixels[2:], torch.tensor([width, height]))
        expected = golden.data[f"lost_{key}_box_stable"][case].tolist()
        assert pixels.tolist() == pytest.approx(expected), f"case {case}"


def test_degrees_seeds_and_masks_equal_the_published_ones(golden: Golden) -> None:
    for case in golden.cases(golden.data["lost_ok_stable"][:, 0] == 1):
        found = localize(golden.features(case), rule="lost")
        assert found.seed_B[0] == golden.data["lost_seed"][case, 1]
        assert found.degree_BN[0].tolist() == golden.data[f"degree_{case:03d}"].tolist()
        component = golden.data[f"lost_mask_{case:03d}"] == 2
        assert np.array_equal(found.mask_BHW[0].numpy(), component), f"case {case}"


@pytest.mark.parametrize("rule", ["lost", "solost"])
def test_every_case_is_the_same_alone_and_in_a_batch(golden: Golden, rule: Any) -> None:
    grids: dict[tuple[int, ...], list[int]] = {}
    for case in range(len(golden.data["dims"])):
        shape = tuple(golden.features(case).shape[1:])
        grids.setdefault(shape, []).append(case)
    for cases in grids.values():
        batch = localize(torch.cat([golden.features(case) for case in cases]), rule=rule)
        for place, case in enumerate(cases):
            alone = localize(golden.features(case), rule=rule)
            assert torch.equal(batch.boxes_B4[place], alone.boxes_B4[0])
            assert torch.equal(batch.found_B[place], alone.found_B[0])
            assert torch.equal(batch.degree_BN[place], alone.degree_BN[0])
            assert torch.equal(batch.mask_BHW[place], alone.mask_BHW[0])


def test_what_the_published_code_rejects_gives_a_box_or_found_false(golden: Golden) -> None:
    rejected = golden.data["solost_ok_stable"][:, 0] == 0
    outcomes = {}
    for case in golden.cases(rejected):
        found = localize(golden.features(case))
        width, height = found.mask_BHW.shape[2], found.mask_BHW.shape[1]
        x0, y0, x1, y1 = found.boxes_B4[0].tolist()
        if found.found_B[0]:
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
        else:
            assert [x0, y0, x1, y1] == [0, 0, 0, 0]
        outcomes[case] = bool(found.found_B[0])
    assert set(outcomes.values()) == {True, False}
