"""Which block and which of query, key and value suit a ViT: CorLoc of LOST and SoLOST for each.

    python -m benchmarks.feature_sweep --images PHOTOS --ground-truth COCO.json \
        --name vit_tiny_patch16_224 --checkpoint VIT.safetensors --normalize half

DINO wants the keys of its last block. A network trained on labels does not, and this finds what it
wants instead. The standard error of a rate near 50 % over n images is 50 / sqrt(n) points.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
import tyro

from benchmarks.timing import print_table, write_json
from pipeline.boxes import Boxes
from pipeline.config import ImagesConfig, LocalizationConfig
from pipeline.data.ground_truth import read_coco
from pipeline.data.lake import Collection
from pipeline.data.pixels import load_pixels, pixels_of_row
from pipeline.evaluation.corloc import best_ious, corloc
from pipeline.labelling.labeller import ForwardPass, Image, Provenance, PseudoBoxLabeller
from pipeline.localization.localize import localize
from pipeline.models.backbones import build_backbone, load_weights
from pipeline.storage import Location

FEATURES: tuple[Literal["query", "key", "value"], ...] = ("query", "key", "value")
RULES: tuple[Literal["lost", "solost"], ...] = ("lost", "solost")


@dataclass(frozen=True)
class Settings:
    """What to sweep over."""

    images: str
    ground_truth: Path
    name: str
    checkpoint: str | None = None
    normalize: Literal["imagenet", "half"] = "imagenet"
    num_images: int = 500
    blocks: tuple[int, ...] = ()
    """Which blocks; none means all."""
    output: Path = Path("benchmarks/results/feature_sweep.json")


def main(settings: Settings) -> None:
    """Measure every block, feature and rule on the same images; print and keep CorLoc."""
    inputs = pa.concat_tables(list(Collection(settings.images).chunks()))
    order = np.random.default_rng(0).permutation(inputs.num_rows)[: settings.num_images]
    place = Location.parse(str(settings.ground_truth))
    decoded = load_pixels(inputs.take(order), **ImagesConfig().model_dump())
    boxes_by_name = {Path(i.file_name).name: i.boxes_N4 for i in read_coco(place)}
    truths = [boxes_by_name[Path(uri).name] for uri in decoded["uri"].to_pylist()]
    # None is larger than max_side here, so pixels are those of the ground truth.
    images = [
        i for row in range(decoded.num_rows) if (i := pixels_of_row(decoded, row)) is not None
    ]
    assert len(images) == decoded.num_rows
    forward = ForwardPass(settings.normalize)
    weights = load_weights(settings.name, settings.checkpoint)
    depth = 1 + max(int(n.split(".")[1]) for n in weights.state_dict if n.startswith("blocks."))
    rows: list[list[str]] = []
    result: dict[str, float] = {}
    for block in settings.blocks or range(depth):
        for feature in FEATURES:
            network = build_backbone(settings.name, weights, feature=feature, block=block)
            labeller = PseudoBoxLabeller(
                network, LocalizationConfig(), Provenance("", "", ""), forward=forward
            )
            rates = corlocs(labeller, images, truths)
            result.update({f"block {block} {feature} {rule}": r for rule, r in rates.items()})
            rows.append([f"{block} {feature}", *(f"{rates[rule]:.1f}" for rule in RULES)])
            print(*rows[-1], flush=True)
    title = f"CorLoc (%) on {decoded.num_rows} images, {settings.name}"
    print_table(title, ["block, feature", *RULES], rows)
    write_json(settings.output, {"title": title, "corloc": result, "torch": torch.__version__})


def corlocs(
    labeller: PseudoBoxLabeller, images: list[Image], truths: list[Boxes]
) -> dict[str, float]:
    """CorLoc of each rule on the same features."""
    found = boxes_by_rule(labeller, images)
    return {rule: 100 * corloc(best_ious(found[rule], truths)) for rule in RULES}


def boxes_by_rule(labeller: PseudoBoxLabeller, images: list[Image]) -> dict[str, Boxes]:
    """Each image's box by each rule, on the same features."""
    boxes: dict[str, Boxes] = {rule: np.zeros((len(images), 4)) for rule in RULES}
    for rows in labeller.batches(images):
        batch = [images[row] for row in rows]
        features = labeller.extract(batch)
        sides = np.array([[image.shape[1], image.shape[0]] * 2 for image in batch])
        for rule in RULES:
            found = localize(features.tokens_BHWD, rule=rule)
            boxes[rule][rows] = np.minimum(found.boxes_B4.numpy() * features.stride, sides)
    return boxes


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
