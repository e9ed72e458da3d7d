"""Classifiers as files: real (narrow) networks, read back by us, by timm and by the labeller."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import create_transform
from torch import nn
from torchvision import transforms

from pipeline.classification.augment import eval_transform
from pipeline.config import AugmentConfig
from pipeline.data.labelled_images import decode_rgb
from pipeline.errors import DataError, WeightsError
from pipeline.models.checkpoints import fit_state_dict, read_state_dict
from pipeline.models.exporting import (
    Preprocessing,
    config_sha256,
    export_classifier,
    load_classifier,
    preprocess,
)
from pipeline.storage import Location
from tests.models.narrow_classifiers import (
    CLASSES,
    DESCRIPTIONS,
    IMAGENET,
    VIT,
    at,
    build,
    describe,
    noise,
    picture,
    recipe,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_classifier(build(DESCRIPTIONS["vit"]), DESCRIPTIONS["vit"], at(folder))
    return folder


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_what_is_loaded_computes_what_was_exported(tmp_path: Path, kind: str) -> None:
    model = build(DESCRIPTIONS[kind])
    random_state = torch.get_rng_state()
    export_classifier(model, DESCRIPTIONS[kind], at(tmp_path))
    loaded = load_classifier(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    # Exporting in the middle of training does not end it.
    assert model.training
    assert not loaded.module.training
    images_B3HW = noise(3, 3, 32, 32)
    expected, found = model.eval()(images_B3HW), loaded.module(images_B3HW)
    assert torch.equal(found.logits_BK, expected.logits_BK)
    for grid, other in zip(found.grids, expected.grids, strict=True):
        assert torch.equal(grid, other)


def test_the_config_says_how_it_was_made_and_comes_back(tmp_path: Path) -> None:
    description = dataclasses.replace(
        DESCRIPTIONS["swin"],
        metrics={"validation/accuracy": 0.5},
        made_by={"command": "train", "config": {"optim.lr": 1e-3}, "seed": 3},
    )
    export_classifier(build(description), description, at(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == "swin_tiny_patch4_window7_224"
    assert (config["num_classes"], config["class_names"]) == (5, list(CLASSES))
    assert config["build"]["patch_size"] == 2
    assert config["preprocessing"]["mean"] == list(IMAGENET[0])
    assert config["made_by"]["config"] == {"optim.lr": 1e-3}
    assert config["versions"].keys() >= {"python", "torch", "timm", "patchseed"}
    loaded = load_classifier(tmp_path).description
    # JSON knows no tuples.
    options = {name: json.loads(json.dumps(value)) for name, value in description.options.items()}
    assert loaded == dataclasses.replace(description, options=options)


def test_the_files_vouch_for_each_other(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    content = (exported / "model.safetensors").read_bytes()
    assert config["weights"]["sha256"] == hashlib.sha256(content).hexdigest()
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", "config_sha256": config_sha256(config)}


def test_only_the_bare_network_is_written(exported: Path) -> None:
    names = load_file(exported / "model.safetensors").keys()
    assert names == build(DESCRIPTIONS["vit"]).network.state_dict().keys()
    assert "patch_embed.proj.weight" in names
    assert not any(name.startswith("network.") for name in names)


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("resnet18", {"channels": (8, 16, 24, 32)}), (VIT, {"embed_dim": 24, "depth": 2})],
)
def test_timm_loads_the_weights_by_itself(
    tmp_path: Path, architecture: str, sizes: dict[str, Any]
) -> None:
    description = describe(architecture, options=sizes)
    model = build(description)
    export_classifier(model, description, at(tmp_path))
    path = str(tmp_path / "model.safetensors")
    network = timm.create_model(architecture, num_classes=5, checkpoint_path=path, **sizes).eval()
    images_B3HW = noise(2, 3, 224, 224)
    assert torch.allclose(network(images_B3HW), model.eval()(images_B3HW).logits_BK, atol=1e-5)


def test_the_labeller_takes_the_weights_as_a_backbone(exported: Path) -> None:
    state = read_state_dict(exported / "model.safetensors")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
    backbone = timm.create_model(VIT, num_classes=0, **sizes)
    fit_state_dict(backbone, state, "exported")
    expected = build(DESCRIPTIONS["vit"]).network.state_dict()
    assert torch.equal(backbone.state_dict()["norm.weight"], expected["norm.weight"])


def test_tied_and_sliced_tensors_are_written_whole(tmp_path: Path) -> None:
    model: Any = build(DESCRIPTIONS["vit"])
    wide = torch.randn(24, 48, generator=torch.Generator().manual_seed(0))
    model.network.blocks[0].attn.proj.weight = nn.Parameter(wide[:, ::2])
    model.network.blocks[1].attn.proj.weight = model.network.blocks[0].attn.proj.weight
    export_classifier(model, DESCRIPTIONS["vit"], at(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["blocks.0.attn.proj.weight"], wide[:, ::2])
    assert torch.equal(state["blocks.1.attn.proj.weight"], wide[:, ::2])


def test_a_diverged_network_is_not_exported(tmp_path: Path) -> None:
    model: Any = build(DESCRIPTIONS["vit"])
    with torch.no_grad():
        model.network.norm.bias[0] = float("nan")
    with pytest.raises(WeightsError, match="not finite"):
        export_classifier(model, DESCRIPTIONS["vit"], at(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [{"classes": CLASSES[:4]}, {"patch_size": 4}, {"options": {"embed_dim": 24, "depth": 3}}],
)
def test_a_description_of_another_network_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    wrong = dataclasses.replace(DESCRIPTIONS["vit"], **changes)
    with pytest.raises(WeightsError, match="the trained network does not fit"):
        export_classifier(build(DESCRIPTIONS["vit"]), wrong, at(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_most_probable_classes_come_first(exported: Path) -> None:
    classifier = load_classifier(str(exported))
    image = picture()
    found = classifier.predict(image, top_k=3)
    logits_BK = classifier.module(preprocess(image, recipe())[None]).logits_BK
    expected = logits_BK.softmax(dim=1)[0].tolist()
    best = sorted(range(5), key=lambda label: -expected[label])[:3]
    assert [line["label"] for line in found] == best
    assert [line["name"] for line in found] == [CLASSES[label] for label in best]
    assert [line["probability"] for line in found] == pytest.approx([expected[k] for k in best])
    assert len(classifier.predict(image)) == 5
    json.dumps(found)


def test_all_kinds_of_inputs_give_the_same(exported: Path, tmp_path: Path) -> None:
    classifier = load_classifier(exported)
    image = picture()
    image.save(tmp_path / "x.png")
    kinds: list[Any] = [image, np.asarray(image), tmp_path / "x.png", str(tmp_path / "x.png")]
    alone = classifier.predict(image)
    assert all(classifier.predict(kind) == alone for kind in kinds)
    for found in classifier.predict(kinds):
        assert [line["label"] for line in found] == [line["label"] for line in alone]
        assert found[0]["probability"] == pytest.approx(alone[0]["probability"], abs=1e-5)
    assert classifier.predict([]) == []


def test_more_images_than_a_batch_are_answered_in_order(exported: Path) -> None:
    classifier = load_classifier(exported)
    images = [picture(seed=seed) for seed in range(35)]
    found = classifier.predict(images, top_k=1)
    assert len(found) == 35
    for position in (0, 31, 32, 34):
        alone = classifier.predict(images[position], top_k=1)[0]
        assert found[position][0]["probability"] == pytest.approx(alone["probability"], abs=1e-5)


@pytest.mark.parametrize("size", [(40, 56), (300, 200), (32, 32), (17, 90), (224, 224)])
@pytest.mark.parametrize(
    ("crop", "normalize", "ours"),
    [
        ("random_resized", "imagenet", recipe()),
        ("random_resized", "half", dataclasses.replace(recipe(), mean=(0.5,) * 3, std=(0.5,) * 3)),
        ("pad", "imagenet", recipe(crop="whole")),
    ],
)
def test_preprocessing_is_that_of_the_evaluation_bit_by_bit(
    crop: Any, normalize: Any, ours: Preprocessing, size: tuple[int, int]
) -> None:
    image = picture(*size)
    config = AugmentConfig(crop=crop, normalize=normalize)
    expected_3HW: Any = eval_transform(config, ours.image_size)(image)
    assert torch.equal(preprocess(image, ours), expected_3HW)


@pytest.mark.parametrize("size", [(40, 56), (300, 200), (32, 32), (17, 90), (224, 224)])
@pytest.mark.parametrize(
    "ours",
    [
        recipe(interpolation="bilinear", crop_pct=0.9),
        Preprocessing(image_size=96, mean=(0.5, 0.5, 0.5), std=(0.25, 0.3, 0.5), crop_pct=1.0),
    ],
)
def test_other_centre_crops_are_timms_bit_by_bit(
    ours: Preprocessing, size: tuple[int, int]
) -> None:
    image = picture(*size)
    timms = create_transform(
        ours.image_size,
        interpolation=ours.interpolation,
        mean=ours.mean,
        std=ours.std,
        crop_pct=ours.crop_pct,
    )
    assert torch.equal(preprocess(image, ours), timms(image))


@pytest.mark.parametrize("size", [(40, 56), (300, 200), (32, 32), (17, 90), (224, 224)])
def test_a_whole_image_may_be_squeezed_with_bilinear_weights(size: tuple[int, int]) -> None:
    image, ours = picture(*size), recipe(crop="whole", interpolation="bilinear")
    squeeze = transforms.Compose(
        [
            transforms.Resize((32, 32), interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.ToTensor(),
            transforms.Normalize(ours.mean, ours.std),
        ]
    )
    assert torch.equal(preprocess(image, ours), squeeze(image))


def test_files_are_decoded_as_in_training(tmp_path: Path) -> None:
    grey_alpha = Image.merge("LA", [picture().convert("L"), picture(seed=1).convert("L")])
    rgba = picture().convert("RGBA")
    rgba.putalpha(picture(seed=1).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "turned.jpg", exif=exif)
    rgba.save(tmp_path / "transparent.png")
    grey_alpha.save(tmp_path / "grey.png")
    picture().convert("P").save(tmp_path / "palette.gif")
    picture().convert("1").save(tmp_path / "bits.png")
    picture().convert("CMYK").save(tmp_path / "print.jpg")
    for path in sorted(tmp_path.iterdir()):
        trained_on = decode_rgb(path.read_bytes(), path.name)
        assert torch.equal(preprocess(path, recipe()), preprocess(trained_on, recipe())), path.name


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        ("missing.png", "missing.png cannot be decoded"),
        (np.zeros((8, 8), np.uint8), r"must be \(h, w, 3\) uint8, got \(8, 8\) uint8"),
        (np.zeros((8, 8, 3), np.float32), r"got \(8, 8, 3\) float32"),
        (Image.new("I;16", (8, 8)), "must have 8 bits a channel, got mode I;16"),
        (b"\x89PNG", "must be a file's name, .* got bytes"),
    ],
)
def test_what_is_no_picture_is_one_line(image: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        preprocess(image, recipe())
    assert "\n" not in str(caught.value)


def copy_of(exported: Path, folder: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((exported / name).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("config.json", None, "config.json is missing: give the folder"),
        ("config.json", b"{", "is not JSON"),
        ("config.json", b"[]", "must be a patchseed-classifier of version 1"),
        ("config.json", b'{"format": "patchseed-classifier", "version": 2}', "version 1, got .*2"),
        ("config.json", b'{"format": "patchseed-classifier", "version": 1}', "is incomplete"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"x", "is damaged or belongs to another config.json"),
    ],
)
def test_damaged_exports_are_refused_in_one_line(
    exported: Path, tmp_path: Path, file: str, content: bytes | None, complaint: str
) -> None:
    copy_of(exported, tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(WeightsError, match=complaint) as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pickle_in_the_place_of_the_weights_is_not_opened(exported: Path, tmp_path: Path) -> None:
    copy_of(exported, tmp_path)
    torch.save({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    content = (tmp_path / "model.safetensors").read_bytes()
    config["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="is no safetensors file"):
        load_classifier(tmp_path)


def test_a_bucket_is_as_good_as_a_disk(s3_bucket: str) -> None:
    model = build(DESCRIPTIONS["vit"])
    export_classifier(model, DESCRIPTIONS["vit"], Location.parse(f"{s3_bucket}/exported"))
    loaded = load_classifier(f"{s3_bucket}/exported")
    images_B3HW = noise(1, 3, 32, 32)
    expected_BK = model.eval()(images_B3HW).logits_BK
    assert torch.equal(loaded.module(images_B3HW).logits_BK, expected_BK)
