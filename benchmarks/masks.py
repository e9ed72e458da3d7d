"""Masks against the exact ones of procedural scenes: patches, and refined to the image's edges.

    python -m benchmarks.masks --seed 12
    python -m benchmarks.masks --seed 11 --sweep   # how the filter's constants were chosen
    python -m benchmarks.masks --backbone vit_tiny_patch16_224 --checkpoint VIT.safetensors \
        --block 5 --normalize half --max-side 16384

Per rule, of the object that a mask fits best: IoU, and how well the edges meet (F of precision and
recall of edge pixels within 2 px of the other's; Perazzi et al., CVPR 2016), at the resolution of
the original image. An image where nothing was found counts 0. The head is fitted on the very
scenes, without their masks. "exact" are the true masks rounded to patches: what is left to refine
where the rule is right.

Shape letters:  H, W rows and columns of patches   h, w of pixels   N images
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from benchmarks.timing import print_table, write_json
from pipeline.config import LocalizationConfig
from pipeline.config.labelling import Rule
from pipeline.config.settings import Normalization
from pipeline.data.masks import at_pixels, encode
from pipeline.labelling.labeller import ForwardPass, Provenance, PseudoBoxLabeller
from pipeline.localization.head_fit import CutImages, fit_head
from pipeline.localization.localize import localize
from pipeline.localization.refine import EPSILON, RADIUS, refine_mask
from pipeline.models.backbones import build_backbone, load_weights
from pipeline.models.features import PatchFeatures
from pipeline.scenes.scenes import SIZES, Scene, make_scene

Mask = NDArray[np.bool_]
Refine = Callable[[Mask, NDArray[np.uint8], int], Mask]

RULES: tuple[Rule, ...] = ("solost", "ncut", "head")
HIT = 0.5
_REACH = np.hypot(*np.mgrid[-2:3, -2:3]) <= 2


@dataclass(frozen=True)
class Settings:
    """Which scenes, and what looks at them."""

    seed: int = 12
    num_scenes: int = 200
    backbone: str = "vit_nano_patch8.dino"
    checkpoint: str | None = None
    block: int = 3
    """Whose values are the features."""
    normalize: Normalization = "imagenet"
    max_side: int = 224
    """Longer side of the image as the network sees it, and as masks are refined on."""
    sweep: bool = False
    """Print a row per radius and epsilon, of all rules together."""
    output: Path = Path("benchmarks/results/masks.json")


@dataclass(frozen=True, eq=False)
class Seen:
    """A scene, its pixels as the network sees them, and a mask of patches per rule."""

    scene: Scene
    pixels_hw3: NDArray[np.uint8]
    stride: int
    masks: dict[str, Mask] = field(default_factory=dict)


def main(settings: Settings) -> None:
    """Measure, print and keep."""
    torch.manual_seed(0)
    seen = look_at_scenes(settings)
    if settings.sweep:
        sweep(seen)
        return
    rows: list[list[str]] = []
    result: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for rule in (*RULES, "exact"):
        coarse_N2, _ = scores(seen, rule, None)
        fine_N2, seconds = scores(seen, rule, refine_mask)
        gain_N2 = fine_N2 - coarse_N2
        resampled_RN = rng.integers(0, len(gain_N2), (2000, len(gain_N2)))
        low_2, high_2 = np.percentile(gain_N2[resampled_RN].mean(axis=1), [2.5, 97.5], axis=0)
        hit_N = coarse_N2[:, 0] >= HIT
        told = {
            "patches": coarse_N2.mean(axis=0),
            "refined": fine_N2.mean(axis=0),
            "gain_low": low_2,
            "gain_high": high_2,
            "hits": np.array([hit_N.mean(), (fine_N2[:, 0] >= HIT).mean()]),
            "patches_of_hits": coarse_N2[hit_N].mean(axis=0),
            "refined_of_hits": fine_N2[hit_N].mean(axis=0),
            "worse": np.array([(gain_N2 < -0.02)[:, place].mean() for place in (0, 1)]),
        }
        result[rule] = {name: values.tolist() for name, values in told.items()}
        result[rule]["milliseconds"] = 1000 * seconds
        for place, name in enumerate(("IoU", "F at 2 px")):
            one = {key: f"{100 * values[place]:.1f}" for key, values in told.items()}
            rows.append(
                [
                    f"{rule}, {name}",
                    *(one[key] for key in ("patches", "refined")),
                    f"[{one['gain_low']}, {one['gain_high']}]",
                    *(one[key] for key in ("patches_of_hits", "refined_of_hits", "worse")),
                ]
            )
        rows.append([f"{rule}, IoU >= .5", *(f"{100 * share:.1f}" for share in told["hits"])])
        print(f"{rule}: {1000 * seconds:.1f} ms an image to refine", flush=True)
    print_table(
        f"Masks (%) of {len(seen)} scenes, seed {settings.seed}, {settings.backbone}",
        ["mask", "patches", "refined", "gain, 95 %", "of hits: patches", "refined", "worse by .02"],
        [row + [""] * (7 - len(row)) for row in rows],
    )
    kept = {**vars(settings), "output": None}
    write_json(settings.output, {"settings": kept, "result": result})


def sweep(seen: list[Seen]) -> None:
    """The filter's constants, on all rules' masks together."""
    rows = []
    for radius, epsilon in product((1.0, 1.5, 2.0, 2.5, 3.0), (1e-5, 1e-4, 1e-3)):

        def refine(
            mask_HW: Mask,
            pixels_hw3: NDArray[np.uint8],
            stride: int,
            knobs: tuple[float, float] = (radius, epsilon),
        ) -> Mask:
            return refine_mask(mask_HW, pixels_hw3, stride, radius=knobs[0], epsilon=knobs[1])

        means = np.mean([scores(seen, rule, refine)[0].mean(axis=0) for rule in RULES], axis=0)
        mark = " (chosen)" if (radius, epsilon) == (RADIUS, EPSILON) else ""
        rows.append([f"{radius:g}, {epsilon:g}{mark}", *(f"{100 * mean:.2f}" for mean in means)])
        print(*rows[-1], flush=True)
    print_table("Radius in patches, epsilon", ["", "IoU", "F at 2 px"], rows)


def look_at_scenes(settings: Settings) -> list[Seen]:
    """The scenes with the masks of every rule."""
    network = build_backbone(
        settings.backbone,
        load_weights(settings.backbone, settings.checkpoint),
        feature="value",
        block=settings.block,
    )
    labeller = PseudoBoxLabeller(
        network,
        LocalizationConfig(),
        Provenance("", "", ""),
        forward=ForwardPass(settings.normalize),
    )
    scenes = list(scenes_of(settings))
    images = [scaled(scene.pixels_HW3, settings.max_side) for scene in scenes]
    batches = [
        (rows, labeller.extract([images[row] for row in rows])) for rows in labeller.batches(images)
    ]
    masks: list[dict[str, Mask]] = [{} for _ in scenes]
    for rule in RULES:
        head = fit_head(lambda: cuts(batches)).head if rule == "head" else None
        for rows, features in batches:
            found = localize(features.tokens_BHWD, rule=rule, head=head)
            for row, mask_HW in zip(rows, found.mask_BHW.numpy(), strict=True):
                masks[row][rule] = mask_HW
    stride = batches[0][1].stride
    seen = [
        Seen(scene, image, stride, found)
        for scene, image, found in zip(scenes, images, masks, strict=True)
    ]
    for one in seen:
        one.masks["exact"] = in_patches(one)
    return seen


def scenes_of(settings: Settings) -> Iterator[Scene]:
    """Those of ``scenes.write_collection``, before the JPEG."""
    for index in range(settings.num_scenes):
        width, height = SIZES[index % len(SIZES)]
        sequence = np.random.SeedSequence([settings.seed, index])
        child = int(sequence.generate_state(1, np.uint64)[0])
        yield make_scene(child, width=width, height=height)


def scaled(pixels_hw3: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    """No side longer than ``max_side``."""
    picture = Image.fromarray(pixels_hw3)
    scale = min(1.0, max_side / max(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    return np.array(picture.resize(size, Image.Resampling.LANCZOS))


def cuts(batches: Iterable[tuple[list[int], PatchFeatures]]) -> Iterator[CutImages]:
    """What the head is fitted on."""
    for _, features in batches:
        tokens_BHWD = features.tokens_BHWD
        yield CutImages(tokens_BHWD, localize(tokens_BHWD, rule="ncut").mask_BHW)


def in_patches(seen: Seen) -> Mask:
    """The patches of whose part in the image the main object has at least half."""
    grid = next(iter(seen.masks.values())).shape
    height, width = seen.pixels_hw3.shape[:2]
    truth = Image.fromarray(seen.scene.masks_NHW[0].astype(np.float32))
    truth_hw = np.array(truth.resize((width, height), Image.Resampling.BOX))
    padded_hw = np.full((grid[0] * seen.stride, grid[1] * seen.stride), np.nan)
    padded_hw[:height, :width] = truth_hw
    tiled = padded_hw.reshape(grid[0], seen.stride, grid[1], seen.stride)
    shares_HW = np.nanmean(tiled, axis=(1, 3))
    return np.asarray(shares_HW >= 0.5)


def scores(seen: list[Seen], rule: str, refine: Refine | None) -> tuple[NDArray[Any], float]:
    """IoU and edge F of each scene, ``(N, 2)``, and the seconds an image takes to refine."""
    found_N2 = np.zeros((len(seen), 2))
    seconds = 0.0
    for row, one in enumerate(seen):
        mask, cell = one.masks[rule], one.stride
        if refine is not None:
            started = time.perf_counter()
            mask, cell = refine(mask, one.pixels_hw3, one.stride), 1
            seconds += time.perf_counter() - started
        true_Nhw = one.scene.masks_NHW
        height, width = true_Nhw.shape[1:]
        high, wide = one.pixels_hw3.shape[:2]
        stored = encode(mask, (cell * width / wide, cell * height / high))
        mask_hw = at_pixels(stored, width, height)
        ious = [iou(mask_hw, true_hw) for true_hw in true_Nhw]
        best = int(np.argmax(ious))
        found_N2[row] = ious[best], edge_f(mask_hw, true_Nhw[best])
    return found_N2, seconds / len(seen)


def iou(one_hw: Mask, other_hw: Mask) -> float:
    """0 where both are empty."""
    return float((one_hw & other_hw).sum() / max(1, (one_hw | other_hw).sum()))


def edge_f(one_hw: Mask, other_hw: Mask) -> float:
    """How well the edges meet; the border of the image is no edge."""
    edges = [
        mask_hw & ~ndimage.binary_erosion(mask_hw, border_value=1) for mask_hw in (one_hw, other_hw)
    ]
    if not edges[0].any() or not edges[1].any():
        return 0.0
    shares = [
        (edge_hw & ndimage.binary_dilation(near_hw, _REACH)).sum() / edge_hw.sum()
        for edge_hw, near_hw in (edges, edges[::-1])
    ]
    return float(2 * shares[0] * shares[1] / max(sum(shares), 1e-9))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
