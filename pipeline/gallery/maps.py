"""What the table does not hold: the maps behind a box, computed again by the network that made it.

Which network and which settings that was, the table's manifest says. To add a panel: write it in
drawing/images.py and append it in ``MapDrawer.panels``.

Shape letters:  B images (always 1 here)   H, W rows and columns of patches   N patches (H * W)
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.config import BackboneConfig, ImagesConfig, LocalizationConfig
from pipeline.config.labelling import Similarity
from pipeline.data.pseudo_labels import Manifest
from pipeline.drawing.images import (
    METHOD_COLOURS,
    METHOD_NAMES,
    Finding,
    Panel,
    Pixels,
    degree_panel,
    draw_mask,
    similarity_panel,
)
from pipeline.errors import WeightsError, one_line
from pipeline.labelling.labeller import ForwardPass, Provenance, PseudoBoxLabeller
from pipeline.localization.affinity import compare, similarity_to
from pipeline.localization.localize import Localization, localize
from pipeline.localization.seed_expansion import OWN_SIMILARITY
from pipeline.models.backbones import build_backbone, load_weights
from pipeline.models.checkpoints import Weights
from pipeline.models.features import FeatureExtractor, PatchFeatures


class MapDrawer:
    """Draws what the network makes of an image: two maps, and both rules side by side.

    Args:
        backbone: the network that made the table.
        own: the table's settings. The other rule has its knob from there too, but compares patches
            in its own way: the table's similarity was chosen for the table's rule.
        forward: how the table's images went through the network.
    """

    def __init__(
        self, backbone: FeatureExtractor, own: LocalizationConfig, forward: ForwardPass
    ) -> None:
        self.labeller = PseudoBoxLabeller(
            backbone,
            own,
            Provenance("", "", ""),
            forward=forward,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        rule = "lost" if own.rule == "solost" else "solost"
        other = own.model_copy(update={"rule": rule, "similarity": None})
        # In one order whatever the table's rule is, so that pictures of two tables compare.
        self.pair = sorted((own, other), key=lambda one: one.rule)

    def panels(self, pixels_HW3: Pixels) -> list[Panel]:
        """Degree map, similarity to the seed, LOST, SoLOST; the image as the network sees it."""
        features = self.labeller.extract([pixels_HW3])
        found = self.labeller.localize(features)
        grid = found.mask_BHW.shape[1:]
        degree_HW = found.degree_BN[0].reshape(grid).cpu().numpy()
        cosine_HW = _similarity_to_seed(features, found, _similarity(self.labeller.localization))
        stride, seed_xy = features.stride, _finding(found, features.stride).seed_xy
        return [
            degree_panel(pixels_HW3, degree_HW, stride, seed_xy=seed_xy),
            similarity_panel(pixels_HW3, cosine_HW, stride, seed_xy=seed_xy),
            *(_mask_panel(pixels_HW3, features, settings) for settings in self.pair),
        ]


def load_map_drawer(manifest: Manifest, checkpoint: str | None) -> MapDrawer:
    """A drawer with the very weights and settings that the table was made with.

    Args:
        manifest: the table's.
        checkpoint: file with the weights; None is the file the manifest names, else the hub.

    Raises:
        WeightsError: the weights cannot be had, are not the table's, or the manifest does not say
            how the table was made.
        ConfigError: this version has no such backbone, or the backbone no such feature or block.
    """
    backbone, localization = _settings(manifest)
    named = (manifest.job.get("backbone") or {}).get("checkpoint")
    weights = load_weights(backbone.name, checkpoint or named)
    _require_same(weights, manifest.weights_sha256)
    network = build_backbone(backbone.name, weights, feature=backbone.feature, block=backbone.block)
    forward = ForwardPass(backbone.normalize, manifest.config.get("precision", "fp32"))
    return MapDrawer(network, localization, forward)


def decoding_of(manifest: Manifest) -> ImagesConfig:
    """How the table's images became pixels; the defaults where the manifest does not say."""
    try:
        return ImagesConfig.model_validate(_group(manifest, "decode"))
    except ValidationError:
        return ImagesConfig()


def _settings(manifest: Manifest) -> tuple[BackboneConfig, LocalizationConfig]:
    backbone = _group(manifest, "backbone")
    backbone.pop("weights_sha256", None)
    if "name" not in backbone:
        raise WeightsError("the manifest of the table does not say which backbone made it")
    try:
        return (
            BackboneConfig.model_validate(backbone),
            LocalizationConfig.model_validate(_group(manifest, "localization")),
        )
    except ValidationError as fault:
        raise WeightsError(
            f"the manifest has settings this version does not know ({one_line(fault)})"
        ) from fault


def _group(manifest: Manifest, group: str) -> dict[str, Any]:
    """The manifest's settings of a group, under their bare names."""
    head = f"{group}."
    return {
        name.removeprefix(head): value
        for name, value in manifest.config.items()
        if name.startswith(head)
    }


def _require_same(weights: Weights, sha256: str) -> None:
    if weights.sha256 != sha256:
        raise WeightsError(
            f"{weights.source} is not what the table was made with: its sha256 is "
            f"{weights.sha256[:12]}..., the table's {sha256[:12]}...; give the table's own weights"
        )


def _similarity(settings: LocalizationConfig) -> Similarity:
    rule = settings.rule
    own = OWN_SIMILARITY[rule] if rule == "lost" or rule == "solost" else "cosine"
    return settings.similarity or own


def _similarity_to_seed(
    features: PatchFeatures, found: Localization, similarity: Similarity
) -> NDArray[np.float32]:
    """``(H, W)`` in [-1, 1]: every patch's cosine (pearson: correlation) with the seed."""
    compared = compare(features.tokens_BHWD.flatten(1, 2), similarity)
    norm_N = compared.patch_BND[0].norm(dim=-1)
    product_N = similarity_to(compared, found.seed_B)[0]
    # The product's own sign stays: it is what the rules go by. Where a norm is 0 so is the product.
    cosine_N = product_N / (norm_N * norm_N[found.seed_B[0]]).clamp(min=1e-30)
    cosine_HW: NDArray[np.float32] = cosine_N.reshape(found.mask_BHW.shape[1:]).cpu().numpy()
    return cosine_HW


def _mask_panel(pixels_HW3: Pixels, features: PatchFeatures, settings: LocalizationConfig) -> Panel:
    found = localize(features.tokens_BHWD, **settings.arguments())
    picture = draw_mask(
        pixels_HW3,
        found.mask_BHW[0].cpu().numpy(),
        features.stride,
        _finding(found, features.stride),
        colour=METHOD_COLOURS[settings.rule],
    )
    lost = settings.rule == "lost"
    knob = f"k = {settings.num_candidates}" if lost else f"m = {settings.keep_fraction:g}"
    nothing = "" if found.found_B[0] else ", nothing found"
    title = f"{METHOD_NAMES[settings.rule]}, {knob}{nothing}"
    return Panel(picture, title, f"{_similarity(settings)}; voted patches around the seed")


def _finding(found: Localization, stride: int) -> Finding:
    """The one image's box and seed, patches as pixels; neither where nothing was found."""
    if not found.found_B[0]:
        return Finding([])
    row, column = divmod(int(found.seed_B[0]), found.mask_BHW.shape[2])
    boxes_14 = found.boxes_B4.cpu().numpy() * stride
    scores = [float(found.score_B[0])]
    return Finding(boxes_14, ((column + 0.5) * stride, (row + 0.5) * stride), scores)
