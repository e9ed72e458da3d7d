"""Classifiers as ONNX files, run by ONNX Runtime."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, WeightsError
from pipeline.models import onnx_export
from pipeline.models.grid_classifier import LogitsAndGrids
from pipeline.models.onnx_export import export_onnx
from tests.models.narrow_classifiers import (
    DESCRIPTIONS,
    at,
    build,
    noise,
)


@pytest.fixture
def onnxruntime() -> Any:
    """ONNX Runtime, where the extra that an export takes is installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install patchseed[export]")
    return importlib.import_module("onnxruntime")


def test_without_the_extra_an_onnx_export_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "_NEEDED", ("torch", "no_such_package"))
    (tmp_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(ConfigError, match=r"no_such_package is not .*patchseed\[export\]"):
        export_onnx(build(DESCRIPTIONS["vit"]), at(tmp_path), 32)
    assert (tmp_path / "model.onnx").read_bytes() == b"old"


@pytest.mark.slow
@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_the_onnx_file_gives_the_networks_logits(
    tmp_path: Path, kind: str, onnxruntime: Any
) -> None:
    model = build(DESCRIPTIONS[kind])
    check = export_onnx(model, at(tmp_path), 32)
    assert model.training
    assert check.relative_difference < 1e-4
    content = (tmp_path / "model.onnx").read_bytes()
    assert check.sha256 == hashlib.sha256(content).hexdigest()
    assert [place.name for place in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits"]
    # Another number of images than the ones that were checked.
    images_B3HW = noise(5, 3, 32, 32, seed=1)
    (logits_BK,) = session.run(None, {"images": images_B3HW.numpy()})
    expected_BK = model.eval()(images_B3HW).logits_BK.detach()
    largest = float(expected_BK.abs().max())
    assert torch.allclose(torch.from_numpy(logits_BK), expected_BK, rtol=0, atol=1e-4 * largest)


class Fickle(nn.Module):
    """Gives something else once it was traced."""

    def forward(self, images: Tensor) -> LogitsAndGrids:
        rows = images.mean(dim=(2, 3))
        return LogitsAndGrids(rows if torch.compiler.is_exporting() else rows * 1.001, ())


class OnlyPairs(nn.Module):
    """Can be traced for one number of images alone."""

    def forward(self, images: Tensor) -> LogitsAndGrids:
        rows = images.mean(dim=(2, 3))
        return LogitsAndGrids(rows * len(rows.tolist()), ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (Fickle(), r"model\.onnx was not written: its logits are off by up to"),
        (OnlyPairs(), "the network cannot be exported to ONNX"),
    ],
)
def test_an_onnx_file_that_is_not_right_is_not_left_behind(
    tmp_path: Path, model: nn.Module, complaint: str, onnxruntime: Any
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"of an earlier export")
    with pytest.raises(WeightsError, match=complaint) as caught:
        export_onnx(model, at(tmp_path), 32)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
