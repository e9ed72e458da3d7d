"""A head on disk: bit for bit what was fitted, and nothing that is damaged or another's."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pipeline.config.labelling import ResolvedBackbone
from pipeline.errors import DataError, WeightsError
from pipeline.labelling.saved_head import (
    HeadRecord,
    encode_head,
    read_head,
    require_same_features,
)
from pipeline.localization.head import Head
from pipeline.storage import Location

HEAD = Head(np.random.default_rng(0).normal(size=192), 0.123456789012345, -1 / 3, 0.25)


def write(folder: Path, data: bytes, **changed: Any) -> Location:
    record = HeadRecord(
        run_id="r",
        created_at="2026-01-02T00:00:00+00:00",
        config={
            "backbone.name": "vit_tiny_patch16_224",
            "backbone.feature": "value",
            "backbone.block": 5,
            "backbone.normalize": "half",
            "backbone.weights_sha256": "abc",
        },
        head_sha256=hashlib.sha256(data).hexdigest(),
        num_images=100,
        num_cut=99,
        share=0.25,
        auc=0.9,
        agreement=0.5,
        border=0.2,
        changes=(0.1,),
        refused=None,
        collection={},
        versions={},
    )
    folder.mkdir(exist_ok=True)
    (folder / "head.safetensors").write_bytes(data)
    content = record.model_dump(mode="json") | changed
    (folder / "config.json").write_text(json.dumps(content))
    return Location.parse(str(folder))


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path: Path) -> None:
    found, record = read_head(write(tmp_path / "head", encode_head(HEAD)))
    assert found.weight_D.tobytes() == HEAD.weight_D.tobytes()
    assert (found.bias, found.threshold, found.share) == (HEAD.bias, HEAD.threshold, HEAD.share)
    assert record.refused is None


def test_a_reason_in_anybodys_file_is_printed_without_what_a_terminal_obeys(
    tmp_path: Path,
) -> None:
    place = write(tmp_path / "head", encode_head(HEAD), refused="bad \x1b[2J\nhead" + "x" * 999)
    _, record = read_head(place)
    assert record.refused is not None
    assert record.refused.isprintable()
    assert len(record.refused) == 300


def test_a_folder_without_a_head_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json.*jobs/fit_head\.py"):
        read_head(Location.parse(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not json", "cannot be read"),
        (b"[1, 2]", "does not describe a head"),
        (b'{"kind": "backbone"}', "does not describe a head"),
        (b'{"kind": "head", "schema_version": 99}', "version 99"),
        (b'{"kind": "head", "schema_version": 1}', "damaged"),
    ],
)
def test_a_record_of_something_else_is_one_line(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    place = write(tmp_path / "head", encode_head(HEAD))
    (tmp_path / "head" / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=reason) as fault:
        read_head(place)
    assert "\n" not in str(fault.value)


def test_another_heads_numbers_beside_the_record_are_refused(tmp_path: Path) -> None:
    place = write(tmp_path / "head", encode_head(HEAD))
    (tmp_path / "head" / "head.safetensors").write_bytes(
        encode_head(Head(HEAD.weight_D + 1, 0.0, 0.0, 0.5))
    )
    with pytest.raises(WeightsError, match="another sha256"):
        read_head(place)
    (tmp_path / "head" / "head.safetensors").unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        read_head(place)


def tensors(**changed: Any) -> bytes:
    values = {"weight": HEAD.weight_D, "bias": 0.0, "threshold": 0.0, "share": 0.5} | changed
    return safetensors.numpy.save({name: np.asarray(value) for name, value in values.items()})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 100,
        encode_head(HEAD)[:-8],
        safetensors.numpy.save({"weight": HEAD.weight_D}),
        tensors(bias=np.zeros(3)),
        tensors(weight=np.full(192, np.nan)),
        tensors(threshold=np.inf),
        tensors(weight=np.zeros((2, 3))),
    ],
)
def test_numbers_that_are_no_head_are_refused_though_the_record_agrees(
    tmp_path: Path, data: bytes
) -> None:
    with pytest.raises(WeightsError) as fault:
        read_head(write(tmp_path / "head", data))
    assert "\n" not in str(fault.value)


OWN = ResolvedBackbone(name="vit_tiny_patch16_224", feature="value", block=5, normalize="half")


def test_the_features_it_was_fitted_on_are_let_pass(tmp_path: Path) -> None:
    _, record = read_head(write(tmp_path / "head", encode_head(HEAD)))
    require_same_features(record, OWN, "abc")


@pytest.mark.parametrize(
    ("other", "sha256", "told"),
    [
        ({"feature": "key"}, "abc", "feature 'value' then, 'key' now"),
        ({"block": 6}, "abc", "block 5 then, 6 now"),
        ({"normalize": "imagenet"}, "abc", "normalize"),
        ({}, "abd", "weights_sha256"),
    ],
)
def test_other_features_are_refused_and_told(
    tmp_path: Path, other: dict[str, Any], sha256: str, told: str
) -> None:
    _, record = read_head(write(tmp_path / "head", encode_head(HEAD)))
    with pytest.raises(WeightsError, match=told):
        require_same_features(record, OWN.model_copy(update=other), sha256)
