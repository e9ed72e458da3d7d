"""A backbone that we write is one that timm and our own jobs load without being told what it is."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from pipeline.errors import WeightsError
from pipeline.models.backbones import build_backbone, build_vit, load_weights
from pipeline.models.checkpoints import file_sha256
from pipeline.models.exported_backbone import CONFIG, WEIGHTS, name_beside, write_backbone
from pipeline.storage import Location

NAMES = ["vit_nano_patch8", "vit_tiny_patch16"]


def write(name: str, folder: Path, half: bool = False) -> torch.nn.Module:
    torch.manual_seed(3)
    vit = build_vit(name)
    torch.nn.init.normal_(vit.get_parameter("cls_token"))
    place = Location.parse(str(folder))
    write_backbone(vit.state_dict(), place, name=name, made_by={"seed": 3}, half=half)
    return vit.eval()


@pytest.mark.parametrize("name", NAMES)
def test_timm_loads_the_folder_by_itself(name: str, tmp_path: Path) -> None:
    ours = write(name, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    side = theirs.patch_embed.img_size[0]
    images_B3HW = torch.randn(2, 3, side, side)
    torch.testing.assert_close(theirs(images_B3HW), ours(images_B3HW), rtol=0, atol=0)
    assert list(timm.data.resolve_model_data_config(theirs)["input_size"]) == [3, side, side]


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_says_which_network_it_is(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    said = name_beside(tmp_path / WEIGHTS)
    assert said == name.partition(".")[0]
    weights = load_weights(said, str(tmp_path / WEIGHTS))
    build_backbone(said, weights)
    config = json.loads((tmp_path / CONFIG).read_text())["patchseed"]
    assert config["weights"]["sha256"] == file_sha256(tmp_path / WEIGHTS)
    assert config["made_by"] == {"seed": 3}


def test_half_precision_is_half_the_size_and_rounds_to_its_last_bit(tmp_path: Path) -> None:
    vit = write("vit_nano_patch8", tmp_path / "whole")
    write("vit_nano_patch8", tmp_path / "half", half=True)
    sizes = [(tmp_path / kind / WEIGHTS).stat().st_size for kind in ("half", "whole")]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.01)
    for name, tensor in load_file(tmp_path / "half" / WEIGHTS).items():
        assert torch.equal(tensor, vit.state_dict()[name].half())
    build_backbone(
        "vit_nano_patch8", load_weights("vit_nano_patch8", str(tmp_path / "half" / WEIGHTS))
    )


def test_other_weights_beside_the_config_are_refused(tmp_path: Path) -> None:
    write("vit_nano_patch8", tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"another sha256"):
        name_beside(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    "content", [b"{}", b"[1]", b"no json", b'{"patchseed": {"weights": {"file": "other.pth"}}}']
)
def test_a_config_of_another_program_says_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    assert name_beside(tmp_path / WEIGHTS) is None
    assert name_beside(tmp_path / "elsewhere" / WEIGHTS) is None
