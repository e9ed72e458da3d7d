"""A fitted head as two files: its numbers, and ``config.json`` beside them, written last.

A head is worth something on the features it was fitted on and on no others, so the record names
the weights and where in the network they were taken, and who uses it asks first.
"""

import hashlib
import json
from typing import Any

import numpy as np
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError

from pipeline.config import BackboneConfig
from pipeline.errors import DataError, WeightsError, one_line
from pipeline.labelling.run import HEAD_CONFIG, HEAD_WEIGHTS
from pipeline.localization.head import Head
from pipeline.storage import Location

SCHEMA_VERSION = 1


class HeadRecord(BaseModel):
    """How a head was made, and what speaks for it; ``config.json``."""

    model_config = ConfigDict(frozen=True)
    schema_version: int = SCHEMA_VERSION
    kind: str = "head"
    run_id: str
    created_at: str
    config: dict[str, Any]
    """Flat, with the backbone, its weights' sha256, the images, the rounds."""
    head_sha256: str
    """Of head.safetensors."""
    num_images: int
    """Of the sample."""
    num_cut: int
    """Of them, those that have a cut and were fitted on."""
    share: float
    auc: float
    agreement: float
    border: float
    changes: tuple[float, ...]
    refused: str | None
    """Why it would rather ruin boxes than better them; None where nothing says so."""
    collection: dict[str, Any]
    """What listing the images met."""
    versions: dict[str, str]

    @field_validator("refused")
    @classmethod
    def _shown_as_it_is(cls, text: str | None) -> str | None:
        """It is printed, and the file may be anybody's."""
        if text is None:
            return None
        return one_line("".join(letter if letter.isprintable() else " " for letter in text))


def encode_head(head: Head) -> bytes:
    """The bytes of head.safetensors: float64, as they were computed."""
    numbers = {"bias": head.bias, "threshold": head.threshold, "share": head.share}
    tensors = {name: np.array(value, np.float64) for name, value in numbers.items()}
    return safetensors.numpy.save({"weight": head.weight_D, **tensors}, {"format": "np"})


def read_head(place: Location) -> tuple[Head, HeadRecord]:
    """The head that a run of fit_head.py wrote.

    Args:
        place: its folder.

    Raises:
        DataError: there is none, or its record is damaged.
        WeightsError: its numbers are not those of the record.
    """
    record = _read_record(place)
    weights = place.child(HEAD_WEIGHTS)
    try:
        data = weights.read_bytes()
    except OSError as fault:
        raise WeightsError(f"{weights} cannot be read: {one_line(fault)}") from fault
    if hashlib.sha256(data).hexdigest() != record.head_sha256:
        raise WeightsError(
            f"{weights} is not the head that {HEAD_CONFIG} beside it describes (another sha256): "
            "fit it again with jobs/fit_head.py"
        )
    try:
        tensors = safetensors.numpy.load(data)
        weight_D = tensors["weight"]
        bias, threshold, share = (float(tensors[name]) for name in ("bias", "threshold", "share"))
    except (SafetensorError, KeyError, TypeError, ValueError) as fault:
        raise WeightsError(f"{weights} holds no head: {one_line(fault)}") from fault
    if weight_D.ndim != 1 or not np.isfinite([*weight_D.flat, bias, threshold]).all():
        raise WeightsError(f"{weights} must hold finite numbers, one per channel, and does not")
    return Head(weight_D.astype(np.float64), bias, threshold, share), record


def require_same_features(record: HeadRecord, backbone: BackboneConfig, sha256: str) -> None:
    """Whether these are the features that the head was fitted on.

    Raises:
        WeightsError: they are others.
    """
    now = backbone.model_dump(mode="json", exclude={"checkpoint"}) | {"weights_sha256": sha256}
    then = {name: record.config.get(f"backbone.{name}") for name in now}
    differing = [
        f"{name} {one_line(repr(then[name]), 80)} then, {now[name]!r} now"
        for name in now
        if then[name] != now[name] and name != "name"
    ]
    if differing:
        raise WeightsError(
            f"the head was fitted on other features: {'; '.join(differing)}. Fit one on these with "
            "jobs/fit_head.py, or leave --localization.head out"
        )


def _read_record(folder: Location) -> HeadRecord:
    place = folder.child(HEAD_CONFIG)
    if place.kind() != "file":
        raise DataError(
            f"{folder} holds no fitted head (no {HEAD_CONFIG}): make one with jobs/fit_head.py, or "
            "finish it with --resume"
        )
    try:
        content = json.loads(place.read_bytes())
    except (OSError, ValueError) as fault:
        raise DataError(f"{place} cannot be read: {one_line(fault)}") from fault
    if not isinstance(content, dict) or content.get("kind") != "head":
        raise DataError(f"{place} does not describe a head of jobs/fit_head.py")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{folder} holds a head of version {one_line(repr(content.get('schema_version')))}, "
            f"this code reads version {SCHEMA_VERSION}: fit it again"
        )
    try:
        return HeadRecord.model_validate(content)
    except ValidationError as fault:
        raise DataError(f"{place} is damaged: {one_line(fault)}") from fault
