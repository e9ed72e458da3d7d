"""What --export and --no-onnx of a detector's job write."""

import importlib.util
from pathlib import Path

import pytest

from pipeline.cluster.train_detector import train_detector
from pipeline.detection.exported_detector import load_detector
from tests.detection.runs import a_job, write_material


@pytest.mark.slow
def test_a_finished_run_can_be_exported_with_and_without_onnx(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    material, export = write_material(tmp_path), tmp_path / "export"
    runs = tmp_path / "runs"
    assert train_detector(a_job(material, runs)) == 0
    assert not export.exists()
    told = a_job(material, runs, export=str(export), onnx=False)
    assert train_detector(told) == 0
    assert sorted(one.name for one in export.iterdir()) == ["config.json", "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        assert (export / name).read_bytes() == (runs / name).read_bytes()
    assert len(load_detector(str(export)).predict(material.photos()[0])) > 0
    assert f"exported {export}" in capsys.readouterr().out
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed: pip install patchseed[export]")
    assert train_detector(a_job(material, runs, export=str(export))) == 0
    assert (export / "model.onnx").exists()
    assert f"exported {export / 'model.onnx'}: " in capsys.readouterr().out
