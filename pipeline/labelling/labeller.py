"""A batch of decoded images -> rows of the pseudo-label table: what a labelling actor does.

Knows no Ray: a notebook can call ``PseudoBoxLabeller`` on a table of ``data.pixels.load_pixels``;
``PseudoBoxes`` is the recipe of one, to be sent to where the images are.

Shape letters:  B images   H, W rows and columns   D channels
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.boxes import Boxes, area
from pipeline.config import BackboneConfig, LocalizationConfig
from pipeline.config.settings import Normalization, Precision
from pipeline.labelling.rows import (
    Image,
    Outcome,
    Provenance,
    decoded_images,
    label_rows,
    no_object,
    rows_in_groups,
    too_large,
)
from pipeline.localization.localize import Localization, localize
from pipeline.models.checkpoints import Weights
from pipeline.models.features import (
    NORMALIZATIONS,
    FeatureExtractor,
    PatchFeatures,
    as_fits,
    in_precision,
    normalize_and_pad,
    padded_size,
)

__all__ = [
    "BATCH_SIZES",
    "NOTHING_FOUND",
    "ForwardPass",
    "Image",
    "Provenance",
    "PseudoBoxLabeller",
    "PseudoBoxes",
]

OBJECT_LABEL = 1
# More than four 500 x 375 images' activations leave a CPU's caches: 15 % slower (docs/log.md).
BATCH_SIZES = {"cpu": 4, "cuda": 32}
NOTHING_FOUND = "no patch can be a seed: all features are zero or not finite"


@dataclass(frozen=True)
class ForwardPass:
    """How images go through the network."""

    normalize: Normalization = "imagenet"
    precision: Precision = "fp32"
    batch_size: int | None = None
    """Images at once; None is what suits the device (``BATCH_SIZES``)."""


class PseudoBoxLabeller:
    """Gives each row of decoded pixels one box; a row without pixels keeps its status.

    Args:
        backbone: patch features of normalised, padded images.
        localization: how features become boxes: the arguments of ``localize``.
        provenance: copied into every row.
        forward: how images go through the backbone.
        device: where the network runs, e.g. ``"cpu"`` or ``"cuda"``.
    """

    def __init__(
        self,
        backbone: FeatureExtractor,
        localization: LocalizationConfig,
        provenance: Provenance,
        *,
        forward: ForwardPass | None = None,
        device: str = "cpu",
    ) -> None:
        self.backbone = backbone.to(device)
        self.localization = localization
        self.provenance = provenance
        self.forward = forward or ForwardPass()
        self.device = device
        self.batch_size = self.forward.batch_size or BATCH_SIZES[device.partition(":")[0]]

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Rows of ``PIXELS_SCHEMA`` -> as many rows of ``pseudo_labels.SCHEMA``, in their order.

        Images that share a padded patch grid go through the network together, at most
        ``batch_size`` at once. None is ever padded to another's size: that would change its
        attention, its positions and its degrees.
        """
        images = decoded_images(decoded)
        sizes_N2 = np.column_stack([decoded["width"].to_numpy(), decoded["height"].to_numpy()])
        outcomes: dict[int, Outcome] = {}
        for rows in self.batches(images):
            batch = [image for row in rows if (image := images[row]) is not None]
            outcomes |= zip(rows, self._label(batch, sizes_N2[rows]), strict=True)
        return label_rows(
            decoded, outcomes, method=self.localization.rule, provenance=self.provenance
        )

    def batches(self, images: Sequence[Image | None]) -> Iterator[list[int]]:
        """Row numbers that share a padded grid, in groups of at most ``batch_size``."""
        patch = self.backbone.patch_size
        grids = [
            None if image is None else padded_size(image.shape[0], image.shape[1], patch)
            for image in images
        ]
        yield from rows_in_groups(grids, self.batch_size)

    def _label(self, images: Sequence[Image], sizes_B2: NDArray[Any]) -> list[Outcome]:
        """One outcome per image; the batch is halved while memory runs out."""

        def label(rows: Sequence[int]) -> list[Outcome]:
            chosen = [images[row] for row in rows]
            features = self.extract(chosen)
            return _outcomes(self.localize(features), features.stride, chosen, sizes_B2[rows])

        return as_fits(
            label,
            list(range(len(images))),
            refuse=lambda row: too_large(images[row], self.device),
            device=self.device,
        )

    @torch.inference_mode()
    def extract(self, images: Sequence[Image]) -> PatchFeatures:
        """Patch features of uint8 images that share one padded grid, in the chosen precision."""
        mean, std = NORMALIZATIONS[self.forward.normalize]
        pixels_B3HW = normalize_and_pad(
            images, multiple=self.backbone.patch_size, mean=mean, std=std
        )
        with in_precision(self.forward.precision, self.device):
            features: PatchFeatures = self.backbone(pixels_B3HW.to(self.device))
        return features

    def localize(self, features: PatchFeatures) -> Localization:
        """The boxes of these settings, in patches."""
        return localize(features.tokens_BHWD, **dict(self.localization))


@dataclass(frozen=True, eq=False)
class PseudoBoxes:
    """One box per image, found in the features of a backbone: a recipe for a labeller.

    To be pickled once and called where the images are.
    """

    backbone: BackboneConfig
    weights: Weights
    localization: LocalizationConfig
    precision: Precision = "fp32"
    batch_size: int | None = None

    def __call__(self, provenance: Provenance, device: str) -> PseudoBoxLabeller:
        """The labeller, its network on ``device`` (``cpu``, ``cuda``)."""
        # Late: it loads timm, which a labeller of another's network has no need of.
        from pipeline.models.backbones import build_backbone

        chosen = self.backbone
        network = build_backbone(
            chosen.name, self.weights, feature=chosen.feature, block=chosen.block
        )
        forward = ForwardPass(chosen.normalize, self.precision, self.batch_size)
        return PseudoBoxLabeller(
            network, self.localization, provenance, forward=forward, device=device
        )


def in_original_pixels(
    boxes_B4: Boxes, stride: int, seen_B2: NDArray[np.float64], sizes_B2: NDArray[Any]
) -> Boxes:
    """Boxes in patches of ``stride`` pixels -> pixels of the original images.

    Args:
        boxes_B4: xyxy in patches.
        stride: pixels per patch.
        seen_B2: width and height of each image as the network saw it.
        sizes_B2: of the original images.
    """
    # The right and bottom patches may hang over the image; only boxes are clipped, as in LOST.
    corners_B22 = np.minimum(boxes_B4.reshape(-1, 2, 2) * stride, seen_B2[:, None])
    corners_B22 = corners_B22 * (sizes_B2 / seen_B2)[:, None]
    boxes_in_pixels_B4: Boxes = np.minimum(corners_B22, sizes_B2[:, None]).reshape(-1, 4)
    return boxes_in_pixels_B4


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
    boxes_B4 = in_original_pixels(found.boxes_B4.cpu().numpy(), stride, seen_B2, sizes_B2)
    seeds_B2 = (np.column_stack([seed_B % columns, seed_B // columns]) + 0.5) * stride
    seeds_B2 = np.minimum(seeds_B2, seen_B2) * scale_B2
    at_low_B = np.any(boxes_B4[:, :2] <= 0, axis=1)
    touches_B = at_low_B | np.any(boxes_B4[:, 2:] >= sizes_B2, axis=1)
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
        else no_object(NOTHING_FOUND)
        for row, hit in enumerate(hits)
    ]
