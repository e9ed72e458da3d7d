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
from pipeline.config.labelling import SeedRule, Similarity
from pipeline.data.pseudo_labels import Manifest
from pipeline.drawing.images import (
    METHOD_COLOURS,
    METHOD_NAMES,
    Finding,
    Panel,
    Pixels,
    degree_panel,
    draw_mask,
    map_panel,
    similarity_panel,
)
from pipeline.errors import DataError, WeightsError, one_line
from pipeline.labelling.labeller import ForwardPass, Provenance, PseudoBoxLabeller
from pipeline.labelling.run import HEAD_FOLDER
from pipeline.labelling.saved_head import read_head
from pipeline.localization.affinity import compare, similarity_to
from pipeline.localization.head import Head
from pipeline.localization.localize import Localization, localize
from pipeline.localization.seed_expansion import OWN_SIMILARITY
from pipeline.models.backbones import build_backbone, load_weights, with_recipe
from pipeline.models.features import FeatureExtractor, PatchFeatures
from pipeline.storage import Location


class MapDrawer:
    """Draws what the network makes of an image: its maps, and two rules side by side.

    Args:
        backbone: the network that made the table.
        own: the table's settings. The other rule has its knob from there too, but compares patches
            in its own way: the table's similarity was chosen for the table's rule.
        forward: how the table's images went through the network.
        head: of rule head.
    """

    def __init__(
        self,
        backbone: FeatureExtractor,
        own: LocalizationConfig,
        forward: ForwardPass,
        head: Head | None = None,
    ) -> None:
        self.labeller = PseudoBoxLabeller(
            backbone,
            own,
            Provenance("", "", ""),
            forward=forward,
            head=head,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        rule = "lost" if own.rule == "solost" else "solost"
        other = own.model_copy(update={"rule": rule, "similarity": None})
        # In one order whatever the table's rule is, so that pictures of two tables compare.
        self.pair = sorted((own, other), key=lambda one: one.rule)

    def panels(self, pixels_HW3: Pixels) -> list[Panel]:
        """The maps, then the masks of both rules; the image as the network sees it.

        Of lost and solost: degree, and similarity to the seed. Of others the map of objects.
        """
        features = self.labeller.extract([pixels_HW3])
        own, found = self.labeller.localization, self.labeller.localize(features)
        seed_xy = _finding(found, features.stride).seed_xy
        panels = _maps(pixels_HW3, features, found, own, seed_xy)
        for settings in self.pair:
            one = found
            if settings is not own:
                one = localize(features.tokens_BHWD, **settings.arguments())
            panels.append(_mask_panel(pixels_HW3, one, features.stride, settings))
        return panels


def load_map_drawer(labels: Location, manifest: Manifest, checkpoint: str | None) -> MapDrawer:
    """A drawer with the very weights and settings that the table was made with.

    Args:
        labels: the table's folder.
        manifest: the table's.
        checkpoint: file with the weights; None is the file the manifest names, else the hub.

    Raises:
        WeightsError: the weights or the head cannot be had, are not the table's, or the manifest
            does not say how the table was made.
        ConfigError: this version has no such backbone, or the backbone no such feature or block.
    """
    backbone, localization = _settings(manifest)
    named = (manifest.job.get("backbone") or {}).get("checkpoint")
    weights = load_weights(backbone.name, checkpoint or named)
    _require_same(weights.source, weights.sha256, manifest.weights_sha256)
    backbone = with_recipe(backbone)
    network = build_backbone(backbone.name, weights, feature=backbone.feature, block=backbone.block)
    forward = ForwardPass(backbone.normalize, manifest.config.get("precision", "fp32"))
    head = _head(labels, manifest) if localization.rule == "head" else None
    return MapDrawer(network, localization, forward, head)


def decoding_of(manifest: Manifest) -> ImagesConfig:
    """How the table's images became pixels; the defaults where the manifest does not say."""
    try:
        return ImagesConfig.model_validate(_group(manifest, "decode"))
    except ValidationError:
        return ImagesConfig()


def _settings(manifest: Manifest) -> tuple[BackboneConfig, LocalizationConfig]:
    backbone = _group(manifest, "backbone")
    localization = _group(manifest, "localization")
    backbone.pop("weights_sha256", None)
    # How the head was chosen is told there too.
    for name in ("head_sha256", "head_refused"):
        localization.pop(name, None)
    if "name" not in backbone:
        raise WeightsError("the manifest of the table does not say which backbone made it")
    try:
        return (
            BackboneConfig.model_validate(backbone),
            LocalizationConfig.model_validate(localization),
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


def _head(labels: Location, manifest: Manifest) -> Head:
    """The table's head: where it was given, or in the table's folder, where it was fitted."""
    named = (manifest.job.get("localization") or {}).get("head")
    place = Location.parse(named) if named else labels.child(HEAD_FOLDER)
    try:
        head, record = read_head(place)
    except DataError as fault:
        raise WeightsError(str(fault)) from fault
    wanted = str(manifest.config.get("localization.head_sha256"))
    _require_same(str(place), record.head_sha256, wanted)
    return head


def _require_same(source: str, sha256: str, wanted: str) -> None:
    if sha256 != wanted:
        raise WeightsError(
            f"{source} is not what the table was made with: its sha256 is "
            f"{sha256[:12]}..., the table's {wanted[:12]}...; give the table's own weights"
        )


def _maps(
    pixels_HW3: Pixels,
    features: PatchFeatures,
    found: Localization,
    settings: LocalizationConfig,
    seed_xy: tuple[float, float] | None,
) -> list[Panel]:
    stride = features.stride
    if found.map_BHW is not None:
        map_HW = found.map_BHW[0].cpu().numpy()
        title = f"{METHOD_NAMES[settings.rule]}'s map of objects"
        return [map_panel(pixels_HW3, map_HW, stride, title=title, seed_xy=seed_xy)]
    degree_HW = found.degree_BN[0].reshape(found.mask_BHW.shape[1:]).cpu().numpy()
    cosine_HW = _similarity_to_seed(features, found, _similarity(settings))
    return [
        degree_panel(pixels_HW3, degree_HW, stride, seed_xy=seed_xy),
        similarity_panel(pixels_HW3, cosine_HW, stride, seed_xy=seed_xy),
    ]


def _similarity(settings: LocalizationConfig) -> Similarity:
    """Of lost and solost."""
    rule: SeedRule = "lost" if settings.rule == "lost" else "solost"
    return settings.similarity or OWN_SIMILARITY[rule]


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


def _mask_panel(
    pixels_HW3: Pixels, found: Localization, stride: int, settings: LocalizationConfig
) -> Panel:
    rule = settings.rule
    picture = draw_mask(
        pixels_HW3,
        found.mask_BHW[0].cpu().numpy(),
        stride,
        _finding(found, stride),
        colour=METHOD_COLOURS[rule],
    )
    knob = {
        "lost": f", k = {settings.num_candidates}",
        "solost": f", m = {settings.keep_fraction:g}",
        "ncut": f", tau = {settings.cut_threshold:g}",
        "head": "",
    }[rule]
    nothing = "" if found.found_B[0] else ", nothing found"
    note = "the main object above the map's 0"
    if found.map_BHW is None:
        note = f"{_similarity(settings)}; voted patches around the seed"
    return Panel(picture, f"{METHOD_NAMES[rule]}{knob}{nothing}", note)


def _finding(found: Localization, stride: int) -> Finding:
    """The one image's box and seed, patches as pixels; neither where nothing was found."""
    if not found.found_B[0]:
        return Finding([])
    row, column = divmod(int(found.seed_B[0]), found.mask_BHW.shape[2])
    boxes_14 = found.boxes_B4.cpu().numpy() * stride
    scores = [float(found.score_B[0])]
    return Finding(boxes_14, ((column + 0.5) * stride, (row + 0.5) * stride), scores)
