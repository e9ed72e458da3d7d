"""A trained classifier as an ONNX file that has been shown to give the network's own logits.

The packages it takes are an extra of ours, ``patchseed[export]``, and are looked for only when an
export is asked for. The network is traced by ``torch.export``, so one whose path depends on pixels
cannot be exported. To write another version of ONNX's operators: change ``OPSET``. To export
another kind of network: ``keep_checked`` with a function that writes it and one that compares.

Shape letters:  B images   H, W rows and columns in pixels   K classes
"""

import copy
import functools
import hashlib
import importlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, WeightsError, one_line
from pipeline.storage import Location

ONNX_NAME = "model.onnx"
OPSET = 18
"""Version of ONNX's operators in the file; runtimes from 2023 on know it."""

TOLERANCE = 1e-4
"""How far a logit may be off, as a share of the largest one."""

BATCHES = (1, 3)
"""Numbers of images the file is tried with; it was traced with another one."""

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_Checked = TypeVar("_Checked")

OnnxRun: TypeAlias = Callable[[dict[str, Tensor]], list[Tensor]]
"""What a file computes: inputs by name to all its outputs."""


@dataclass(frozen=True)
class OnnxCheck:
    """How well the ONNX file agrees with the network it was made from."""

    file: str
    """Where it lies."""

    sha256: str
    opset: int
    batches: tuple[int, ...]
    """Numbers of images that were compared, random ones."""

    max_difference: float
    """The largest difference of a logit, absolute."""

    largest_logit: float
    """What the difference is to be compared with; absolute."""

    @property
    def relative_difference(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.max_difference / self.largest_logit


class _Logits(nn.Module):
    """The classifier without its grids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """``(B, K)`` logits."""
        logits_BK: Tensor = self.model(images).logits_BK
        return logits_BK


def export_onnx(model: nn.Module, folder: Location, image_size: int) -> OnnxCheck:
    """Write ``model.onnx``: ``images`` (B, 3, image_size, image_size) in, ``logits`` (B, K) out.

    B is free. Inputs are normalised as config.json says. The file appears in the folder only after
    ONNX Runtime has given the network's logits with it; one of an earlier export is deleted first.

    Args:
        model: A ``GridClassifier``; it is left as it is.
        folder: Of a disk or a bucket.
        image_size: Side of the input in pixels.

    Raises:
        ConfigError: a package of ``patchseed[export]`` is not installed.
        WeightsError: the network cannot be exported, or the file computes something else.
        StorageError: the folder cannot be written.
    """
    logits = _Logits(copy.deepcopy(model)).cpu().float().eval().requires_grad_(False)

    def check(run: OnnxRun) -> tuple[float, float]:
        difference, largest = _compare(logits, run, image_size)
        # Not "greater than": a NaN must not pass.
        if not difference <= TOLERANCE * largest:
            raise WeightsError(
                f"{ONNX_NAME} was not written: its logits are off by up to {difference:.3g}, "
                f"allowed is {TOLERANCE:g} of the largest, {largest:.3g}; use model.safetensors"
            )
        return difference, largest

    kept, (difference, largest) = keep_checked(
        folder, lambda path: _write(logits, path, image_size), check
    )
    return OnnxCheck(kept.file, kept.sha256, OPSET, BATCHES, difference, largest)


@dataclass(frozen=True)
class KeptFile:
    """An ONNX file that passed its check."""

    file: str
    """Where it lies."""

    sha256: str


def keep_checked(
    folder: Location,
    write: Callable[[Path], None],
    check: Callable[[OnnxRun], _Checked],
) -> tuple[KeptFile, _Checked]:
    """Write ``model.onnx`` into the folder if it passes; one of an earlier export is deleted first.

    Args:
        folder: Of a disk or a bucket.
        write: Writes the file to a path; whatever it complains of becomes one line.
        check: Is given the file as ONNX Runtime runs it, and raises unless it is right.

    Returns:
        The file, and what ``check`` returned.

    Raises:
        ConfigError: a package of ``patchseed[export]`` is not installed.
        WeightsError: the network cannot be exported, or the file not be run.
        StorageError: the folder cannot be written.
    """
    _require_packages()
    place = folder.child(ONNX_NAME)
    place.delete()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / ONNX_NAME
        try:
            with _quietly():
                write(path)
        except Exception as fault:  # whatever tracer, converter and writer complain of
            raise WeightsError(
                f"the network cannot be exported to ONNX ({type(fault).__name__}: "
                f"{one_line(fault, 200)}); use model.safetensors"
            ) from fault
        checked = check(_runner(path))
        content = path.read_bytes()
    place.write_bytes(content)
    return KeptFile(str(place), hashlib.sha256(content).hexdigest()), checked


def _require_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"an ONNX file needs {', '.join(_NEEDED)}, of which {', '.join(missing)} is not "
            "installed: pip install patchseed[export]"
        )


def _write(logits: nn.Module, path: Path, image_size: int) -> None:
    """Trace the network and write its graph with the weights in it."""
    # Two images: the tracer takes a size of 0 or 1 for a fixed one.
    example_B3HW = torch.zeros(2, 3, image_size, image_size)
    # Traced here: torch.onnx, where it cannot keep the batch free, would fix it in silence.
    program = torch.export.export(
        logits,
        (example_B3HW,),
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        strict=False,
    )
    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def _compare(logits: nn.Module, run: OnnxRun, image_size: int) -> tuple[float, float]:
    """The largest difference of a logit, and the largest logit, over batches of random images."""
    generator = torch.Generator().manual_seed(0)
    differences, sizes = [], []
    for batch in BATCHES:
        images_B3HW = torch.randn(batch, 3, image_size, image_size, generator=generator)
        with torch.inference_mode():
            expected_BK = logits(images_B3HW)
        (found_BK,) = run({"images": images_B3HW})
        differences.append((found_BK - expected_BK).abs().max())
        sizes.append(expected_BK.abs().max())
    return float(torch.stack(differences).max()), float(torch.stack(sizes).max())


def _runner(path: Path) -> OnnxRun:
    """The file as ONNX Runtime runs it, on the CPU; it need not lie there any more."""
    runtime: Any = importlib.import_module("onnxruntime")
    providers = ["CPUExecutionProvider"]
    session = _asking(functools.partial(runtime.InferenceSession, path, providers=providers))

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        found = _asking(functools.partial(session.run, None, arrays))
        return [torch.from_numpy(array) for array in found]

    return run


def _asking(action: Callable[[], Any]) -> Any:
    """What ONNX Runtime answers; its complaint becomes one line."""
    try:
        return action()
    except Exception as fault:  # its exceptions share no other base
        raise WeightsError(
            f"{ONNX_NAME} was not written: ONNX Runtime cannot use it ({one_line(fault, 200)}); "
            "use model.safetensors"
        ) from fault


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter tells its inner life in warnings and logs; what matters is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
