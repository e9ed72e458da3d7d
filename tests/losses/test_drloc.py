"""The head and the loss against a slow loop, and the promises of their docstrings."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.losses.drloc import (
    DRLocHead,
    constant_predictor_floor,
    drloc_loss,
    drloc_terms,
    gather_first,
    token_first,
)
from pipeline.losses.pairs import all_pairs, pair_generator, relative_offsets, sample_pairs
from tests.losses.slow_drloc import slow_terms

OPTIONS = [
    *(("l1", normalize, "mean") for normalize in ("none", "side", "side_minus_one")),
    ("l1", "none", "paper"),
    ("l1", "side", "paper"),
    ("ce", "none", "mean"),
    ("cbr", "none", "mean"),
]


def build_head(in_dim: int, seed: int = 0, **options: Any) -> DRLocHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DRLocHead(in_dim, **options).double()


def features(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw(batch: int, pairs: int, height: int, width: int, seed: int = 0) -> Tensor:
    return sample_pairs(batch, pairs, height, width, generator=pair_generator(seed, 0, 0, "cpu"))


def as_lists(head: DRLocHead) -> dict[str, Any]:
    def layer(linear: Any) -> tuple[Any, Any]:
        return linear.weight.tolist(), linear.bias.tolist()

    return {
        "relu": [layer(linear) for linear in (head.first, *head.hidden)],
        "last": layer(head.last),
        "axes": [layer(linear) for linear in head.axes],
    }


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(2, 5)] * 2),
    num_pairs=st.integers(1, 30),
    layers=st.tuples(st.integers(1, 6), st.integers(1, 3)),
    options=st.sampled_from(OPTIONS),
    signed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_loss_and_error_equal_the_slow_loop(
    shape: tuple[int, int, int, int],
    num_pairs: int,
    layers: tuple[int, int],
    options: tuple[Any, Any, Any],
    signed: bool,
    seed: int,
) -> None:
    batch, channels, height, width = shape
    mode, normalize, reduction = options
    head = build_head(
        channels,
        seed,
        hidden_dim=layers[0],
        num_hidden=layers[1],
        mode=mode,
        grid=(height, width),
        signed=signed,
    )
    x, pairs = features(*shape, seed=seed), draw(batch, num_pairs, height, width, seed)
    fast = drloc_terms(x, head, pairs, normalize=normalize, reduction=reduction)
    slow_loss, slow_error = slow_terms(
        x.tolist(),
        pairs.tolist(),
        as_lists(head),
        mode=mode,
        signed=signed,
        normalize=normalize,
        reduction=reduction,
    )
    # Normalised targets are float32.
    assert fast.loss.item() == pytest.approx(slow_loss, rel=1e-6)
    assert fast.error_cells.item() == pytest.approx(slow_error, rel=1e-6)
    assert drloc_loss(x, head, pairs, normalize=normalize, reduction=reduction) == fast.loss
    assert not fast.error_cells.requires_grad


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, 12)] * 5),
    seed=st.integers(0, 1000),
)
def test_the_first_layer_split_per_token_equals_the_plain_one_with_all_gradients(
    sizes: tuple[int, int, int, int, int], seed: int
) -> None:
    batch, tokens, channels, hidden, pairs = sizes
    layer = build_head(channels, seed, hidden_dim=hidden).first
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(tokens, (batch, pairs, 2), generator=generator)
    token = features(batch, tokens, channels, seed=seed).requires_grad_()
    rows = torch.arange(batch)[:, None]
    joined = [token[rows, index[..., 0]], token[rows, index[..., 1]]]
    plain = layer(torch.cat(joined, dim=-1))
    inputs = [token, layer.weight, layer.bias]
    weights = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    for way in (token_first, gather_first):
        out = way(token, index, layer)
        torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad((out * weights).sum(), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_the_first_layer_is_computed_per_token_exactly_where_that_is_no_more_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[str] = []

    def spy(way: Any) -> Any:
        def called(*args: Any) -> Tensor:
            used.append(way.__name__)
            result: Tensor = way(*args)
            return result

        return called

    for way in (token_first, gather_first):
        monkeypatch.setattr(f"pipeline.losses.drloc.{way.__name__}", spy(way))
    head = build_head(2, hidden_dim=3)
    for pairs in (11, 12, 13):
        drloc_loss(features(1, 2, 3, 4), head, draw(1, pairs, 3, 4))
    assert used == ["gather_first", "token_first", "token_first"]


@pytest.mark.parametrize(
    ("in_dim", "options", "parameters"),
    [
        (768, {}, 1_050_626),
        (384, {}, 657_410),
        (2048, {}, 2_361_346),
        (768, {"mode": "ce"}, 1_319_438),
        (768, {"mode": "cbr"}, 1_319_438),
        (384, {"mode": "ce", "grid": (14, 14)}, 933_404),
        (768, {"num_hidden": 1}, 787_970),
    ],
)
def test_heads_have_the_published_number_of_parameters(
    in_dim: int, options: Any, parameters: int
) -> None:
    head = DRLocHead(in_dim, **options)
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters


def test_rows_and_columns_of_a_wide_grid_have_classes_of_their_own() -> None:
    for signed, classes in ((False, (3, 5)), (True, (5, 9))):
        head = build_head(2, hidden_dim=4, mode="ce", grid=(3, 5), signed=signed)
        outputs = head(features(2, 2, 3, 5), draw(2, 7, 3, 5))
        assert tuple(axis.shape for axis in outputs) == ((2, 7, classes[0]), (2, 7, classes[1]))


def test_an_image_gets_the_same_loss_alone_and_in_a_batch() -> None:
    x, pairs, head = features(5, 3, 4, 6), draw(5, 30, 4, 6), build_head(3, hidden_dim=8)
    together = drloc_loss(x, head, pairs)
    alone = [drloc_loss(x[i : i + 1], head, pairs[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-12, atol=0)


def test_channels_last_features_give_the_same_loss_and_gradient() -> None:
    x, pairs, head = features(2, 3, 4, 6), draw(2, 30, 4, 6), build_head(3, hidden_dim=8)
    plain = x.clone().requires_grad_()
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    losses = [drloc_loss(each, head, pairs) for each in (plain, last)]
    assert losses[0] == losses[1]
    gradients = torch.autograd.grad(losses[0] + losses[1], [plain, last])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_under_autocast_the_head_and_the_loss_stay_float32() -> None:
    head = build_head(8, hidden_dim=16, mode="cbr").float()
    x, pairs = features(2, 8, 7, 7).bfloat16().requires_grad_(), draw(2, 64, 7, 7)
    expected = drloc_terms(x.float(), head, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = drloc_terms(x, head, pairs)
    assert found.loss.dtype == torch.float32
    assert torch.equal(found.loss, expected.loss)
    (gradient,) = torch.autograd.grad(found.loss, [x])
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()
    assert gradient.any()


def test_bfloat16_weights_still_give_a_float32_loss() -> None:
    head = build_head(8, hidden_dim=16, mode="ce").bfloat16()
    assert drloc_loss(features(1, 8, 7, 7), head, draw(1, 9, 7, 7)).dtype == torch.float32


def test_paper_reduction_is_eq_2_with_the_mean_over_images() -> None:
    # Facts: (2 / k) times the raw mean, where the prediction is scaled as well.
    x, pairs, head = features(2, 3, 7, 7), draw(2, 64, 7, 7), build_head(3, hidden_dim=8)
    raw = drloc_loss(x, head, pairs)
    with torch.no_grad():
        for parameter in head.last.parameters():
            parameter.div_(7)
    eq_2 = drloc_loss(x, head, pairs, reduction="paper")
    torch.testing.assert_close(eq_2, raw * 2 / 7, rtol=1e-6, atol=0)
    mean = drloc_loss(x, head, pairs, normalize="side")
    torch.testing.assert_close(eq_2, 2 * mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("mode", "normalize", "reduction"), OPTIONS)
@pytest.mark.parametrize("signed", [False, True])
def test_a_head_that_knows_the_cells_has_no_error_in_cells(
    mode: Any, normalize: Any, reduction: Any, signed: bool
) -> None:
    unit: Any = "side" if reduction == "paper" else normalize

    class Knowing(DRLocHead):
        def forward(self, features_BCHW: Tensor, pairs_BM22: Tensor) -> tuple[Tensor, Tensor]:
            rows, columns = relative_offsets(
                pairs_BM22, 4, 6, signed=signed, normalize=unit
            ).unbind(-1)
            if mode == "l1":
                return rows[..., None], columns[..., None]
            one_hot, (height, width) = nn.functional.one_hot, (7, 11) if signed else (4, 6)
            return one_hot(rows.long(), height) * 40.0, one_hot(columns.long(), width) * 40.0

    head = Knowing(3, mode=mode, grid=(4, 6), signed=signed)
    terms = drloc_terms(
        features(2, 3, 4, 6), head, draw(2, 50, 4, 6), normalize=normalize, reduction=reduction
    )
    assert terms.error_cells.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (2, 2), (3, 8)])
def test_the_floor_is_the_error_of_the_best_constant_over_all_pairs(
    grid: tuple[int, int], signed: bool
) -> None:
    offset = all_pairs(1, *grid)[0, :, 0] - all_pairs(1, *grid)[0, :, 1]
    truth = (offset if signed else offset.abs()).double()
    constants = torch.arange(-max(grid), max(grid) + 0.01, 0.5, dtype=torch.float64)
    best = (truth[None] - constants[:, None, None]).abs().mean(dim=1).amin(dim=0)
    assert constant_predictor_floor(*grid, signed=signed) == pytest.approx(best.mean().item())


def test_the_floors_of_the_usual_grids_are_the_known_numbers() -> None:
    assert constant_predictor_floor(7, 7) == pytest.approx(1.3469, abs=5e-5)
    assert constant_predictor_floor(14, 14) == pytest.approx(2.724, abs=5e-4)
    square = [constant_predictor_floor(side, side) for side in (7, 14)]
    assert constant_predictor_floor(7, 14) == pytest.approx(sum(square) / 2)


def test_an_indifferent_ce_head_stands_at_the_floor() -> None:
    head = build_head(3, hidden_dim=4, mode="ce", grid=(7, 7))
    frequency = torch.tensor([7, 12, 10, 8, 6, 4, 2]).log()
    with torch.no_grad():
        for axis in head.axes:
            assert isinstance(axis, nn.Linear)
            axis.weight.zero_()
            axis.bias.copy_(frequency)
    error = drloc_terms(features(1, 3, 7, 7), head, all_pairs(1, 7, 7)).error_cells
    assert error.item() == pytest.approx(constant_predictor_floor(7, 7))


def test_a_few_steps_bring_the_error_far_under_the_floor() -> None:
    # Features that hold the cell's place: what DRLoc wants a network to learn.
    place = torch.nn.functional.one_hot(torch.arange(25), 25).float().T.reshape(1, 25, 5, 5)
    head = build_head(25, hidden_dim=64, grid=(5, 5)).float()
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for step in range(250):
        pairs = sample_pairs(1, 128, 5, 5, generator=pair_generator(0, 0, step, "cpu"))
        optimizer.zero_grad()
        torch.autograd.backward(drloc_loss(place, head, pairs))
        optimizer.step()
    error = drloc_terms(place, head, all_pairs(1, 5, 5)).error_cells.item()
    assert error < 0.3 * constant_predictor_floor(5, 5)


def test_contradicting_options_are_refused() -> None:
    x, pairs = features(1, 3, 7, 7), draw(1, 4, 7, 7)
    heads: dict[str, DRLocHead] = {
        mode: build_head(3, hidden_dim=4, mode=mode) for mode in ("l1", "ce", "cbr")
    }
    for mode in ("ce", "cbr"):
        for normalize in ("side", "side_minus_one"):
            with pytest.raises(ValueError, match=f"mode {mode} counts cells: normalize must be no"):
                drloc_loss(x, heads[mode], pairs, normalize=normalize)
        with pytest.raises(ValueError, match="so mode must be l1, got"):
            drloc_loss(x, heads[mode], pairs, reduction="paper")
    with pytest.raises(ValueError, match="paper divides targets by the side"):
        drloc_loss(x, heads["l1"], pairs, normalize="side_minus_one", reduction="paper")
    unknown: Any = "sum"
    with pytest.raises(ValueError, match="reduction must be mean or paper, got 'sum'"):
        drloc_loss(x, heads["l1"], pairs, reduction=unknown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "l2"}, "mode must be l1, ce or cbr, got 'l2'"),
        ({"num_hidden": 0}, "must be at least 1, got 3, 512 and 0"),
        ({"hidden_dim": 0}, "must be at least 1, got 3, 0 and 2"),
        ({"grid": (1, 7)}, "at least 2 x 2 cells, got 1 x 7: choose a larger image_size"),
    ],
)
def test_a_head_outside_its_range_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DRLocHead(3, **options)


def test_shapes_that_do_not_fit_are_refused_before_they_mix_images_up() -> None:
    head = build_head(3, hidden_dim=4, mode="ce", grid=(5, 5))
    with pytest.raises(ValueError, match="built for 3 channels, got 4"):
        head(features(1, 4, 5, 5), draw(1, 4, 5, 5))
    with pytest.raises(ValueError, match="classes for a 5 x 5 grid, got 5 x 6"):
        head(features(1, 3, 5, 6), draw(1, 4, 5, 6))
    with pytest.raises(ValueError, match=r"pairs must be \(2, M, 2, 2\), one set per image"):
        head(features(2, 3, 5, 5), draw(1, 4, 5, 5))
    with pytest.raises(ValueError, match="at least 2 x 2 cells, got 5 x 1"):
        drloc_loss(features(1, 3, 5, 1), head, draw(1, 4, 5, 5))
