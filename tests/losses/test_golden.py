"""Losses, predictions, targets and gradients equal those of the released DRLoc code.

The cases are described in golden/drloc.md beside the data.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config.classification import Normalize, Pooling
from pipeline.losses.drloc import DRLocHead, drloc_loss
from pipeline.losses.multi_stage import pool_grid
from pipeline.losses.pairs import all_pairs, relative_offsets, sample_pairs
from tests.conftest import ReadGolden

LAYERS = {
    "1": "first",
    "2": "hidden.0",
    "3": "last",
    "x": "axes.0",
    "y": "axes.1",
}


@dataclass(frozen=True)
class Golden:
    arrays: dict[str, Any]
    cases: dict[str, dict[str, Any]]

    def head(self, case: str) -> DRLocHead:
        """The case's head in float64."""
        index = self.cases[case]
        loaded = self._by_our_names(f"{index['weights']}/")
        channels = loaded["first.weight"].shape[1] // 2
        classes = index.get("out_dim", 7)
        mode = index.get("mode", "l1")
        head = DRLocHead(
            channels,
            hidden_dim=len(loaded["first.weight"]),
            mode=mode,
            # Where there are more classes than cells, the head was made for a larger grid.
            grid=self._grid(index, classes) if mode != "l1" else (7, 7),
            signed=not index.get("use_abs", True),
        )
        head.load_state_dict(loaded)
        return head.double()

    @staticmethod
    def _grid(index: dict[str, Any], classes: int) -> tuple[int, int]:
        side = classes if index["use_abs"] else (classes + 1) // 2
        return side, side

    def _by_our_names(self, prefix: str) -> dict[str, Tensor]:
        """``W1 -> first.weight`` and so on for the arrays below a prefix."""
        kinds = {"W": "weight", "b": "bias"}
        found = {}
        for name, array in self.arrays.items():
            short = name.removeprefix(prefix)
            if name.startswith(prefix) and len(short) == 2 and short[1] in LAYERS:
                found[f"{LAYERS[short[1]]}.{kinds[short[0]]}"] = torch.from_numpy(array)
        return found

    def gradients(self, case: str) -> dict[str, Tensor]:
        return self._by_our_names(f"{case}/grad_")

    def pairs(self, case: str) -> Tensor:
        ends = [self.arrays[f"{case}/pair_{end}"] for end in "ab"]
        return torch.from_numpy(np.stack(ends, axis=2))

    def tensor(self, name: str) -> Tensor:
        return torch.as_tensor(self.arrays[name])

    def features(self, case: str) -> Tensor:
        return self.tensor(f"{case}/feats").double().requires_grad_()

    def normalize(self, case: str) -> Normalize:
        return "side_minus_one" if self.cases[case]["normalize"] else "none"


@pytest.fixture(scope="module")
def golden(read_golden: ReadGolden) -> Golden:
    arrays = read_golden("drloc.npz")
    cases = json.loads(str(arrays.pop("index_json")))
    return Golden(arrays, {case["name"]: case for case in cases})


def grid_cases(golden: Golden) -> Iterator[str]:
    """The 33 cases that start from features; the other two start from tokens."""
    yield from (name for name in golden.cases if not name.startswith("pool_"))


def assert_close(found: Tensor, expected: Tensor, case: str, *, rtol: float, atol: float) -> None:
    message = f"{case}: "
    torch.testing.assert_close(
        found, expected.to(found.dtype), rtol=rtol, atol=atol, msg=lambda text: message + text
    )


def test_all_cases_are_here(golden: Golden) -> None:
    assert len(golden.cases) == 35
    assert len(list(grid_cases(golden))) == 33


def test_float64_losses_equal_the_reference(golden: Golden) -> None:
    for case in grid_cases(golden):
        normalize = golden.normalize(case)
        loss = drloc_loss(
            golden.features(case), golden.head(case), golden.pairs(case), normalize=normalize
        )
        rtol = 1e-7 if normalize == "none" else 1e-6
        assert_close(loss, golden.tensor(f"{case}/loss_f64"), case, rtol=rtol, atol=0)


def test_float32_losses_equal_the_reference(golden: Golden) -> None:
    for case in grid_cases(golden):
        features = golden.tensor(f"{case}/feats")
        loss = drloc_loss(
            features,
            golden.head(case).float(),
            golden.pairs(case),
            normalize=golden.normalize(case),
        )
        assert loss.dtype == torch.float32
        assert_close(loss, golden.tensor(f"{case}/loss_f32"), case, rtol=2e-6, atol=0)


def test_every_gradient_equals_the_reference(golden: Golden) -> None:
    compared = 0
    for case in grid_cases(golden):
        features, head = golden.features(case), golden.head(case)
        normalize = golden.normalize(case)
        loss = drloc_loss(features, head, golden.pairs(case), normalize=normalize)
        torch.autograd.backward(loss)
        wide = golden.cases[case]["hidden"] == 512
        # Suggested with the data: wide gradients are stored in float32.
        bounds = {"rtol": 1e-4, "atol": 1e-7} if wide else {"rtol": 1e-6, "atol": 1e-12}
        assert features.grad is not None
        assert_close(features.grad, golden.tensor(f"{case}/grad_feats"), case, **bounds)
        expected = golden.gradients(case)
        found = {name: value.grad for name, value in head.named_parameters()}
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient is not None
            assert_close(gradient, expected[name], f"{case} {name}", **bounds)
            compared += 1
    assert compared == 18 * 6 + 15 * 10


def test_predictions_equal_the_reference(golden: Golden) -> None:
    for case in grid_cases(golden):
        axes = golden.head(case)(golden.features(case), golden.pairs(case))
        # The reference: (B * M, 2), or (B * M, K, 2) with classes.
        found = torch.stack([axis.flatten(0, 1).squeeze(-1) for axis in axes], dim=-1)
        assert_close(found, golden.tensor(f"{case}/pred"), case, rtol=1e-7, atol=1e-12)


def test_targets_equal_the_reference(golden: Golden) -> None:
    for case in grid_cases(golden):
        index = golden.cases[case]
        found = relative_offsets(
            golden.pairs(case),
            index["H"],
            index["W"],
            signed=not index["use_abs"],
            normalize=golden.normalize(case),
        )
        target = golden.tensor(f"{case}/target")
        assert_close(found.flatten(0, 1).double(), target, case, rtol=1e-7, atol=0)


def test_eq_2_of_the_paper_as_a_batch_mean_equals_the_derived_numbers(golden: Golden) -> None:
    cases = [case for case in golden.cases if f"{case}/paper_batchmean_f64" in golden.arrays]
    assert len(cases) >= 7
    for case in cases:
        features = golden.features(case)
        loss = drloc_loss(features, golden.head(case), golden.pairs(case), reduction="paper")
        torch.autograd.backward(loss)
        expected = golden.tensor(f"{case}/paper_batchmean_f64")
        assert_close(loss, expected, case, rtol=1e-6, atol=0)
        assert features.grad is not None
        gradient = golden.tensor(f"{case}/paper_batchmean_grad_feats")
        bounds = {"rtol": 1e-4, "atol": 1e-7} if "h512" in case else {"rtol": 1e-6, "atol": 1e-12}
        assert_close(features.grad, gradient, case, **bounds)


@pytest.mark.parametrize(
    ("case", "kind"), [("pool_code_k3s2p1", "overlap_3x3"), ("pool_paper_k2s2", "mean_2x2")]
)
def test_both_poolings_equal_the_reference_down_to_the_tokens(
    golden: Golden, case: str, kind: Pooling
) -> None:
    tokens = golden.tensor("pool/tokens").double().requires_grad_()
    grid = tokens[:, 1:].transpose(1, 2).reshape(2, 8, 14, 14)
    pooled = pool_grid(grid, kind)
    loss = drloc_loss(pooled, golden.head(case), golden.pairs(case))
    torch.autograd.backward(loss)
    assert_close(pooled, golden.tensor(f"{case}/pooled"), case, rtol=1e-7, atol=1e-12)
    assert_close(loss, golden.tensor(f"{case}/loss_f64"), case, rtol=1e-7, atol=0)
    assert tokens.grad is not None
    expected = golden.tensor(f"{case}/grad_tokens")
    assert_close(tokens.grad, expected, case, rtol=1e-6, atol=1e-12)
    assert not tokens.grad[:, 0].any()


@pytest.mark.parametrize("case", ["l1_abs_raw_allpairs_B1C4H5W5", "l1_abs_raw_allpairs_B2C8H7W7"])
def test_sampled_pairs_estimate_the_reference_over_all_pairs_without_bias(
    golden: Golden, case: str
) -> None:
    features, head = golden.features(case).detach(), golden.head(case)
    batch, _, height, width = features.shape
    exact = golden.tensor(f"{case}/loss_f64").item()
    with torch.no_grad():
        ours = drloc_loss(features, head, all_pairs(batch, height, width)).item()
        generator = torch.Generator().manual_seed(0)
        estimates = torch.tensor(
            [
                drloc_loss(
                    features, head, sample_pairs(batch, 400, height, width, generator=generator)
                ).item()
                for _ in range(200)
            ]
        )
    assert ours == pytest.approx(exact, rel=1e-7)
    standard_error = estimates.std().item() / 200**0.5
    assert standard_error < 0.01 * exact
    assert abs(estimates.mean().item() - exact) < 3 * standard_error
