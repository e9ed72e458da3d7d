"""The pictures of docs/method.md: what the cut, the head and its levels see, and scores.

    python -m benchmarks.method_pictures --images SCENES/images --checkpoint VIT.safetensors \
        --tables SoLOST=LABELS_A NCut=LABELS_B Head=LABELS_C --ground-truth GT --output docs/images

The head is fitted on the images; a few of them are drawn. The tables are of annotated photos, which
are not.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import tyro

from pipeline.config import ImagesConfig, LocalizationConfig
from pipeline.data.ground_truth import read_ground_truth
from pipeline.data.lake import Collection
from pipeline.data.pixels import load_pixels
from pipeline.drawing.figures import BLUE, GREEN, ORANGE, new_figure, png, quiet, title
from pipeline.drawing.images import (
    METHOD_COLOURS,
    Finding,
    Panel,
    Pixels,
    degree_panel,
    draw_box,
    draw_mask,
    encoded,
    map_panel,
    panel_row,
)
from pipeline.evaluation.corloc import THRESHOLD, best_ious
from pipeline.evaluation.predictions import match, read_predictions
from pipeline.labelling.labeller import ForwardPass, Provenance, PseudoBoxLabeller
from pipeline.labelling.rows import decoded_images
from pipeline.localization.head_fit import CutImages, Fit, fit_head
from pipeline.localization.localize import Localization, localize
from pipeline.localization.objects import LEVELS, objects_at_levels
from pipeline.models.backbones import build_backbone, load_weights
from pipeline.models.features import PatchFeatures
from pipeline.storage import Location

_FIT = (280, 210)
_BESIDE = (360, 180)


@dataclass(frozen=True)
class Settings:
    """What is drawn."""

    images: str
    checkpoint: str
    tables: tuple[str, ...]
    """NAME=FOLDER of tables with one box an image."""
    ground_truth: str
    name: str = "vit_tiny_patch16_224"
    block: int = 5
    cut: int = 5
    """Which image is cut, by its number in the collection; likewise the next."""
    head: int = 0
    beside: tuple[int, int] = (14, 21)
    """Drawn as one image with two objects."""
    num_images: int = 120
    output: Path = Path("docs/images")


def main(settings: Settings) -> None:
    """Draw the four pictures."""
    pixels, labeller = _images(settings)
    features = [labeller.extract([image]) for image in pixels]
    sample = [
        CutImages(one.tokens_BHWD, localize(one.tokens_BHWD, rule="ncut").mask_BHW)
        for one in features
    ]
    fit = fit_head(lambda: sample)
    rows = {
        "method-cut": ("The cut", _cut(pixels[settings.cut], features[settings.cut])),
        "method-head": (
            "The head, where the cut fails",
            _head(pixels[settings.head], features[settings.head], fit),
        ),
        "method-levels": (
            "Several objects",
            _levels(_beside(*(pixels[one] for one in settings.beside)), labeller, fit),
        ),
    }
    for name, (words, panels) in rows.items():
        picture = encoded(panel_row(words, "", panels), "JPEG")
        (settings.output / f"{name}.jpg").write_bytes(picture)
    (settings.output / "method-scores.png").write_bytes(_scores(settings))


def _images(settings: Settings) -> tuple[list[Pixels], PseudoBoxLabeller]:
    inputs = pa.concat_tables(list(Collection(settings.images).chunks()))
    decoded = load_pixels(inputs.slice(0, settings.num_images), **dict(ImagesConfig()))
    weights = load_weights(settings.name, settings.checkpoint)
    labeller = PseudoBoxLabeller(
        build_backbone(settings.name, weights, feature="value", block=settings.block),
        LocalizationConfig(),
        Provenance("", "", ""),
        forward=ForwardPass("half"),
    )
    return [image for image in decoded_images(decoded) if image is not None], labeller


def _cut(pixels: Pixels, features: PatchFeatures) -> list[Panel]:
    found = localize(features.tokens_BHWD, rule="ncut")
    degree_HW = found.degree_BN[0].reshape(found.mask_BHW.shape[1:]).numpy()
    return [
        degree_panel(pixels, degree_HW, features.stride, seed_xy=None, fit=_FIT),
        _map(pixels, found, features, "The object's side"),
        _boxed(pixels, found, features, "ncut", "The part around its highest value"),
    ]


def _head(pixels: Pixels, features: PatchFeatures, fit: Fit) -> list[Panel]:
    cut = localize(features.tokens_BHWD, rule="ncut")
    first, last = (
        localize(features.tokens_BHWD, rule="head", head=head) for head in (fit.rounds[0], fit.head)
    )
    return [
        _boxed(pixels, cut, features, "ncut", "The cut"),
        _map(pixels, first, features, "The head after one fit"),
        _map(pixels, last, features, "After six"),
        _boxed(pixels, last, features, "head", "The part of the largest sum"),
    ]


def _beside(left: Pixels, right: Pixels) -> Pixels:
    height = min(len(left), len(right))
    return np.hstack([left[:height], right[:height]])


def _map(pixels: Pixels, found: Localization, features: PatchFeatures, words: str) -> Panel:
    assert found.map_BHW is not None
    map_HW = found.map_BHW[0].numpy()
    return map_panel(pixels, map_HW, features.stride, title=words, seed_xy=None, fit=_FIT)


def _boxed(
    pixels: Pixels, found: Localization, features: PatchFeatures, rule: str, words: str
) -> Panel:
    picture = draw_mask(
        pixels,
        found.mask_BHW[0].numpy(),
        features.stride,
        Finding(found.boxes_B4.numpy() * features.stride),
        colour=METHOD_COLOURS[rule],
        fit=_FIT,
    )
    return Panel(picture, words)


def _levels(pixels: Pixels, labeller: PseudoBoxLabeller, fit: Fit) -> list[Panel]:
    features = labeller.extract([pixels])
    found = localize(features.tokens_BHWD, rule="head", head=fit.head)
    assert found.map_BHW is not None
    map_HW = found.map_BHW[0].numpy()
    colour = METHOD_COLOURS["head"]
    panels = [
        Panel(
            draw_mask(
                pixels, map_HW > level, features.stride, Finding([]), colour=colour, fit=_BESIDE
            ),
            f"Above {level:g}",
        )
        for level in (LEVELS[0], LEVELS[2], LEVELS[4])
    ]
    objects = objects_at_levels(found.map_BHW, max_objects=3, nms_iou=0.5)
    finding = Finding(objects.boxes_K4.numpy() * features.stride, None, objects.score_K.tolist())
    boxed = draw_box(pixels, finding, colour=colour, fit=_BESIDE)
    return [*panels, Panel(boxed, "The boxes that stay, with scores")]


def _scores(settings: Settings) -> bytes:
    """Of photos in four groups by their scores, the share whose box is right."""
    truths = read_ground_truth(Location.parse(settings.ground_truth))
    truths = [one for one in truths if len(one.boxes_N4)]
    figure = new_figure(5.2, 2.6)
    axes = figure.add_subplot()
    colours = (BLUE, ORANGE, GREEN)
    width = 0.8 / len(settings.tables)
    for number, text in enumerate(settings.tables):
        name, _, place = text.partition("=")
        found = match(list(read_predictions(Location.parse(place))), truths).predictions
        boxes_N4 = np.array([one.box if one and one.box else (0, 0, 0, 0) for one in found])
        score_N = np.array(
            [float(one.detections.scores_D.max(initial=0.0)) if one else 0.0 for one in found]
        )
        hit_N = best_ious(boxes_N4, [one.boxes_N4 for one in truths]) >= THRESHOLD
        quarters = np.array_split(hit_N[np.argsort(score_N, kind="stable")], 4)
        place_Q = np.arange(4) + width * (number - (len(settings.tables) - 1) / 2)
        heights = [100 * quarter.mean() for quarter in quarters]
        axes.bar(place_Q, heights, width * 0.92, label=name, color=colours[number])
    axes.set_xticks(range(4), ["lowest scores", "", "", "highest"])
    axes.set_ylim(0, 100)
    quiet(axes, "y")
    title(axes, f"Right boxes (%) of {len(truths)} photos, by quarters of their scores")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return png(figure)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
