"""The papers' own figures, each with where it comes from. Numbers only: what is run is elsewhere.

To add a figure: a value here, and the row that shows it in tables.py.
"""

from dataclasses import dataclass

from pipeline.config.classification import DOMAINS

_DRLOC = "Liu et al., NeurIPS 2021"
LOST_PAPER = "Simeoni et al., BMVC 2021 (LOST's repository)"
SOLOST_REPORT = "SoLOST's report, 2022"
SECOND_HAND = "quoted in later papers, not checked against the first"

Pair = tuple[float, float]
"""Accuracy in per cent without DRLoc and with it."""


@dataclass(frozen=True)
class Published:
    """A figure of a paper, in per cent.

    Attributes:
        value: mean where the paper ran several seeds.
        source: paper and table.
        spread: standard deviation over seeds; None where there was one seed.
    """

    value: float
    source: str
    spread: float | None = None


SOURCE_2A = f"{_DRLOC}, Table 2a: Swin-T, CIFAR-100, 100 epochs, one seed"
PAIRS = {0: 53.28, 32: 63.70, 64: 66.23, 128: 65.16, 256: 64.87}
"""Top-1 by the number of pairs m; 0 is without DRLoc."""

SOURCE_2B = f"{_DRLOC}, Table 2b: CIFAR-100, 100 epochs, one seed"
LAMBDAS = (0.0, 0.1, 0.5, 1.0)
BY_LAMBDA = {
    "cvt": (73.50, 74.51, 74.07, 72.84),
    "swin": (53.28, 58.15, 66.23, 64.28),
    "t2t": (65.16, 68.03, 67.03, 66.53),
}
"""Top-1 by network, in the order of ``LAMBDAS``."""

SOURCE_3 = f"{_DRLOC}, Table 3: ImageNet-100"
IMAGENET100: dict[int, dict[str, Pair]] = {
    100: {"cvt": (85.62, 86.09), "swin": (82.66, 83.95), "t2t": (82.67, 83.74)},
    300: {"cvt": (90.16, 90.28), "swin": (89.68, 90.32), "t2t": (87.76, 88.16)},
}
SPREADS_100: dict[str, Pair] = {"cvt": (0.05, 0.12), "swin": (0.10, 0.05), "t2t": (0.01, 0.08)}
"""Over the five seeds of the 100 epochs; the 300 epochs were run once."""

CLASSIFIED = ("cifar10", "cifar100", "flowers102", "svhn", *(f"domainnet-{d}" for d in DOMAINS))
"""The ten data sets of Tables 4 and 5, in their order."""

SOURCE_4 = f"{_DRLOC}, Table 4: from scratch, 100 epochs, one seed"
FROM_SCRATCH: dict[str, tuple[Pair, ...]] = {
    "cvt": (
        *((89.02, 90.30), (73.50, 74.51), (54.29, 56.29), (91.47, 95.36), (60.34, 60.64)),
        *((19.39, 20.05), (54.79, 55.26), (70.10, 70.36), (76.33, 77.05), (56.98, 57.56)),
    ),
    "swin": (
        *((59.47, 83.89), (53.28, 66.23), (34.51, 39.37), (71.60, 94.23), (38.05, 47.47)),
        *((8.20, 10.16), (35.92, 41.86), (24.08, 69.41), (73.47, 75.59), (11.97, 38.55)),
    ),
    "t2t": (
        *((84.19, 87.56), (65.16, 68.03), (31.73, 34.35), (95.36, 96.49), (43.55, 52.36)),
        *((6.89, 9.51), (34.24, 42.78), (69.83, 70.16), (73.93, 74.63), (31.51, 51.95)),
    ),
    "resnet50": (
        *((91.78, 92.03), (72.80, 72.94), (46.92, 47.65), (96.45, 96.53), (63.73, 63.93)),
        *((19.81, 20.79), (53.22, 53.52), (71.38, 71.57), (75.28, 75.56), (60.08, 59.62)),
    ),
}
"""In the order of ``CLASSIFIED``."""

SOURCE_5 = f"{_DRLOC}, Table 5: fine-tuned from ImageNet-1K, 100 epochs, one seed"
FINE_TUNED: dict[str, tuple[Pair, ...]] = {
    "swin": (
        *((97.95, 98.37), (88.22, 88.40), (98.03, 98.21), (96.10, 97.87), (73.51, 79.51)),
        *((41.07, 46.10), (72.99, 73.28), (75.81, 76.01), (85.48, 85.61), (72.37, 72.86)),
    ),
    "t2t": (
        *((98.37, 98.52), (87.33, 87.65), (97.98, 98.08), (97.03, 98.20), (74.59, 78.22)),
        *((38.53, 45.69), (72.29, 72.42), (74.16, 74.27), (84.56, 84.57), (72.18, 72.29)),
    ),
    "resnet50": (
        *((97.65, 97.74), (85.44, 85.65), (96.59, 96.72), (96.60, 96.71), (75.22, 75.51)),
        *((44.30, 44.39), (66.58, 69.03), (72.12, 72.21), (80.40, 80.54), (67.77, 68.14)),
    ),
}
"""In the order of ``CLASSIFIED``."""

PHOTO_SETS = ("voc07", "voc12", "coco20k")
"""What CorLoc is told on, in the papers' order."""

Triple = tuple[float, float, float]
"""CorLoc in per cent on each of ``PHOTO_SETS``."""

LOST_ON_DINO: Triple = (61.9, 64.0, 50.7)
LOST_AND_CAD: Triple = (65.7, 70.4, 57.5)
DINO_SEG: Triple = (45.8, 46.2, 42.1)

LOST_BACKBONES: dict[str, Triple] = {
    "vit-s16": LOST_ON_DINO,
    "vit-s8": (55.5, 57.0, 49.5),
    "vit-b16": (60.1, 63.3, 50.0),
    "resnet50-dino": (36.8, 42.7, 26.5),
    "resnet50": (33.5, 39.1, 25.5),
}
LOST_FEATURES = {"query": 30.8, "value": 50.5, "key": 61.9}
"""ViT-S/16 on VOC07."""

LOST_DEIT = 16.9
"""The same network trained with labels, on VOC07."""

RULES: dict[str, dict[str, Triple]] = {
    "lost": {
        "vit-s16": (61.5, 64.1, 50.7),
        "vit-s8": (55.3, 57.0, 49.8),
        "vit-b16": (60.0, 63.3, 50.0),
        "resnet50-dino": (36.8, 42.7, 26.5),
        "resnet50": (33.8, 39.1, 25.5),
        "vgg16": (41.4, 47.2, 30.2),
    },
    "solost": {
        "vit-s16": (62.2, 64.8, 52.2),
        "vit-s8": (59.8, 64.3, 51.1),
        "vit-b16": (61.8, 64.4, 52.0),
        "resnet50-dino": (34.6, 39.6, 24.8),
        "resnet50": (32.6, 37.9, 24.7),
        "vgg16": (41.9, 48.9, 30.7),
    },
    "lost-cosine": {
        "vit-s16": (61.7, 64.3, 50.7),
        "vit-s8": (55.3, 57.2, 49.9),
        "vit-b16": (60.1, 63.4, 50.0),
    },
    "lost-pearson": {
        "vit-s16": (61.6, 64.1, 50.6),
        "vit-s8": (55.0, 57.1, 49.8),
        "vit-b16": (60.3, 63.4, 50.3),
    },
}
"""The report's own runs, by the rule that expands the seed and then by backbone."""

OTHERS_ON_VOC07 = {"TokenCut": 68.8, "FOUND": 72.5}
"""CorLoc on VOC07 trainval, ViT-S/16 DINO, of methods that are not run here."""

CAD_AP50 = {
    "voc07-test": (23.39, 25.68),
    "voc07-trainval": (23.71, 25.72),
    "voc12-trainval": (30.68, 30.96),
    "coco20k-trainval": (8.8, 9.1),
}
"""AP50 of a detector trained on LOST's and on SoLOST's boxes, by the images it was measured on."""

CAD_CORLOC = {
    "voc07-trainval": (60.65, 61.15),
    "voc12-trainval": (67.68, 67.11),
    "coco20k-trainval": (53.3, None),
}
"""CorLoc of the same detectors' best boxes; None is not told."""
