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

from pipeline.config import BackboneConfig, LocalizationConfig
from pipeline.config.settings import Normalization, Precision
from pipeline.data.pseudo_labels import SCHEMA
from pipeline.labelling.outcomes import outcomes_of
from pipeline.labelling.rows import (
    Image,
    Outcome,
    Provenance,
    decoded_images,
    label_rows,
    rows_in_groups,
    too_large,
)
from pipeline.localization.head import Head
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
    "ForwardPass",
    "Image",
    "Provenance",
    "PseudoBoxLabeller",
    "PseudoBoxes",
]

# More than four 500 x 375 images' activations leave a CPU's caches: 15 % slower (docs/log.md).
BATCH_SIZES = {"cpu": 4, "cuda": 32}


@dataclass(frozen=True)
class ForwardPass:
    """How images go through the network."""

    normalize: Normalization = "imagenet"
    precision: Precision = "fp32"
    batch_size: int | None = None
    """Images at once; None is what suits the device (``BATCH_SIZES``)."""


class PseudoBoxLabeller:
    """Gives each row of decoded pixels its boxes; a row without pixels keeps its status.

    Args:
        backbone: patch features of normalised, padded images.
        localization: how features become boxes.
        provenance: copied into every row.
        forward: how images go through the backbone.
        head: of rule head; ``localization.head`` only names the place it was read from.
        device: where the network runs, e.g. ``"cpu"`` or ``"cuda"``.
    """

    schema = SCHEMA
    """Of the rows."""

    def __init__(
        self,
        backbone: FeatureExtractor,
        localization: LocalizationConfig,
        provenance: Provenance,
        *,
        forward: ForwardPass | None = None,
        head: Head | None = None,
        device: str = "cpu",
    ) -> None:
        self.backbone = backbone.to(device)
        self.localization = localization
        self.provenance = provenance
        self.forward = forward or ForwardPass()
        self.head = head
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
            decoded,
            outcomes,
            method=self.localization.rule,
            provenance=self.provenance,
            schema=self.schema,
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
            return self.look_at(chosen, self.extract(chosen), sizes_B2[rows])

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
        """The main object by these settings, in patches."""
        return localize(features.tokens_BHWD, head=self.head, **self.localization.arguments())

    def look_at(
        self, images: Sequence[Image], features: PatchFeatures, sizes_B2: NDArray[Any]
    ) -> list[Outcome]:
        """One outcome per image of a batch; ``sizes_B2`` are the originals' widths and heights."""
        found = self.localize(features)
        return outcomes_of(found, features.stride, images, sizes_B2, self.localization)


@dataclass(frozen=True, eq=False)
class PseudoBoxes:
    """Boxes found in the features of a backbone: a recipe for a labeller.

    To be pickled once and called where the images are.
    """

    backbone: BackboneConfig
    weights: Weights
    localization: LocalizationConfig
    precision: Precision = "fp32"
    batch_size: int | None = None
    head: Head | None = None
    labeller: type[PseudoBoxLabeller] = PseudoBoxLabeller

    def __call__(self, provenance: Provenance, device: str) -> PseudoBoxLabeller:
        """The labeller, its network on ``device`` (``cpu``, ``cuda``)."""
        # Late: it loads timm, which a labeller of another's network has no need of.
        from pipeline.models.backbones import build_backbone, with_recipe

        chosen = with_recipe(self.backbone)
        network = build_backbone(
            chosen.name, self.weights, feature=chosen.feature, block=chosen.block
        )
        forward = ForwardPass(chosen.normalize, self.precision, self.batch_size)
        return self.labeller(
            network,
            self.localization,
            provenance,
            forward=forward,
            head=self.head,
            device=device,
        )
