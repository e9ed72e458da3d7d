"""One pass gives the network's own logits and its grids, whatever the network."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import ConfigError
from pipeline.models.backbones import build_model
from pipeline.models.cvt import CvtLayout, cvt_13, cvt_13_paper
from pipeline.models.grid_classifier import GridClassifier, final_map
from pipeline.models.t2t_vit import T2tLayout, t2t_vit_14

SWIN = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 6]}
VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
CVT: dict[str, Any] = {"dims": (16, 24, 32), "depths": (1, 1, 2), "heads": (1, 2, 4)}
T2T: dict[str, Any] = {"token_dim": 8, "dim": 16, "depth": 2, "heads": 2}

# Name, constructor's arguments, side of the images: all kinds of networks, as small as they get.
NETWORKS: list[tuple[str, dict[str, Any], int]] = [
    ("swin_tiny_patch4_window7_224", SWIN, 64),
    ("swinv2_tiny_window8_256", SWIN, 64),
    ("vit_tiny_patch16_224", VIT, 64),
    ("deit_tiny_distilled_patch16_224", VIT, 64),
    ("resnet18", {}, 64),
    ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 64),
    ("cvt_13", CVT, 64),
    ("cvt_13_paper", CVT, 64),
    ("t2t_vit_14", T2T, 64),
]
NAMES = [name for name, _, _ in NETWORKS]


def build(name: str, **choices: Any) -> GridClassifier:
    torch.manual_seed(0)
    options, side = next((given, px) for known, given, px in NETWORKS if known == name)
    model: GridClassifier = build_model(
        name, num_classes=5, image_size=side, options=options, **choices
    )
    return model


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_networks_own(name: str) -> None:
    model = build(name).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        prediction = model(images)
        torch.testing.assert_close(prediction.logits_BK, model.network(images), atol=1e-6, rtol=0)
    assert prediction.logits_BK.shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "pvt_v2_b0",
        "levit_128s",
        "crossvit_9_240",
        "coat_lite_tiny",
        "efficientnet_b0",
        "pit_ti_224",
        "test_mambaout",
        "xcit_nano_12_p16_224",
    ],
)
def test_oddly_built_networks_give_their_logits_and_a_grid_too(name: str) -> None:
    network: Any = timm.create_model(name, num_classes=5)
    model = GridClassifier(network).eval()
    rows, columns = network.pretrained_cfg["input_size"][-2:]
    images = torch.randn(1, 3, rows, columns)
    with torch.no_grad():
        prediction = model(images)
        torch.testing.assert_close(prediction.logits_BK, network(images), atol=1e-6, rtol=0)
    assert tuple(prediction.grids[0].shape[1:]) == model.grid_shapes((rows, columns))[0]


HOOKED = [
    ("swin_tiny_patch4_window7_224", "pre_norm", "layers.3", lambda out: out.permute(0, 3, 1, 2)),
    ("swin_tiny_patch4_window7_224", "post_norm", "norm", lambda out: out.permute(0, 3, 1, 2)),
    ("vit_tiny_patch16_224", "pre_norm", "blocks.1", lambda out: as_map(out[:, 1:])),
    ("vit_tiny_patch16_224", "post_norm", "norm", lambda out: as_map(out[:, 1:])),
    ("deit_tiny_distilled_patch16_224", "pre_norm", "blocks.1", lambda out: as_map(out[:, 2:])),
    ("resnet18", "pre_norm", "layer4", lambda out: out),
    ("cvt_13", "pre_norm", "stage2", lambda out: out[0]),
    ("cvt_13_paper", "pre_norm", "stage2", lambda out: out[0]),
    ("t2t_vit_14", "pre_norm", "blocks.1", lambda out: as_map(out[:, 1:])),
    ("t2t_vit_14", "post_norm", "norm", lambda out: as_map(out[:, 1:])),
]


def as_map(tokens_BND: Tensor) -> Tensor:
    """Square grids, cell by cell."""
    side = round(tokens_BND.shape[1] ** 0.5)
    rows = [tokens_BND[:, row * side : (row + 1) * side] for row in range(side)]
    return torch.stack(rows, dim=1).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("name", "tap", "module", "to_map"), HOOKED)
def test_grids_are_what_a_hook_catches_at_the_tap(
    name: str, tap: str, module: str, to_map: Any
) -> None:
    model = build(name, tap=tap).eval()
    caught: list[Any] = []
    model.network.get_submodule(module).register_forward_hook(lambda *args: caught.append(args[2]))
    with torch.no_grad():
        (grid,) = model(torch.randn(2, 3, 64, 64)).grids
    assert len(caught) == 1, "the norm ran twice"
    assert torch.equal(grid, to_map(caught[0]))


def test_the_default_tap_is_that_of_the_papers_code() -> None:
    assert build("t2t_vit_14").tap == "post_norm"
    assert {build(name).tap for name in NAMES if name != "t2t_vit_14"} == {"pre_norm"}


def test_several_stages_come_in_the_order_asked_for() -> None:
    model = build("swin_tiny_patch4_window7_224", stages=(0, 1, 3)).eval()
    shapes = [tuple(grid.shape) for grid in model(torch.randn(2, 3, 64, 64)).grids]
    assert shapes == [(2, 24, 16, 16), (2, 48, 8, 8), (2, 192, 2, 2)]
    assert model.grid_shapes((64, 64)) == tuple(shape[1:] for shape in shapes)
    last = build("swin_tiny_patch4_window7_224", stages=(-3, -1), tap="post_norm").eval()
    first, second = last(torch.randn(2, 3, 64, 64)).grids
    assert first.shape[1:] == (48, 8, 8)
    assert second.shape[1:] == (192, 2, 2)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"stages": ()}, "rising"),
        ({"stages": (1, 0)}, "rising"),
        ({"stages": (0, -1)}, "rising"),
        ({"stages": (7,)}, "out of range"),
        ({"tap": "mid_norm"}, "pre_norm, post_norm"),
        ({"tap": "post_norm", "stages": (3,)}, "end with -1"),
    ],
)
def test_impossible_stages_and_taps_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("swin_tiny_patch4_window7_224", **choices)


def test_a_norm_that_sees_the_class_token_alone_cannot_be_tapped() -> None:
    with pytest.raises(ConfigError, match="pre_norm"):
        build("cvt_13", tap="post_norm")


def test_a_network_without_intermediate_maps_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="Linear"):
        GridClassifier(nn.Linear(2, 2))


def test_final_features_of_another_width_are_no_map() -> None:
    grid = torch.zeros(1, 4, 2, 3)
    assert final_map(torch.zeros(1, 8, 4), grid).shape == (1, 4, 2, 3)
    for features in (torch.zeros(1, 5, 4), torch.zeros(1, 8, 5), torch.zeros(1, 4), [grid]):
        with pytest.raises(ConfigError, match="pre_norm"):
            final_map(features, grid)


@pytest.mark.parametrize("name", NAMES)
def test_grid_shapes_are_told_without_touching_anything(name: str) -> None:
    model = build(name).train()
    model.network.get_submodule("head" if hasattr(model.network, "head") else "fc").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    shapes = model.grid_shapes((64, 64))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    grids = model(torch.randn(2, 3, 64, 64)).grids
    assert shapes == tuple(tuple(grid.shape[1:]) for grid in grids)


@pytest.mark.parametrize("name", NAMES)
def test_logits_alone_give_every_trainable_parameter_a_gradient(name: str) -> None:
    model = build(name).train()
    model(torch.randn(2, 3, 64, 64)).logits_BK.sum().backward()
    without = [
        key
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []


def test_gradients_flow_from_the_grid_into_the_network() -> None:
    model = build("swin_tiny_patch4_window7_224")
    model(torch.randn(2, 3, 64, 64)).grids[0].square().sum().backward()
    grad = model.network.get_submodule("patch_embed.proj").weight.grad
    assert isinstance(grad, Tensor)
    assert grad.abs().sum() > 0


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "cvt_13", "t2t_vit_14"])
def test_data_parallel_training_needs_no_search_for_unused_parameters(name: str) -> None:
    parallel = DistributedDataParallel(build(name).train())
    for _ in range(2):
        # A parameter without gradient would make the second pass raise.
        prediction = parallel(torch.randn(2, 3, 64, 64))
        prediction.logits_BK.sum().backward()
    assert len(prediction.grids) == 1


@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_channels_last_change_little(name: str) -> None:
    model = build(name).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        moved = model(images.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(images.to(memory_format=torch.channels_last))
    for found, tolerance in ((moved, 1e-4), (half, 0.1)):
        for one, reference in (
            (found.logits_BK, expected.logits_BK),
            (found.grids[0], expected.grids[0]),
        ):
            error = (one.float() - reference).norm() / reference.norm()
            assert error < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "cvt_13", "t2t_vit_14"]
)
def test_compiles_as_one_graph(name: str) -> None:
    model = build(name).eval()
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found, expected = compiled(images), model(images)
    torch.testing.assert_close(found.logits_BK, expected.logits_BK, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.grids[0], expected.grids[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pickles(name: str) -> None:
    model = build(name).eval()
    images = torch.randn(1, 3, 64, 64)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(images).logits_BK, model(images).logits_BK)
    assert again.layer_groups() == model.layer_groups()


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("swin_tiny_patch4_window7_224", ("network.head.fc",)),
        ("deit_tiny_distilled_patch16_224", ("network.head", "network.head_dist")),
        ("resnet18", ("network.fc",)),
        ("cvt_13", ("network.head",)),
        ("t2t_vit_14", ("network.head",)),
    ],
)
def test_heads_are_named(name: str, head: tuple[str, ...]) -> None:
    assert build(name).head_prefixes == head


def test_parameters_that_are_not_decayed_are_named_as_the_classifiers() -> None:
    assert build("cvt_13").no_weight_decay() == {"network.stage2.cls_token"}
    assert build("t2t_vit_14").no_weight_decay() == {"network.cls_token"}
    swin = build("swin_tiny_patch4_window7_224")
    tables = {name for name, _ in swin.named_parameters() if "relative_position_bias" in name}
    assert swin.no_weight_decay() == tables
    assert len(tables) == 5


@pytest.mark.parametrize("name", NAMES)
def test_layers_hold_every_parameter_but_the_heads_once_from_input_to_output(name: str) -> None:
    model = build(name)
    listed = [parameter for layer in model.layer_groups() for parameter in layer]
    named = [parameter for parameter, _ in model.named_parameters()]
    heads = tuple(f"{prefix}." for prefix in model.head_prefixes)
    assert sorted(listed) == sorted(one for one in named if not one.startswith(heads))
    assert any(
        "stem" in one or "embed" in one or "conv1" in one or "tokens_to_token" in one
        for one in model.layer_groups()[0]
    )
    assert len(model.layer_groups()) >= 3


def test_layers_of_cvt_and_t2t_are_their_blocks() -> None:
    cvt = [layer[0] for layer in build("cvt_13").layer_groups()]
    assert cvt == [
        "network.stage0.patch_embed.proj.weight",
        "network.stage0.blocks.0.norm1.weight",
        "network.stage1.patch_embed.proj.weight",
        "network.stage1.blocks.0.norm1.weight",
        "network.stage2.cls_token",
        "network.stage2.blocks.0.norm1.weight",
        "network.stage2.blocks.1.norm1.weight",
    ]
    t2t = build("t2t_vit_14").layer_groups()
    assert "network.tokens_to_token.project.weight" in t2t[0]
    assert "network.norm.weight" in t2t[-1]
    assert len(t2t) == 3


def test_without_layers_all_but_the_head_are_one() -> None:
    model = GridClassifier(cvt_13(5, CvtLayout(**CVT)))
    (layer,) = model.layer_groups()
    assert len(layer) == len(list(model.parameters())) - 2


def test_own_networks_are_wrapped_as_they_are() -> None:
    images = torch.randn(1, 3, 64, 32)
    layout = T2tLayout(**T2T)
    for network in (
        cvt_13_paper(5, CvtLayout(**CVT)),
        t2t_vit_14(5, layout, image_size=(64, 32)),
    ):
        prediction = GridClassifier(network.eval())(images)
        assert torch.equal(prediction.logits_BK, network(images))
        assert prediction.grids[0].shape[-2:] == (4, 2)
