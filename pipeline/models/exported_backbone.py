"""A trained backbone as two files: weights under timm's names, and ``config.json`` beside them.

The folder is one that timm itself loads (``timm.create_model("local-dir:FOLDER")``); what timm does
not ask for lies under ``patchseed``: our name of the network, the file's hash, and how it was made.

To tell more of a backbone: a key in ``write_backbone``.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import ConfigError, WeightsError
from pipeline.models.checkpoints import file_sha256
from pipeline.models.features import NORMALIZATIONS
from pipeline.models.model_options import STANDARD_SIDE
from pipeline.models.published_weights import architecture
from pipeline.storage import Location

WEIGHTS, CONFIG = "teacher.safetensors", "config.json"
"""The two files."""


def write_backbone(
    state: dict[str, Tensor],
    folder: Location,
    *,
    name: str,
    made_by: dict[str, Any],
    half: bool = False,
) -> None:
    """Write both files; ``config.json`` comes last, so where it is the weights are whole.

    Args:
        state: The tensors of a plain ViT without a head, under timm's names.
        folder: Where to.
        name: The network, as ``build_vit`` takes it.
        made_by: What JSON can hold of the run, its settings, data and versions.
        half: Write 16-bit floats.

    Raises:
        StorageError: the folder cannot be written.
    """
    kept = {tensor_name: _kept(tensor, half) for tensor_name, tensor in state.items()}
    content = safetensors.torch.save(kept, metadata={"format": "pt"})
    timm_name, arguments = architecture(name.partition(".")[0])
    mean, std = NORMALIZATIONS["imagenet"]
    side = arguments.get("img_size", STANDARD_SIDE)
    config = {
        "architecture": timm_name,
        "num_classes": 0,
        "num_features": int(state["pos_embed"].shape[-1]),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "mean": mean,
            "std": std,
            "interpolation": "bicubic",
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "patchseed": {
            "kind": "backbone",
            "name": name.partition(".")[0],
            "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(content).hexdigest()},
            "made_by": made_by,
        },
    }
    folder.child(WEIGHTS).write_bytes(content)
    folder.child(CONFIG).write_bytes(json.dumps(config, indent=1, ensure_ascii=False).encode())


def network_of_checkpoint(name: str, checkpoint: str | None, *, default: str) -> str:
    """The network to build: what the file of weights says it belongs to, else ``name``.

    Args:
        name: The network asked for.
        checkpoint: The file of weights; None is the published one.
        default: What ``name`` is where nobody asked.

    Raises:
        ConfigError: another network was asked for than the file's.
    """
    said = None if checkpoint is None else name_beside(Path(checkpoint))
    if said is None or said == name:
        return name
    if name != default:
        raise ConfigError(
            f"{checkpoint} holds weights of {said} as config.json beside it says, got "
            f"--backbone.name {name}; leave it out"
        )
    return said


def name_beside(checkpoint: Path) -> str | None:
    """The network whose weights this file holds, as ``config.json`` beside it says; else None.

    Raises:
        WeightsError: it speaks of a file of this name, but not of this one.
    """
    try:
        described = json.loads((checkpoint.parent / CONFIG).read_bytes())["patchseed"]
        name, weights = str(described["name"]), described["weights"]
        if weights["file"] != checkpoint.name:
            return None
        expected = str(weights["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        # There is none, or it is another program's.
        return None
    if file_sha256(checkpoint) != expected:
        raise WeightsError(
            f"{checkpoint} is not the file that {CONFIG} beside it describes (another sha256); "
            "fetch both anew, or delete that file and give --backbone.name"
        )
    return name


def _kept(tensor: Tensor, half: bool) -> Tensor:
    dtype = torch.float16 if half and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
