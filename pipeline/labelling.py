"""A batch of decoded images -> rows of the pseudo-label table: what a labelling actor does.

Knows no Ray: a notebook can call ``PseudoBoxLabeller`` on a table of ``data.pixels.load_pixels``.

Shape letters:  B images   H, W rows and columns   D channels
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.boxes import area
from pipeline.data.pixels import pixels_of_row
from pipeline.data.pseudo_labels import SCHEMA
from pipeline.localization.affinity import Similarity
from pipeline.localization.localize import Localization, localize
from pipeline.localization.seed_expansion import Rule
from pipeline.models.features import (
    NORMALIZATIONS,
    FeatureExtractor,
    PatchFeatures,
    normalize_and_pad,
    padded_size,
)

OBJECT_LABEL = 1
# More than four 500 x 375 images' activations leave a CPU's caches: 15 % slower (docs/log.md).
BATCH_SIZES = {"cpu": 4, "cuda": 32}
NOTHING_FOUND = "no patch can be a seed: all features are zero or not finite"

Image = NDArray[np.uint8]
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """How boxes are found: the arguments of ``localize`` and of the forward pass."""

    rule: Rule = "solost"
    similarity: Similarity | None = None
    keep_fraction: float = 0.5
    num_candidates: int = 100
    affinity_memory_mib: int = 512
    normalize: Literal["imagenet", "half"] = "imagenet"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int | None = None
    """Images per forward pass; None is what suits the device (``BATCH_SIZES``)."""


@dataclass(frozen=True)
class Provenance:
    """What every row says about how it was made."""

    run_id: str
    config_hash: str
    weights_sha256: str


class PseudoBoxLabeller:
    """Gives each row of decoded pixels one box; a row without pixels keeps its status.

    Args:
        backbone: patch features of normalised, padded images.
        method: how boxes are found.
        provenance: copied into every row.
        device: where the network runs, e.g. ``"cpu"`` or ``"cuda"``.
    """

    def __init__(
        self,
        backbone: FeatureExtractor,
        method: Method,
        provenance: Provenance,
        *,
        device: str = "cpu",
    ) -> None:
        self.backbone = backbone.to(device)
        self.method = method
        self.provenance = provenance
        self.device = device
        self.batch_size = method.batch_size or BATCH_SIZES[device.partition(":")[0]]

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Rows of ``PIXELS_SCHEMA`` -> as many rows of ``pseudo_labels.SCHEMA``, in their order.

        Images that share a padded patch grid go through the network together, at most
        ``batch_size`` at once. None is ever padded to another's size: that would change its
        attention, its positions and its degrees.
        """
        images = [pixels_of_row(decoded, row) for row in range(decoded.num_rows)]
        sizes_N2 = np.column_stack([decoded["width"].to_numpy(), decoded["height"].to_numpy()])
        outcomes: list[Outcome] = decoded.select(["status", "error"]).to_pylist()
        for rows in self.batches(images):
            batch = [image for row in rows if (image := images[row]) is not None]
            for row, outcome in zip(rows, self._label(batch, sizes_N2[rows]), strict=True):
                outcomes[row] = outcome
        return self._table(decoded, outcomes)

    def batches(self, images: Sequence[Image | None]) -> Iterator[list[int]]:
        """Row numbers that share a padded grid, in groups of at most ``batch_size``."""
        rows_by_grid: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, image in enumerate(images):
            if image is not None:
                grid = padded_size(image.shape[0], image.shape[1], self.backbone.patch_size)
                rows_by_grid[grid].append(row)
        size = self.batch_size
        for rows in rows_by_grid.values():
            for first in range(0, len(rows), size):
                yield rows[first : first + size]

    def _label(self, images: Sequence[Image], sizes_B2: NDArray[Any]) -> list[Outcome]:
        """One outcome per image; the batch is halved while memory runs out."""
        try:
            features = self.extract(images)
            return _outcomes(self.localize(features), features.stride, images, sizes_B2)
        except (MemoryError, RuntimeError) as fault:
            if not _is_out_of_memory(fault):
                raise
        # Here the failed batch's tensors are gone with the exception that held them.
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if len(images) == 1:
            rows, columns, _ = images[0].shape
            reason = f"{columns}x{rows} pixels do not fit in the memory of {self.device}"
            return [{"status": "error_memory", "error": reason}]
        half = len(images) // 2
        first = self._label(images[:half], sizes_B2[:half])
        return first + self._label(images[half:], sizes_B2[half:])

    @torch.inference_mode()
    def extract(self, images: Sequence[Image]) -> PatchFeatures:
        """Patch features of uint8 images that share one padded grid, in the chosen precision."""
        mean, std = NORMALIZATIONS[self.method.normalize]
        pixels_B3HW = normalize_and_pad(
            images, multiple=self.backbone.patch_size, mean=mean, std=std
        )
        # On a GPU convolutions would silently round to TF32: noise of 1e-3 moves one box in forty.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), self._autocast():
            features: PatchFeatures = self.backbone(pixels_B3HW.to(self.device))
        return features

    def localize(self, features: PatchFeatures) -> Localization:
        """The boxes of this method, in patches."""
        return localize(
            features.tokens_BHWD,
            rule=self.method.rule,
            similarity=self.method.similarity,
            keep_fraction=self.method.keep_fraction,
            num_candidates=self.method.num_candidates,
            affinity_memory_mib=self.method.affinity_memory_mib,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.method.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.method.precision == "bf16" else torch.float16
        return torch.autocast(self.device.partition(":")[0], dtype=dtype)

    def _table(self, decoded: pa.Table, outcomes: Sequence[Outcome]) -> pa.Table:
        same = {
            "method": self.method.rule,
            "run_id": self.provenance.run_id,
            "config_hash": self.provenance.config_hash,
            "weights_sha256": self.provenance.weights_sha256,
            "created_at": datetime.now(UTC),
        }
        arrays = []
        for field in SCHEMA:
            if field.name in ("status", "error") or field.name not in decoded.column_names:
                values = [same.get(field.name, row.get(field.name)) for row in outcomes]
                arrays.append(pa.array(values, field.type))
            else:
                arrays.append(decoded[field.name])
        return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _outcomes(
    found: Localization, stride: int, images: Sequence[Image], sizes_B2: NDArray[Any]
) -> list[Outcome]:
    """Boxes in patches -> rows in original pixels.

    ``sizes_B2`` are the original widths and heights; ``images`` may have been scaled down.
    """
    seen_B2 = np.array([(image.shape[1], image.shape[0]) for image in images], dtype=np.float64)
    scale_B2 = sizes_B2 / seen_B2
    columns = found.mask_BHW.shape[2]
    seed_B = found.seed_B.cpu().numpy()
    degree_B = found.degree_BN.cpu().numpy()[np.arange(len(images)), seed_B]
    # The right and bottom patches may hang over the image; only boxes are clipped, as in LOST.
    corners_B22 = found.boxes_B4.cpu().numpy().reshape(-1, 2, 2) * stride
    corners_B22 = np.minimum(corners_B22, seen_B2[:, None]) * scale_B2[:, None]
    boxes_B4 = np.minimum(corners_B22, sizes_B2[:, None]).reshape(-1, 4)
    seeds_B2 = (np.column_stack([seed_B % columns, seed_B // columns]) + 0.5) * stride
    seeds_B2 = np.minimum(seeds_B2, seen_B2) * scale_B2
    touches_B = (boxes_B4[:, :2] <= 0).any(1) | (boxes_B4[:, 2:] >= sizes_B2).any(1)
    fraction_B = area(boxes_B4) / sizes_B2.prod(axis=1)
    hits, scores = found.found_B.tolist(), found.score_B.tolist()
    return [
        {
            "status": "ok",
            "error": None,
            "boxes": [boxes_B4[row]],
            "scores": [scores[row]],
            "labels": [OBJECT_LABEL],
            "seed_xy": seeds_B2[row],
            "seed_degree": degree_B[row],
            "area_fraction": fraction_B[row],
            "touches_border": touches_B[row],
        }
        if hit
        else {
            "status": "no_object",
            "error": NOTHING_FOUND,
            "boxes": [],
            "scores": [],
            "labels": [],
        }
        for row, hit in enumerate(hits)
    ]


def _is_out_of_memory(fault: BaseException) -> bool:
    """Whether memory ran out; on the CPU torch says so in a plain RuntimeError."""
    if isinstance(fault, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "not enough memory" in str(fault) or "allocate memory" in str(fault)
