import argparse
import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import WeightsError
from pipeline.models.checkpoints import file_sha256, fit_state_dict, patch_side, read_state_dict

STATE = {"cls_token": torch.arange(6.0).reshape(1, 1, 6), "norm.weight": torch.ones(6)}


def save(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_is_state(found: dict[str, Tensor]) -> None:
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin"])
def test_torch_files_are_read(tmp_path: Path, ending: str) -> None:
    assert_is_state(read_state_dict(save(STATE, tmp_path / f"weights{ending}")))


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "weights.safetensors")
    assert_is_state(read_state_dict(tmp_path / "weights.safetensors"))


def test_files_of_before_torch_1_6_are_read(tmp_path: Path) -> None:
    path = save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_is_state(read_state_dict(path))


@pytest.mark.parametrize(
    "wrapped",
    [
        {"model": STATE},
        {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
        {"epoch": 3, "model": {"state_dict": STATE}},
        {f"module.backbone.{name}": tensor for name, tensor in STATE.items()},
        {**STATE, "epoch": 3},
    ],
)
def test_training_checkpoints_are_unwrapped(tmp_path: Path, wrapped: dict[str, Any]) -> None:
    assert_is_state(read_state_dict(save(wrapped, tmp_path / "weights.pth")))


def test_dinos_full_checkpoint_gives_the_teacher(tmp_path: Path) -> None:
    checkpoint = {
        "student": {f"module.backbone.{name}": -tensor for name, tensor in STATE.items()},
        "teacher": {f"backbone.{name}": tensor for name, tensor in STATE.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
    }
    assert_is_state(read_state_dict(save(checkpoint, tmp_path / "checkpoint.pth")))


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_never_run(tmp_path: Path, zipped: bool) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "evil.pth"
    torch.save({**STATE, "x": Malicious(canary)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"evil\.pth .*nothing in it was run"):
        read_state_dict(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the file would not have shown anything"


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "plain.pt"
    path.write_bytes(pickle.dumps(Malicious(canary)))
    with pytest.raises(WeightsError, match=r"plain\.pt"):
        read_state_dict(path)
    assert not canary.exists()


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "start",
    [
        "<!DOCTYPE html><html>404</html>",
        "\n <html>",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0",
    ],
)
def test_a_web_page_in_place_of_weights_is_told(tmp_path: Path, ending: str, start: str) -> None:
    path = tmp_path / f"weights{ending}"
    path.write_text(start)
    with pytest.raises(WeightsError, match="is a web page or a Git LFS pointer"):
        read_state_dict(path)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_one_weights_error(tmp_path: Path, ending: str, kept: float) -> None:
    path = tmp_path / f"weights{ending}"
    if ending == ".pth":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(WeightsError, match=rf"weights\{ending}") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["missing.pth", "missing.safetensors", "weights.npz", "folder.pth"]
)
def test_files_that_cannot_be_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "weights.npz").write_bytes(b"PK")
    with pytest.raises(WeightsError, match=name):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, [torch.ones(2)], {"epoch": 3}, torch.ones(3)]
)
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(WeightsError, match="holds no tensors by name"):
        read_state_dict(save(content, tmp_path / "weights.pth"))


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"bytes")
    assert file_sha256(path) == hashlib.sha256(b"bytes").hexdigest()
    with pytest.raises(WeightsError, match="cannot read"):
        file_sha256(tmp_path / "missing.pth")


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_weights_are_copied_and_heads_dropped() -> None:
    source, target = network(), network()
    state = {**source.state_dict(), "fc.weight": torch.ones(2), "head.mlp.0.bias": torch.ones(1)}
    fit_state_dict(target, state, "file")
    assert all(torch.equal(target.state_dict()[k], v) for k, v in source.state_dict().items())


def test_a_head_the_network_has_is_loaded() -> None:
    target = nn.ModuleDict({"head": nn.Linear(2, 2)})
    state = {"head.weight": torch.full((2, 2), 7.0), "head.bias": torch.full((2,), 8.0)}
    fit_state_dict(target, state, "file")
    assert torch.equal(target.state_dict()["head.weight"], state["head.weight"])


def test_counters_of_batch_norm_may_be_missing() -> None:
    state = {k: v for k, v in network().state_dict().items() if "num_batches" not in k}
    fit_state_dict(network(), state, "file")


def test_a_misfit_tells_counts_names_and_shapes_and_changes_nothing() -> None:
    target = network()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = {
        "0.weight": torch.ones(4, 3, 5, 5),
        "0.bias": torch.full((4,), 9.0),
        "other": torch.ones(1),
    }
    with pytest.raises(WeightsError) as caught:
        fit_state_dict(target, state, "file.pth")
    message = str(caught.value)
    assert message.startswith(
        "file.pth does not fit the network: 4 missing (1.bias, 1.running_mean, "
    )
    assert "1 unexpected (other)" in message
    assert "0.weight expected (4, 3, 3, 3) found (4, 3, 5, 5)" in message
    assert "--backbone.name" in message
    assert "\n" not in message
    assert all(torch.equal(target.state_dict()[name], before[name]) for name in before)


def test_weights_that_are_not_finite_are_refused() -> None:
    state = network().state_dict()
    state["0.bias"][1] = float("nan")
    with pytest.raises(WeightsError, match=r"not finite in 1 tensors \(0\.bias\)"):
        fit_state_dict(network(), state, "file")


def test_patch_side_is_that_of_the_patch_convolution() -> None:
    assert patch_side({"patch_embed.proj.weight": torch.ones(4, 3, 14, 14)}) == 14
    assert patch_side({"conv1.weight": torch.ones(4, 3, 7, 7)}) is None
