"""Files of weights: read without running what is in them, and fitted without silence.

To accept another container (a training framework's checkpoint): add the key its weights lie under
to ``_CONTAINERS``, or the prefix its names carry to ``_PREFIXES``.
"""

import argparse
import hashlib
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import WeightsError, one_line

PICKLED = (".pth", ".pt", ".bin", ".tar")
"""Endings of files written by ``torch.save`` (``.pth.tar`` is no tar); read with
``weights_only=True``."""

# Where training code puts the weights in its checkpoints, best first: DINO's teacher is the network
# that is evaluated and published, as is the running average (EMA) of timm's trainer and T2T-ViT's.
_CONTAINERS = ("teacher", "student", "state_dict_ema", "state_dict", "model")
_PREFIXES = ("module.", "backbone.")
_HEADS = ("head.", "head_dist.", "fc.", "classifier.", "pre_logits.")
_OPTIONAL = ".num_batches_tracked"
_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Weights:
    """Tensors by name on the CPU, the sha256 of the file they came from, and where that was."""

    state_dict: dict[str, Tensor] = field(repr=False)
    sha256: str
    source: str


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors by name in a ``.safetensors`` or ``PICKLED`` file, on the CPU.

    Checkpoints of training runs are unwrapped (``teacher`` before ``student``, ``state_dict_ema``,
    ``state_dict``, ``model``) and the prefixes of wrappers (``module.``, ``backbone.``) taken off.
    No code in the file is run.

    Raises:
        WeightsError: the file is missing, damaged, no file of weights, or wants to run code.
    """
    if path.suffix not in (".safetensors", *PICKLED):
        endings = ", ".join((".safetensors", *PICKLED))
        raise WeightsError(f"a file of weights must end in one of {endings}, got {path}")
    try:
        start = _first_bytes(path)
        if start.lstrip().startswith((b"<", b"version https://git-lfs")):
            raise WeightsError(
                f"{path} is a web page or a Git LFS pointer, not weights; download the file itself"
            )
        content: Any = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except WeightsError:
        raise
    except Exception as fault:  # the unpickler passes on whatever damaged bytes bring about
        raise WeightsError(
            f"{path} cannot be read as weights ({type(fault).__name__}: {one_line(fault, 160)}); "
            "check the path or fetch it anew"
        ) from fault
    return _named_tensors(content, path)


def file_sha256(path: Path) -> str:
    """The file's sha256 in hex.

    Raises:
        WeightsError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as fault:
        raise WeightsError(f"cannot read {path}: {one_line(fault)}; check the path") from fault


def fit_state_dict(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``module``, name by name; weights of heads the module lacks are left out.

    Args:
        module: The network, changed in place.
        state: Tensors by name, as ``read_state_dict`` gives them.
        source: Where they come from, for the message.

    Raises:
        WeightsError: a tensor is missing, has no place, has another shape, or is not finite; the
            module is untouched then.
    """
    expected = module.state_dict()
    found = {
        name: tensor
        for name, tensor in state.items()
        if name in expected or not name.startswith(_HEADS)
    }
    missing = sorted(
        name for name in expected if name not in found and not name.endswith(_OPTIONAL)
    )
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        name for name in expected if name in found and found[name].shape != expected[name].shape
    ]
    if missing or unexpected or misshapen:
        faults = [
            _patch_fault(expected, found),
            _list_fault("missing", missing),
            _list_fault("unexpected", unexpected),
            _shape_fault(misshapen, expected, found),
        ]
        raise WeightsError(
            f"{source} does not fit the network: {'; '.join(filter(None, faults))}. "
            "Give the file of this architecture, or the --backbone.name (training: --model.name) "
            "the file was made for"
        )
    _require_finite(found, source)
    module.load_state_dict(found, strict=False)


def patch_side(state: dict[str, Tensor]) -> int | None:
    """Pixels per patch of a ViT's weights; None where they are no ViT's."""
    kernel = state.get("patch_embed.proj.weight")
    return int(kernel.shape[-1]) if kernel is not None and kernel.ndim == 4 else None


def recognise_vit(state: dict[str, Tensor], source: str) -> tuple[str, bool]:
    """The timm name of the ViT whose weights these are, and whether it was trained on labels.

    Raises:
        WeightsError: they are no ViT-Ti, S or B with patches of 16 or 8 pixels.
    """
    positions, side = state.get("pos_embed"), patch_side(state)
    width = 0 if positions is None else positions.shape[-1]
    size = {192: "tiny", 384: "small", 768: "base"}.get(width)
    if size is None or side not in (8, 16):
        raise WeightsError(
            f"{source} must hold a ViT-Ti, ViT-S or ViT-B with patches of 16 or 8 pixels, got "
            f"width {width} and patches of {side}"
        )
    return f"vit_{size}_patch{side}_224", "head.weight" in state


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(64)


def _unpickle(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain containers."""
    # DINO's full checkpoints carry the command line; a Namespace holds values and runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            # Files of before PyTorch 1.6 are no archives and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as fault:
            raise WeightsError(
                f"{path} is damaged or holds more than weights ({one_line(fault, 120)}); "
                "nothing in it was run. Fetch it anew, or save the state_dict alone"
            ) from fault


def _named_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint under their bare names."""
    while isinstance(content, dict):
        inner = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)), 0)
        if not inner:
            break
        content = inner
    items = content.items() if isinstance(content, dict) else ()
    tensors = {
        _bare(name): tensor.detach()
        for name, tensor in items
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors by name; expected a state_dict, alone or under one of "
            f"{', '.join(_CONTAINERS)}"
        )
    return tensors


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _list_fault(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"


def _shape_fault(
    misshapen: list[str], expected: dict[str, Tensor], found: dict[str, Tensor]
) -> str:
    if not misshapen:
        return ""
    pairs = [
        f"{name} expected {tuple(expected[name].shape)} found {tuple(found[name].shape)}"
        for name in misshapen[:_SHOWN]
    ]
    more = ", ..." if len(misshapen) > _SHOWN else ""
    return f"{len(misshapen)} of another shape ({', '.join(pairs)}{more})"


def _patch_fault(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    ours, theirs = patch_side(expected), patch_side(found)
    if ours is None or theirs is None or ours == theirs:
        return ""
    return (
        f"its patches are {theirs} pixels wide, the network's {ours} (a training job's "
        "--model.patch-size)"
    )


def _require_finite(state: dict[str, Tensor], source: str) -> None:
    bad = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if bad:
        raise WeightsError(
            f"{source} holds values that are not finite in {len(bad)} tensors ({bad[0]}): "
            "the training run diverged; use an earlier checkpoint"
        )
