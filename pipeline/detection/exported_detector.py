"""A trained detector as two files: ``model.safetensors`` and ``config.json``.

    load_detector("OUT").predict("cat.jpg")  # Detections: boxes_D4 xyxy, scores_D, labels_D

To tell more of a detector: a key in ``write_detector``.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from pipeline.detection.box_loader import SeenSize
from pipeline.detection.detector import Detector, build_detector
from pipeline.detection.options import DetectorOptions
from pipeline.detection.predictor import Predictor
from pipeline.errors import ConfigError, StorageError, WeightsError, one_line
from pipeline.storage import Location

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_KIND = "detector"


def write_detector(
    detector: Detector,
    folder: Location,
    *,
    size: SeenSize,
    classes: Sequence[str],
    made_by: dict[str, Any],
) -> None:
    """Write both files; ``config.json`` comes last, so where it is the weights are whole.

    Args:
        detector: with the statistics that it is to detect with.
        folder: where to.
        size: at which it is to see images.
        classes: names of the labels 1, 2, ...
        made_by: what JSON can hold of the run, its settings, data and versions.

    Raises:
        StorageError: the folder cannot be written.
    """
    state = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in detector.state_dict().items()
    }
    content = safetensors.torch.save(state, metadata={"format": "pt"})
    config = {
        "kind": _KIND,
        "options": dataclasses.asdict(detector.options),
        "size": dataclasses.asdict(size),
        "classes": list(classes),
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(content).hexdigest()},
        "made_by": made_by,
    }
    folder.child(WEIGHTS).write_bytes(content)
    folder.child(CONFIG).write_bytes(json.dumps(config, indent=1, ensure_ascii=False).encode())


@dataclasses.dataclass(frozen=True, eq=False)
class StoredDetector:
    """What lies in a detector's folder."""

    detector: Detector
    size: SeenSize
    classes: tuple[str, ...]
    sha256: str
    """Of the weights."""

    made_by: dict[str, Any]
    """What ``write_detector`` was told of the run."""


def read_detector(
    folder: Location, *, score_threshold: float | None = None, max_detections: int | None = None
) -> StoredDetector:
    """The detector of a folder, on the CPU, as it was written.

    Args:
        folder: where it lies.
        score_threshold: detections below this are not told; None is the detector's own.
        max_detections: boxes per image at most; None is the detector's own.

    Raises:
        WeightsError: there is none, it is damaged, or this version builds another one.
    """
    try:
        config = json.loads(folder.child(CONFIG).read_bytes())
        if config.get("kind") != _KIND:
            raise ValueError(f"kind is {config.get('kind')!r}")
        content = folder.child(WEIGHTS).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != config["weights"]["sha256"]:
            raise ValueError(f"{WEIGHTS} has another sha256 than {CONFIG} says")
        limits = {"score_threshold": score_threshold, "max_detections": max_detections}
        given = {name: value for name, value in limits.items() if value is not None}
        detector = build_detector(DetectorOptions(**config["options"] | given))
        detector.load_state_dict(safetensors.torch.load(content))
        return StoredDetector(
            detector,
            SeenSize(**config["size"]),
            tuple(config["classes"]),
            sha256,
            config["made_by"],
        )
    except (OSError, StorageError, SafetensorError) as fault:
        reason = one_line(fault, 160)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ConfigError) as fault:
        reason = one_line(fault, 160)
    raise WeightsError(
        f"{folder} holds no detector that can be read ({reason}); give a folder that "
        "jobs/train_detector.py wrote"
    )


def load_detector(path: str, device: str = "cpu") -> Predictor:
    """The detector of a folder, ready to be asked.

    Raises:
        ConfigError: the path is none we can read.
        WeightsError: as ``read_detector``.
    """
    stored = read_detector(Location.parse(path))
    return Predictor(stored.detector.to(torch.device(device)), stored.size)
