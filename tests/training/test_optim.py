"""Who is decayed, who learns how fast, and that the optimisers are torch's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.optim import (
    ParameterGroup,
    backbone_scales,
    build_optimizer,
    layerwise_scales,
    parameter_groups,
    scaled_lr,
    set_learning_rate,
    set_weight_decay,
)


class ChannelNorm(nn.Module):
    """CvT's: the released code decays these by accident."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, 6, 1, 1))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 6))
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, 5, 6))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 6))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.gate = nn.Parameter(torch.zeros(3, 3))
        self.stem = nn.Conv2d(3, 6, 2)
        self.norm = ChannelNorm()
        self.squeeze = nn.Conv2d(6, 1, 1)
        self.attention = nn.MultiheadAttention(6, 2)
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.head = nn.Linear(6, 1)

    def no_weight_decay(self) -> set[str]:
        return {"gate", "nothing_of_the_sort"}


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network()


def names_where(groups: list[ParameterGroup], **wanted: float) -> set[str]:
    return {
        name
        for group in groups
        if all(group[key] == value for key, value in wanted.items())
        for name, _ in group["params"]
    }


def test_only_matrices_that_nobody_exempts_are_decayed() -> None:
    groups = parameter_groups(Wrapped(), weight_decay=0.05)
    assert names_where(groups, weight_decay=0.05) == {
        "network.stem.weight",
        # One output only, so shaped like a gain, and still a matrix.
        "network.squeeze.weight",
        "network.head.weight",
        "network.attention.in_proj_weight",
        "network.attention.out_proj.weight",
    }
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


def test_every_trainable_parameter_is_in_one_group_and_no_frozen_one() -> None:
    network = Wrapped()
    groups = parameter_groups(network, weight_decay=0.05, lr_scales={"network.gate": 0.5})
    grouped = [name for group in groups for name, _ in group["params"]]
    trainable = [name for name, p in network.named_parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert "network.frozen" not in grouped
    assert names_where(groups, lr_scale=0.5) == {"network.gate"}


def test_a_real_swin_exempts_its_bias_tables_and_norms() -> None:
    import timm

    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(
            "swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1), num_heads=(1, 2)
        )
    decayed = names_where(parameter_groups(network, weight_decay=0.05), weight_decay=0.05)
    expected = {
        name
        for name, parameter in network.named_parameters()
        if parameter.ndim > 1 and "bias_table" not in name
    }
    assert decayed == expected
    assert expected


def test_frozen_modules_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="must have trainable parameters, it has none"):
        parameter_groups(nn.ReLU(), weight_decay=0)
    with pytest.raises(ValueError, match=r"parameters that do not exist: bulk\.weight"):
        parameter_groups(nn.Linear(2, 2), weight_decay=0, lr_scales={"bulk.weight": 1})


def test_layers_learn_slower_the_nearer_they_are_to_the_input() -> None:
    names = ["n.cls", "n.stem.weight", "n.b.1.w", "n.b.11.w", "n.b.1.norm.w", "n.head.w", "other"]
    scales = layerwise_scales(names, [("n.stem", "n.cls"), "n.b.1", "n.b.11"], 0.5)
    assert scales == {
        "n.cls": 0.125,
        "n.stem.weight": 0.125,
        "n.b.1.w": 0.25,
        "n.b.1.norm.w": 0.25,
        "n.b.11.w": 0.5,
    }
    moved = layerwise_scales(names, ["n.b.1", "n.b.1.norm"], 0.5)
    assert moved == {"n.b.1.w": 0.25, "n.b.1.norm.w": 0.5}


def test_misspelt_layers_and_impossible_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameter is within 'blocks'"):
        layerwise_scales(["block.0.weight"], ["blocks"], 0.5)
    with pytest.raises(ValueError, match="no parameter is within 'classifier'"):
        backbone_scales(["head.weight"], ["classifier"], 0.01)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got 0"):
        layerwise_scales(["a.w"], ["a"], 0)
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        backbone_scales(["a.w"], ["a"], -1)


def test_the_backbone_learns_slower_than_the_classifier() -> None:
    names = ["stem.weight", "head.weight", "head.bias", "header.weight"]
    scales = backbone_scales(names, ["head"], 0.01)
    assert scales == {"stem.weight": 0.01, "header.weight": 0.01}


def trained(optimizer_of: Any) -> list[Tensor]:
    """The parameters after a few steps on the same numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
        x = torch.randn(20, 5)
    optimizer = optimizer_of(network)
    for step in range(5):
        if step == 3:
            set_learning_rate(optimizer, 0.02)
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
    return list(network.parameters())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_training_equals_torchs_plain_optimiser(kind: Any) -> None:
    def ours(network: nn.Module) -> torch.optim.Optimizer:
        scales = {"0.weight": 0.1, "0.bias": 0.1}
        groups = parameter_groups(network, weight_decay=0.1, lr_scales=scales)
        return build_optimizer(groups, kind=kind, lr=0.05)

    def plain(network: nn.Module) -> torch.optim.Optimizer:
        groups = [
            {"params": [p], "weight_decay": 0.1 * (p.ndim > 1), "lr_scale": 0.1 if i < 2 else 1.0}
            for i, p in enumerate(network.parameters())
        ]
        if kind == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.05, foreach=False)
        else:
            optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=False)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * group["lr_scale"]
        return optimizer

    torch.testing.assert_close(trained(ours), trained(plain))


def test_learning_rates_honour_each_groups_scale_from_the_first_step_and_after_a_resume() -> None:
    network = nn.Linear(3, 3)
    groups = parameter_groups(network, weight_decay=0.1, lr_scales={"weight": 0.01})
    optimizer = build_optimizer(groups, kind="adamw", lr=2.0)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.02, 2.0]
    resumed = build_optimizer(
        parameter_groups(network, weight_decay=0.1), kind="adamw", lr=9.0, betas=(0.5, 0.6)
    )
    resumed.load_state_dict(optimizer.state_dict())
    set_learning_rate(resumed, 3.0)
    assert sorted(group["lr"] for group in resumed.param_groups) == [0.03, 3.0]
    assert resumed.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("start", [0.1, 0.0])
def test_a_new_weight_decay_reaches_who_decays_and_nobody_else(start: float) -> None:
    network = Network()
    scales = {"head.weight": 0.5, "head.bias": 0.5}

    def built() -> torch.optim.Optimizer:
        groups = parameter_groups(network, weight_decay=start, lr_scales=scales)
        return build_optimizer(groups, kind="adamw", lr=1.0)

    optimizer = built()
    set_weight_decay(optimizer, 0.3)
    # Two scales, each with and without decay; a start at 0 takes nobody out.
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, 0, 0.3, 0.3]
    decayed = names_where(
        [
            {**group, "params": [(name, None) for name in group["param_names"]]}
            for group in optimizer.param_groups
        ],
        weight_decay=0.3,
    )
    expected = names_where(parameter_groups(network, weight_decay=9.0), weight_decay=9.0)
    assert decayed == expected
    assert {group["lr"] for group in optimizer.param_groups} == {1.0, 0.5}
    # A resumed run keeps both what it was and who it is for.
    resumed = built()
    resumed.load_state_dict(optimizer.state_dict())
    set_weight_decay(resumed, 0.4)
    assert [group["weight_decay"] for group in resumed.param_groups] == [
        {0: 0, 0.3: 0.4}[group["weight_decay"]] for group in optimizer.param_groups
    ]


def test_building_an_optimiser_leaves_the_groups_as_they_were() -> None:
    groups = parameter_groups(nn.Linear(3, 3), weight_decay=0.1)
    before = [dict(group) for group in groups]
    build_optimizer(groups, kind="sgd", lr=1)
    assert [group.keys() for group in groups] == [group.keys() for group in before]


def test_options_reach_the_optimiser_and_unknown_ones_are_refused() -> None:
    groups = parameter_groups(nn.Linear(3, 3), weight_decay=0.1)
    adamw = build_optimizer(groups, kind="adamw", lr=1, betas=(0.5, 0.6))
    assert adamw.param_groups[0]["betas"] == (0.5, 0.6)
    assert adamw.param_groups[0]["eps"] == 1e-8
    assert adamw.param_groups[0]["fused"] is True
    sgd = build_optimizer(groups, kind="sgd", lr=1, momentum=0.7)
    assert sgd.param_groups[0]["momentum"] == 0.7
    unknown: Any = "lion"
    with pytest.raises(ValueError, match="the optimiser must be adamw or sgd, got 'lion'"):
        build_optimizer(groups, kind=unknown, lr=1)


def test_the_learning_rate_follows_the_batch() -> None:
    # The released recipe: 5e-4 at 512, 8 workers of 128.
    assert scaled_lr(5e-4, 1024, 512) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="batches must be at least 1, got 0 and 512"):
        scaled_lr(1, 0, 512)
