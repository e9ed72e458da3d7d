"""The whole command: its files, what it prints, its exit codes."""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from pipeline.storage import Location
from tests.conftest import ROOT
from tests.jobs.conftest import run_script
from tests.jobs.here import run_here
from tests.tables import Row, label_row, write_table

JOB = ROOT / "jobs" / "draw_boxes.py"
HOSTILE = "..\\..\\" + 150 * "x" + "\nü<.png"

run = partial(run_here, JOB)


def row(path: Path) -> Row:
    found = {"boxes": [[8.0, 8.0, 40.0, 40.0]], "scores": [0.5], "labels": [1], "method": "lost"}
    seed = {"seed_xy": [16.0, 16.0], "seed_degree": 3}
    image_id = hashlib.sha256(str(path).encode()).hexdigest()
    return label_row(image_id, uri=str(path), width=64, height=48, **(found | seed))


def make_table(folder: Path, images: list[Path], sha256: str) -> Location:
    """A table as the labelling job leaves it, of images that are made here."""
    for number, path in enumerate(images):
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3))
        Image.fromarray(noise.astype(np.uint8)).save(path, "PNG")
    config = {"localization.rule": "lost", "backbone.name": "vit_tiny_patch16_224"}
    return write_table(folder, list(map(row, images)), config=config, weights_sha256=sha256)


def test_pictures_with_maps_and_a_sheet_are_drawn_and_named(tmp_path: Path) -> None:
    weights = tmp_path / "tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), weights)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    images = [tmp_path / "photos" / name for name in ("cat.png", HOSTILE)]
    labels = make_table(tmp_path / "labels", images, sha256)
    out = tmp_path / "deep" / "out"
    result = run("--labels", labels, "--output", out, "--checkpoint", weights)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert f"pictures and contact_sheet.png are in {out}" in result.stdout
    cut = f"0001-{100 * 'x'}.jpg"
    assert sorted(path.name for path in out.iterdir()) == [cut, "0002-cat.jpg", "contact_sheet.png"]
    for path in out.iterdir():
        with Image.open(path) as picture:
            picture.load()
            assert path.suffix == ".png" or picture.width > 5 * 400
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "deep",
        "labels",
        "photos",
        "tiny.safetensors",
    ]


@pytest.mark.slow
def test_without_weights_there_are_boxes_one_warning_and_exit_code_0(tmp_path: Path) -> None:
    labels = make_table(tmp_path / "labels", [tmp_path / "photos" / "cat.png"], 64 * "0")
    out = tmp_path / "out"
    # The hub's client reads its environment once per process.
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    result = run_script(JOB, "--labels", labels, "--output", out, **hub)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("no maps, only boxes and seeds: ")
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in out.iterdir()) == ["0001-cat.jpg", "contact_sheet.png"]


def test_a_folder_that_is_no_table_is_one_line_and_exit_code_3(tmp_path: Path) -> None:
    result = run("--labels", tmp_path, "--output", tmp_path / "out")
    assert result.returncode == 3
    assert result.stderr.startswith("DataError: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
