"""How fast the labeller is, as ratios measured in one run on the same images and threads.

    python -m benchmarks.labelling --images PHOTOS --checkpoint VIT.safetensors

(a) an image-by-image loop as the published code works: batch 1, fp32, the whole forward pass with
    the last attention, post-processing per image with a Python loop over the patches
(b) our labeller, fp32        (c) our labeller, bf16, and how many of its boxes are those of (b)
(d) the bare forward pass that (b) needs, at (b)'s batches
(e) the whole Ray job, its start-up taken off; (h) the same with a head

Beside (d) stands what each rule costs on its features: SoLOST, the cut, a head's box, a head's many
boxes. Read from pixels in memory, because decoding is the same work for all; (e) and (h) read and
decode files.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import tyro
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from benchmarks.bulk_jobs import ray_seconds_per_image, repeated_inputs
from benchmarks.timing import best_seconds, print_table, write_json
from pipeline.boxes import aligned_iou
from pipeline.config import BackboneConfig, ComputeConfig, ImagesConfig, LocalizationConfig
from pipeline.data.lake import Collection
from pipeline.data.pixels import load_pixels, pixels_of_row
from pipeline.labelling.labeller import (
    ForwardPass,
    Provenance,
    PseudoBoxes,
    PseudoBoxLabeller,
)
from pipeline.localization.head import Head
from pipeline.localization.head_fit import CutImages, fit_head
from pipeline.localization.localize import localize
from pipeline.localization.objects import objects_at_levels
from pipeline.models.backbones import build_backbone, load_weights
from pipeline.models.checkpoints import Weights
from pipeline.models.features import NORMALIZATIONS, PatchFeatures, normalize_and_pad


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    images: str
    name: str = "vit_small_patch16_224"
    checkpoint: str | None = None
    """Without it the network is random: fine for speed, meaningless for (c)'s boxes."""
    feature: Literal["key", "query", "value"] = "key"
    block: int = -1
    normalize: Literal["imagenet", "half"] = "half"
    num_images: int = 96
    num_images_ray: int = 1000
    threads: int = len(os.sched_getaffinity(0))
    rounds: int = 2
    output: Path = Path("benchmarks/results/labelling.json")


class PublishedLoop:
    """SoLOST as its authors run it, one image after another."""

    def __init__(self, vit: Any, settings: Settings, *, fused: bool) -> None:
        self.vit, self.settings = vit, settings
        for block in vit.blocks:
            block.attn.fused_attn = fused
        self.qkv: Tensor | None = None
        vit.blocks[settings.block].attn.qkv.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.qkv = output

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.uint8]) -> list[int]:
        mean, std = NORMALIZATIONS[self.settings.normalize]
        pixels = normalize_and_pad([image], multiple=16, mean=mean, std=std)
        self.vit.forward_features(pixels)
        assert self.qkv is not None
        width = self.qkv.shape[-1] // 3
        third = ("query", "key", "value").index(self.settings.feature)
        patches = self.qkv[0, 1:, third * width : (third + 1) * width]
        return self._box(patches, pixels.shape[2] // 16, pixels.shape[3] // 16)

    def _box(self, patches: Tensor, rows: int, columns: int) -> list[int]:
        unit = patches / patches.norm(dim=-1, keepdim=True)
        similarity = unit @ unit.T
        linked = (similarity > 0).float().fill_diagonal_(0)
        order = linked.sum(dim=1).argsort(stable=True)
        seed = order[0]
        related = torch.nonzero(similarity[seed] > 0).flatten()
        # One membership test per patch, in Python, as the published code has it.
        ranked = [patch for patch in order if patch in related]
        chosen = torch.stack(ranked[: max(1, int(0.5 * len(ranked)))])
        mask = (similarity[chosen].sum(dim=0) > 0).reshape(rows, columns).numpy()
        labels, _ = ndimage.label(mask)
        ys, xs = np.nonzero(labels == labels[seed // columns, seed % columns])
        return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


def published_vit(settings: Settings, weights: Weights | None) -> Any:
    """The whole network, with every block and both halves of it."""
    import timm

    vit = timm.create_model(settings.name, num_classes=0, dynamic_img_size=True).eval()
    if weights is not None:
        vit.load_state_dict({k: v for k, v in weights.state_dict.items() if "head" not in k})
    return vit


def job_seconds_per_image(settings: Settings, weights: Weights, head: Head | None) -> float:
    """(e), and with a head (h)."""
    backbone = BackboneConfig(
        name=settings.name,
        feature=settings.feature,
        block=settings.block,
        normalize=settings.normalize,
    )
    return ray_seconds_per_image(
        PseudoBoxes(
            backbone,
            weights,
            LocalizationConfig(rule="solost" if head is None else "head"),
            head=head,
        ),
        repeated_inputs(Collection(settings.images).chunks(), settings.num_images_ray),
        Provenance("benchmark", "", weights.sha256),
        ImagesConfig(),
        ComputeConfig(num_actors=settings.threads),
    )


def head_of(kept: list[PatchFeatures]) -> Head:
    """Fitted on the cuts of these images."""
    images = [
        CutImages(one.tokens_BHWD, localize(one.tokens_BHWD, rule="ncut").mask_BHW) for one in kept
    ]
    return fit_head(lambda: images).head


def boxes_of(table: pa.Table) -> NDArray[np.float64]:
    """``(N, 4)`` boxes of a labelled table."""
    return np.array([boxes[0] for boxes in table["boxes"].to_pylist()])


def main(settings: Settings) -> None:
    """Measure, print the ratios and keep them."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    chunks = pa.concat_tables(list(Collection(settings.images).chunks()))
    decode = ImagesConfig().model_dump()
    decoded = load_pixels(chunks.slice(0, settings.num_images), **decode)
    decoded = decoded.filter(pa.compute.equal(decoded["status"], "ok"))
    images = [
        i for row in range(decoded.num_rows) if (i := pixels_of_row(decoded, row)) is not None
    ]
    if settings.checkpoint:
        weights = load_weights(settings.name, settings.checkpoint)
    else:
        weights = Weights(published_vit(settings, None).state_dict(), "random", "random")

    def labeller(precision: Literal["fp32", "bf16"]) -> PseudoBoxLabeller:
        network = build_backbone(
            settings.name, weights, feature=settings.feature, block=settings.block
        )
        return PseudoBoxLabeller(
            network,
            LocalizationConfig(),
            Provenance("benchmark", "", ""),
            forward=ForwardPass(settings.normalize, precision),
        )

    ours, half = labeller("fp32"), labeller("bf16")
    batches = [[images[row] for row in rows] for rows in ours.batches(images)]
    mean, std = NORMALIZATIONS[settings.normalize]
    tensors = [normalize_and_pad(batch, multiple=16, mean=mean, std=std) for batch in batches]
    kept: list[PatchFeatures] = []

    @torch.inference_mode()
    def forward() -> None:
        kept.clear()
        kept.extend(ours.backbone(tensor) for tensor in tensors)

    published = PublishedLoop(published_vit(settings, weights), settings, fused=False)
    fused = PublishedLoop(published_vit(settings, weights), settings, fused=True)
    forward()
    head = head_of(kept)

    def many() -> None:
        for features in kept:
            found = localize(features.tokens_BHWD, rule="head", head=head)
            assert found.map_BHW is not None
            objects_at_levels(found.map_BHW, max_objects=10, nms_iou=0.5)

    ways: dict[str, Callable[[], object]] = {
        "a": lambda: [published(image) for image in images],
        "a, fused attention": lambda: [fused(image) for image in images],
        "b": lambda: ours(decoded),
        "c": lambda: half(decoded),
        "d": forward,
        "solost": lambda: [localize(features.tokens_BHWD) for features in kept],
        "ncut": lambda: [localize(features.tokens_BHWD, rule="ncut") for features in kept],
        "head": lambda: [localize(one.tokens_BHWD, rule="head", head=head) for one in kept],
        "many": many,
    }
    seconds = {n: s / len(images) for n, s in best_seconds(ways, settings.rounds).items()}
    seconds["e"] = job_seconds_per_image(settings, weights, None)
    seconds["h"] = job_seconds_per_image(settings, weights, head)
    overlap = aligned_iou(boxes_of(ours(decoded)), boxes_of(half(decoded)))
    report(settings, len(images), seconds, overlap)


def report(
    settings: Settings, num_images: int, seconds: dict[str, float], overlap: NDArray[np.float64]
) -> None:
    """Print the ratios beside the aims, and keep them."""
    aims = [
        ("b is this much faster than a", seconds["a"] / seconds["b"], ">= 1.25"),
        (
            "b is faster than a with fused attention",
            seconds["a, fused attention"] / seconds["b"],
            "",
        ),
        ("c is this much faster than a", seconds["a"] / seconds["c"], ">= 2"),
        ("share of c's boxes with IoU > 0.95 to b's", float((overlap > 0.95).mean()), ">= 0.98"),
        ("share of c's boxes identical to b's", float((overlap == 1).mean()), ""),
        ("speed of b as a share of d", seconds["d"] / seconds["b"], ""),
        ("speed of e as a share of d", seconds["d"] / seconds["e"], ">= 0.85"),
        ("speed of h as a share of e", seconds["e"] / seconds["h"], ">= 1"),
        ("SoLOST as a share of d", seconds["solost"] / seconds["d"], "<= 0.02"),
        ("the cut as a share of d", seconds["ncut"] / seconds["d"], "<= 0.04"),
        ("a head's box as a share of d", seconds["head"] / seconds["d"], "<= 0.005"),
        ("a head's many boxes as a share of d", seconds["many"] / seconds["d"], "<= 0.01"),
    ]
    title = (
        f"{settings.name} {settings.feature} block {settings.block}, {num_images} images, "
        f"{settings.threads} threads, {'given' if settings.checkpoint else 'random'} weights"
    )
    rows = [[name, f"{value:.3f}", aim] for name, value, aim in aims]
    print_table(title, ["ratio", "measured", "aim"], rows)
    write_json(
        settings.output,
        {
            "title": title,
            "ratios": {name: value for name, value, _ in aims},
            "images_per_second": {name: 1 / value for name, value in seconds.items()},
            "torch": torch.__version__,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
