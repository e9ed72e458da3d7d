"""What the weights that come with the package are worth: the table of their model card.

    python -m benchmarks.shipped_weights --supervised VIT_TINY.safetensors --labelled CIFAR10.tgz \
        --collections SCENES/images=SCENES/instances.json PHOTOS=COCO.json KANGAROOS=ANNOTATIONS/

CorLoc of LOST and SoLOST, with its 95 % bootstrap interval over images: of the shipped network
(keys of the last block, the method's own default, and the feature that suits it best), of the same
network before training, and of timm's supervised ViT-Ti (the same two), beside the whole image and
the central box, on the same images. Then the accuracy of nearest neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.timing import print_table, write_json
from pipeline.boxes import Boxes
from pipeline.config import LocalizationConfig
from pipeline.config.labelling import SeedRule
from pipeline.config.pretraining import DINOConfig
from pipeline.data.labelled_folders import is_archive, read_archive, read_folder
from pipeline.evaluation.corloc import (
    THRESHOLD,
    best_ious,
    central_boxes,
    interval_95,
    resampled_rates,
)
from pipeline.labelling.labeller import ForwardPass, Image, Provenance, PseudoBoxLabeller
from pipeline.localization.localize import localize
from pipeline.models.backbones import build_backbone, build_vit, load_weights
from pipeline.pretraining.network import DINONetwork
from pipeline.pretraining.probe import BoxProbe, neighbour_accuracy, read_box_probe

NANO, SHIPPED, SUPERVISED = "vit_nano_patch8", "vit_nano_patch8.dino", "vit_tiny_patch16_224"


@dataclass(frozen=True)
class Settings:
    """What to measure, and on what."""

    collections: tuple[str, ...]
    """IMAGES=GROUND_TRUTH, each a place as the jobs take it."""
    supervised: Path | None = None
    """Weights of timm's vit_tiny_patch16_224."""
    labelled: str | None = None
    """Class folders, or an archive of them, for nearest neighbours."""
    num_images: int = 500
    max_side: int = 224
    """Longer side for the small networks; the supervised one sees the images at their own size."""
    suited: str = "value:3"
    """The shipped network's best feature and block."""
    neighbours: int = 5000
    """Training images of the labelled set; a fifth as many are asked."""
    resamples: int = 10_000
    output: Path = Path("benchmarks/results/shipped_weights.json")


@dataclass(frozen=True)
class Network:
    """A row or two of the table."""

    title: str
    name: str
    checkpoint: str | None
    trained: bool
    features: tuple[str, ...]
    normalize: Any
    max_side: int


def main(settings: Settings) -> None:
    """Measure, print and keep."""
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    for text in settings.collections:
        images, _, truth = text.partition("=")
        rows = []
        for title, hits_N in _all_hits(settings, images, truth):
            rate, low, high = _rate(hits_N, settings.resamples)
            rows.append([title, f"{rate:.1f}", f"[{low:.1f}, {high:.1f}]"])
            result.setdefault(images, {})[title] = [rate, low, high, len(hits_N)]
            print(images, *rows[-1], flush=True)
        print_table(f"CorLoc (%) on {images}", ["boxes", "CorLoc", "95 %"], rows)
    if settings.labelled is not None:
        for name, weights in (("shipped", load_weights(SHIPPED, None)), ("untrained", None)):
            vit = build_vit(NANO, weights=weights)
            network = DINONetwork(vit, DINOConfig(out_dim=1)).eval()
            result[f"k-NN {name}"] = _neighbours(network, settings)
            print(f"k-NN {name}: {result[f'k-NN {name}']:.1%}", flush=True)
    write_json(
        settings.output,
        {
            "settings": {**vars(settings), "output": None, "supervised": str(settings.supervised)},
            "result": result,
        },
    )


def _all_hits(
    settings: Settings, images: str, truth: str
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    small = _read(settings, images, truth, settings.max_side)
    sizes_N2 = np.array([(photo.shape[1], photo.shape[0]) for photo in small.photos], float)
    for title, fraction in (("the whole image", 1.0), ("central box", 0.7)):
        yield title, best_ious(central_boxes(sizes_N2, fraction), small.truths) >= THRESHOLD
    own = ("key:-1", settings.suited)
    nets = [
        Network("shipped", SHIPPED, None, True, own, "imagenet", settings.max_side),
        Network("untrained", NANO, None, False, own, "imagenet", settings.max_side),
    ]
    if settings.supervised is not None:
        path = str(settings.supervised)
        both = ("key:-1", "value:5")
        nets.append(Network("supervised ViT-Ti", SUPERVISED, path, True, both, "half", 16_384))
    for net in nets:
        probe = small if net.max_side == settings.max_side else _read(
            settings, images, truth, net.max_side
        )  # fmt: skip
        for text in net.features:
            for rule, hits_N in _hits(net, text, probe).items():
                yield f"{net.title}, {text}, {rule}", hits_N


def _read(settings: Settings, images: str, truth: str, max_side: int) -> BoxProbe:
    return read_box_probe(images, truth, max_side=max_side, num_images=settings.num_images)


def _hits(net: Network, text: str, probe: BoxProbe) -> dict[str, NDArray[np.bool_]]:
    feature, _, block = text.partition(":")
    torch.manual_seed(0)
    weights = load_weights(net.name, net.checkpoint) if net.trained else None
    chosen: Any = feature
    backbone = build_backbone(net.name, weights, feature=chosen, block=int(block))
    labeller = PseudoBoxLabeller(
        backbone,
        LocalizationConfig(),
        Provenance("", "", ""),
        forward=ForwardPass(net.normalize),
    )
    found = _boxes_by_rule(labeller, list(probe.photos))
    return {rule: best_ious(boxes, probe.truths) >= THRESHOLD for rule, boxes in found.items()}


def _boxes_by_rule(labeller: PseudoBoxLabeller, images: list[Image]) -> dict[SeedRule, Boxes]:
    """Each image's box by each rule, on the same features."""
    rules: tuple[SeedRule, ...] = ("lost", "solost")
    boxes: dict[SeedRule, Boxes] = {rule: np.zeros((len(images), 4)) for rule in rules}
    for rows in labeller.batches(images):
        batch = [images[row] for row in rows]
        features = labeller.extract(batch)
        sides = np.array([[image.shape[1], image.shape[0]] * 2 for image in batch])
        for rule, boxes_N4 in boxes.items():
            found = localize(features.tokens_BHWD, rule=rule)
            boxes_N4[rows] = np.minimum(found.boxes_B4.numpy() * features.stride, sides)
    return boxes


def _rate(hits_N: NDArray[np.bool_], resamples: int) -> tuple[float, float, float]:
    rng = np.random.default_rng(0)
    rates_R1 = resampled_rates(hits_N[None], num_resamples=resamples, rng=rng)
    low, high = interval_95(rates_R1[:, 0])
    return 100 * float(hits_N.mean()), 100 * low, 100 * high


def _neighbours(network: DINONetwork, settings: Settings) -> float:
    root = str(settings.labelled)
    parts = read_archive(root) if is_archive(root) else read_folder(root)
    assert parts.test is not None
    train, test = (
        _Some(images, count)
        for images, count in (
            (parts.train, settings.neighbours),
            (parts.test, settings.neighbours // 5),
        )
    )
    device = torch.device("cpu")
    return neighbour_accuracy(network, train, test, side=64, device=device)


class _Some:
    """So many images of a collection, spread evenly over it."""

    def __init__(self, images: Any, count: int) -> None:
        self._images = images
        self._index_N = np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64)
        self.targets = images.targets[self._index_N]

    def __len__(self) -> int:
        return len(self._index_N)

    def image(self, index: int) -> Any:
        return self._images.image(int(self._index_N[index]))

    def name(self, index: int) -> str:
        return str(self._images.name(int(self._index_N[index])))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
