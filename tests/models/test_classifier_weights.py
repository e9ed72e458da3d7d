"""Published weights, as generated under their public names, fitted for fine-tuning."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import ConfigError, WeightsError
from pipeline.models import model_options
from pipeline.models.backbones import build_model, load_classifier_weights
from pipeline.models.checkpoints import Weights
from pipeline.models.t2t_vit import PUBLISHED_SCALE, T2tVit

SWIN = "swin_tiny_patch4_window7_224"
NARROW = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 6]}
VIT = "vit_tiny_patch16_224"
SHALLOW = {"depth": 2, "embed_dim": 48, "num_heads": 3}
CVT = {"dims": [16, 24, 32], "depths": [1, 1, 2], "heads": [1, 2, 4]}
T2T = {"token_dim": 8, "dim": 16, "depth": 2, "heads": 2}


def published_state(name: str) -> dict[str, Tensor]:
    """Names and shapes of the full network at 1000 classes."""
    with torch.device("meta"):
        return build_model(name, num_classes=1000).network.state_dict()


def weights_of(state: dict[str, Tensor]) -> Weights:
    return Weights({key: value.clone() for key, value in state.items()}, "", source="FILE")


def random_state(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.rand(tensor.shape, generator=generator) * 0.1
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in network.state_dict().items()
    }


def build_small(name: str, num_classes: int, weights: Weights | None, **more: Any) -> Any:
    options = {SWIN: NARROW, VIT: SHALLOW, "cvt_13": CVT, "t2t_vit_14": T2T}.get(name, {})
    choices: dict[str, Any] = {"image_size": 64, "options": options, **more}
    return build_model(name, num_classes=num_classes, weights=weights, **choices)


@pytest.mark.parametrize("name", [SWIN, VIT, "resnet18", "cvt_13", "t2t_vit_14"])
def test_only_a_head_of_another_shape_starts_anew(name: str) -> None:
    state = random_state(build_small(name, 5, None).network)
    same = build_small(name, 5, weights_of(state)).network.state_dict()
    assert all(torch.equal(same[key], value) for key, value in state.items())
    other = build_small(name, 7, weights_of(state))
    heads = tuple(f"{prefix.removeprefix('network.')}." for prefix in other.head_prefixes)
    for key, value in other.network.state_dict().items():
        if key.startswith(heads):
            assert value.shape[0] == 7
        else:
            assert torch.equal(value, state[key])


def test_weights_of_a_whole_grid_classifier_and_without_a_head_fit_too() -> None:
    model = build_small(VIT, 5, None)
    again = build_small(VIT, 5, weights_of(model.state_dict()))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    body = {k: v for k, v in model.network.state_dict().items() if not k.startswith("head.")}
    assert torch.equal(build_small(VIT, 5, weights_of(body)).network.cls_token, body["cls_token"])


@pytest.mark.parametrize("name", [SWIN, VIT, "resnet18", "cvt_13", "t2t_vit_14"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "nan"])
def test_anything_else_that_does_not_match_is_refused(name: str, fault: str) -> None:
    state = random_state(build_small(name, 5, None).network)
    key = next(key for key in state if key.endswith("norm1.weight") or key == "bn1.weight")
    if fault == "missing":
        del state[key]
    elif fault == "shape":
        state[key] = torch.zeros(3)
    elif fault == "nan":
        state[key][0] = torch.nan
    else:
        state["drloc.layers.0.weight"] = torch.zeros(3)
    with pytest.raises(WeightsError, match="FILE"):
        build_small(name, 5, weights_of(state))


def test_positions_of_another_image_size_are_resampled_as_timm_does() -> None:
    state = random_state(build_small(VIT, 5, None, image_size=64).network)
    found = build_small(VIT, 5, weights_of(state), image_size=(96, 64)).network
    expected: Any = timm.create_model(VIT, num_classes=5, img_size=(96, 64), **SHALLOW)
    expected.load_state_dict(
        timm.models.vision_transformer.checkpoint_filter_fn(dict(state), expected)
    )
    assert found.pos_embed.shape == (1, 25, 48)
    assert torch.equal(found.pos_embed, expected.pos_embed)


def test_relative_position_tables_of_another_window_are_resampled() -> None:
    # Sides 16, 8, 4, 2 (window 8) and 24, 12, 6, 3 (window 6).
    state = random_state(build_small(SWIN, 5, None, image_size=64).network)
    found = build_small(SWIN, 5, weights_of(state), image_size=96).network
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert state[key].shape == (225, 1)
    assert found.state_dict()[key].shape == (121, 1)
    assert found.state_dict()[key].mean().item() == pytest.approx(state[key].mean().item(), rel=0.1)


@pytest.mark.parametrize("name", [SWIN, VIT, "cvt_13", "t2t_vit_14"])
def test_weights_of_another_patch_size_are_refused(name: str) -> None:
    state = random_state(build_small(name, 5, None).network)
    finer = 8 if name == VIT else 2
    with pytest.raises(WeightsError, match="FILE"):
        build_small(name, 5, weights_of(state), patch_size=finer)


def hugging_face_names() -> dict[str, tuple[str, ...]]:
    """Public names of transformers' CvtForImageClassification, beside those of the authors' file.

    Written out here independently of the code's patterns.
    """
    pairs: dict[str, tuple[str, ...]] = {}
    for stage, depth in enumerate(CVT["depths"]):
        hub, own = f"cvt.encoder.stages.{stage}", f"stage{stage}"
        embedding = f"{hub}.embedding.convolution_embeddings"
        pairs[f"{embedding}.projection"] = (f"{own}.patch_embed.proj", "weight", "bias")
        pairs[f"{embedding}.normalization"] = (f"{own}.patch_embed.norm", "weight", "bias")
        for block in range(depth):
            layer, ours = f"{hub}.layers.{block}", f"{own}.blocks.{block}"
            attention = f"{layer}.attention.attention"
            for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
                projection = f"{attention}.convolution_projection_{word}.convolution_projection"
                conv = f"{ours}.attn.conv_proj_{letter}"
                pairs[f"{projection}.convolution"] = (f"{conv}.conv", "weight")
                statistics = ("running_mean", "running_var", "num_batches_tracked")
                pairs[f"{projection}.normalization"] = (
                    f"{conv}.bn", "weight", "bias", *statistics,
                )  # fmt: skip
                pairs[f"{attention}.projection_{word}"] = (
                    f"{ours}.attn.proj_{letter}", "weight", "bias",
                )  # fmt: skip
            pairs[f"{layer}.attention.output.dense"] = (f"{ours}.attn.proj", "weight", "bias")
            pairs[f"{layer}.intermediate.dense"] = (f"{ours}.mlp.fc1", "weight", "bias")
            pairs[f"{layer}.output.dense"] = (f"{ours}.mlp.fc2", "weight", "bias")
            pairs[f"{layer}.layernorm_before"] = (f"{ours}.norm1", "weight", "bias")
            pairs[f"{layer}.layernorm_after"] = (f"{ours}.norm2", "weight", "bias")
    pairs["layernorm"] = ("norm", "weight", "bias")
    pairs["classifier"] = ("head", "weight", "bias")
    return pairs


def test_cvt_weights_load_under_the_names_of_the_hub() -> None:
    state = random_state(build_small("cvt_13", 5, None).network)
    renamed = {"cvt.encoder.stages.2.cls_token": state["stage2.cls_token"]}
    for hub, (own, *parts) in hugging_face_names().items():
        renamed |= {f"{hub}.{part}": state[f"{own}.{part}"] for part in parts}
    assert len(renamed) == len(state)
    found = build_small("cvt_13", 5, weights_of(renamed)).network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_cvt_13_has_the_names_and_shapes_of_the_authors_file() -> None:
    state = published_state("cvt_13")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["stage0.patch_embed.proj.weight"] == (64, 3, 7, 7)
    assert shapes["stage2.cls_token"] == (1, 1, 384)
    assert shapes["stage1.blocks.1.attn.conv_proj_k.conv.weight"] == (192, 1, 3, 3)
    assert shapes["stage1.blocks.1.attn.conv_proj_k.bn.running_var"] == (192,)
    assert shapes["stage2.blocks.9.attn.proj_q.bias"] == (384,)
    assert shapes["stage2.blocks.9.mlp.fc2.weight"] == (384, 1536)
    assert shapes["norm.weight"] == (384,)
    assert shapes["head.weight"] == (1000, 384)


def authors_t2t_file(path: Path, state: dict[str, Tensor]) -> None:
    """As T2T-ViT's trainer writes it: an average beside the weights, no attention scale."""
    average = {f"module.{k}": v for k, v in state.items() if k != "attention_scale"}
    raw = {key: torch.zeros_like(value) for key, value in average.items()}
    torch.save({"epoch": 309, "state_dict": raw, "state_dict_ema": average}, path)


def test_the_authors_t2t_file_gives_its_average_and_its_attention_scale(tmp_path: Path) -> None:
    path = tmp_path / "81.5_T2T_ViT_14.pth.tar"
    state = random_state(build_small("t2t_vit_14", 5, None).network)
    authors_t2t_file(path, state)
    network: T2tVit = build_small(
        "t2t_vit_14", 5, load_classifier_weights("t2t_vit_14", str(path))
    ).network
    assert network.attention_scale.item() == pytest.approx(384**-0.5)
    assert torch.equal(network.tokens_to_token.attention1.w, state["tokens_to_token.attention1.w"])
    assert torch.equal(network.pos_embed, state["pos_embed"])
    # What we save later says its scale itself.
    later = dict(network.state_dict()) | {"attention_scale": torch.tensor(0.3)}
    again: T2tVit = build_small("t2t_vit_14", 5, weights_of(later)).network
    assert again.attention_scale.item() == pytest.approx(0.3)
    assert pytest.approx(384**-0.5) == PUBLISHED_SCALE


def test_t2t_vit_14_has_the_names_and_shapes_of_the_authors_file() -> None:
    state = published_state("t2t_vit_14")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["pos_embed"] == (1, 197, 384)
    assert shapes["tokens_to_token.attention1.w"] == (32, 64)
    assert shapes["tokens_to_token.attention1.kqv.weight"] == (192, 147)
    assert shapes["tokens_to_token.attention2.mlp.2.bias"] == (64,)
    assert shapes["tokens_to_token.attention2.norm1.weight"] == (576,)
    assert shapes["tokens_to_token.project.weight"] == (384, 576)
    assert shapes["blocks.13.attn.qkv.weight"] == (1152, 384)
    assert "blocks.13.attn.qkv.bias" not in shapes
    assert shapes["blocks.13.mlp.fc1.weight"] == (1152, 384)
    assert shapes["head.bias"] == (1000,)


def test_t2t_positions_of_another_image_size_are_resampled() -> None:
    state = random_state(build_small("t2t_vit_14", 5, None).network)
    ramp = torch.linspace(0, 1, 4)[None, :, None].expand(4, 4, 16).reshape(1, 16, 16)
    state["pos_embed"] = torch.cat([torch.full((1, 1, 16), 9.0), ramp], dim=1)
    found = build_small("t2t_vit_14", 5, weights_of(state), image_size=(64, 128)).network
    assert found.pos_embed.shape == (1, 1 + 4 * 8, 16)
    assert torch.equal(found.pos_embed[:, 0], state["pos_embed"][:, 0])
    rows = found.pos_embed[0, 1:].reshape(4, 8, 16)
    assert torch.allclose(rows[0], rows[3])
    assert (rows[0].diff(dim=0) > 0).all()


def test_files_of_weights_are_read_and_unknown_names_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(random_state(build_small(VIT, 5, None).network), path)
    weights = load_classifier_weights(VIT, str(path))
    assert weights.source == str(path)
    assert len(weights.sha256) == 64
    with pytest.raises(ConfigError, match="did you mean"):
        load_classifier_weights("vit_tny_patch16_224", str(path))


def test_names_are_fetched_from_where_they_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    asked: list[tuple[Any, ...]] = []

    def fetch(*wanted: Any) -> Path:
        asked.append(wanted)
        return path

    monkeypatch.setattr(model_options, "fetch_from_hub", fetch)
    monkeypatch.setattr(model_options, "fetch_url", fetch)
    load_classifier_weights("cvt_13", None)
    load_classifier_weights("t2t_vit_14", None)
    assert asked[0] == ("cvt_13", "microsoft/cvt-13", None)
    assert asked[1][1].endswith("/81.5_T2T_ViT_14.pth.tar")
    with pytest.raises(WeightsError, match="cvt_13_paper"):
        load_classifier_weights("cvt_13_paper", None)
