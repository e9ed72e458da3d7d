"""Which block, and which of query, key and value, suit a ViT, and whether a head can be trusted.

    python -m benchmarks.feature_sweep --images PHOTOS --ground-truth GT \
        --name vit_tiny_patch16_224 --checkpoint VIT.safetensors --normalize half

CorLoc of every rule for each, on the same images, and what the guard of a head looks at: the share
of patches on objects, the AUC across images, the agreement with the cuts, the border. ``--spoil``
adds features damaged on purpose: blurred over neighbours, or shuffled among the patches of each
image. DINO wants the keys of its last block. A network trained on labels does not, and this finds
what it wants instead. The standard error of a rate near 50 % over n images is 50 / sqrt(n) points.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.timing import print_table, write_json
from pipeline.boxes import Boxes, as_boxes
from pipeline.config import LabelJob
from pipeline.config.labelling import Feature
from pipeline.config.settings import Normalization
from pipeline.evaluation.corloc import best_ious, corloc
from pipeline.labelling.outcomes import in_original_pixels
from pipeline.localization.head import Head
from pipeline.localization.head_fit import CutImages, fit_head, why_not
from pipeline.localization.localize import Localization, localize
from pipeline.models.backbones import load_weights
from pipeline.storage import Location
from pipeline.tuning.feature_cache import FeatureCache, Sample
from pipeline.tuning.localization_sweep import Wanted, fill

Spoil = Literal["none", "blur", "shuffle"]
Batch = tuple[list[int], Tensor]
"""Rows of the sample that share a grid, and their features."""


@dataclass(frozen=True)
class Settings:
    """What to sweep over."""

    images: str
    ground_truth: str
    name: str
    checkpoint: str | None = None
    normalize: Normalization = "imagenet"
    num_images: int = 500
    max_side: int = 1024
    features: tuple[Feature, ...] = ("query", "key", "value")
    blocks: tuple[int, ...] = ()
    """Which blocks; none means all."""
    spoil: tuple[Spoil, ...] = ("none",)
    output: Path = Path("benchmarks/results/feature_sweep.json")


@dataclass(frozen=True)
class Row:
    """CorLoc in %, and what the guard sees; the head is tried whatever that is."""

    source: str
    spoilt: str
    lost: float
    solost: float
    ncut: float
    head_1: float = float("nan")
    """After one fit."""
    head: float = float("nan")
    share: float = float("nan")
    auc: float = float("nan")
    agreement: float = float("nan")
    border: float = float("nan")
    verdict: str = "refused: fewer than two cuts"


def main(settings: Settings) -> None:
    """Measure every block, feature and rule on the same images; print and keep CorLoc."""
    weights = load_weights(settings.name, settings.checkpoint)
    depth = 1 + max(int(n.split(".")[1]) for n in weights.state_dict if n.startswith("blocks."))
    blocks = settings.blocks or range(depth)
    sources = tuple((feature, block) for block in blocks for feature in settings.features)
    job = LabelJob.model_validate(
        {
            "images": settings.images,
            "output": "none",
            "backbone": {
                "name": settings.name,
                "checkpoint": settings.checkpoint,
                "feature": sources[0][0],
                "block": sources[0][1],
                "normalize": settings.normalize,
            },
            "decode": {"max_side": settings.max_side},
        }
    )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Location.parse(folder).child("features"))
        # Half precision: all features of a hundred photos take 4 GB.
        wanted = Wanted(job, settings.ground_truth, settings.num_images, sources, "fp16")
        fill(cache, wanted, lambda line: print(line, flush=True))
        sample = cache.sample()
        for source in sources:
            for spoil in settings.spoil:
                batches = [(r, _SPOILT[spoil](one)) for r, one in cache.features(source)]
                rows.append(measured(f"{source[1]} {source[0]}", spoil, batches, sample))
                print(*_cells(rows[-1]), flush=True)
    title = f"CorLoc (%) on {len(sample.objects)} images, {settings.name}"
    print_table(title, list(asdict(rows[0])), [_cells(row) for row in rows])
    write_json(
        settings.output,
        {"title": title, "rows": [asdict(row) for row in rows], "torch": torch.__version__},
    )


def measured(source: str, spoil: str, batches: list[Batch], sample: Sample) -> Row:
    """Every rule on these features."""

    def rate(of_batch: Callable[[Tensor], Localization]) -> float:
        boxes_N4: NDArray[np.float64] = np.zeros((len(sample.objects), 4))
        for rows, tokens_BHWD in batches:
            boxes_N4[rows] = _pixels(of_batch(tokens_BHWD), sample, rows)
        return 100 * corloc(best_ious(as_boxes(boxes_N4), sample.objects))

    def of_head(head: Head) -> float:
        return rate(lambda tokens_BHWD: localize(tokens_BHWD, rule="head", head=head))

    cuts = [localize(tokens_BHWD, rule="ncut") for _, tokens_BHWD in batches]
    cut_of = iter(cuts)
    row = Row(
        source,
        spoil,
        lost=rate(lambda tokens_BHWD: localize(tokens_BHWD, rule="lost")),
        solost=rate(lambda tokens_BHWD: localize(tokens_BHWD, rule="solost")),
        ncut=rate(lambda tokens_BHWD: next(cut_of)),
    )
    images = [
        CutImages(tokens_BHWD, cut.mask_BHW)
        for (_, tokens_BHWD), cut in zip(batches, cuts, strict=True)
    ]
    try:
        fit = fit_head(lambda: images)
    except ValueError as fault:
        return Row(**{**asdict(row), "verdict": f"refused: {fault}"})
    refused = why_not(fit)
    of_fit = {
        "head_1": of_head(fit.rounds[0]),
        "head": of_head(fit.head),
        "share": fit.head.share,
        "auc": fit.auc,
        "agreement": fit.agreement,
        "border": fit.border,
        "verdict": "kept" if refused is None else f"refused: {refused}",
    }
    return Row(**{**asdict(row), **of_fit})


def _pixels(found: Localization, sample: Sample, rows: list[int]) -> Boxes:
    boxes_B4 = in_original_pixels(
        found.boxes_B4.numpy(), sample.stride, sample.seen_N2[rows], sample.sizes_N2[rows]
    )
    return np.where(found.found_B.numpy()[:, None], boxes_B4, 0)


def _blurred(tokens_BHWD: Tensor) -> Tensor:
    """Each patch the mean of the seven by seven around it."""
    channels_first = tokens_BHWD.permute(0, 3, 1, 2)
    return avg_pool2d(channels_first, 7, 1, 3, count_include_pad=False).permute(0, 2, 3, 1)


def _shuffled(tokens_BHWD: Tensor) -> Tensor:
    """Each image's patches in another order, as if it had no objects."""
    height, width = tokens_BHWD.shape[1:3]
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
    return tokens_BHWD.flatten(1, 2)[:, order].reshape(tokens_BHWD.shape)


_SPOILT: dict[Spoil, Callable[[Tensor], Tensor]] = {
    "none": lambda tokens_BHWD: tokens_BHWD,
    "blur": _blurred,
    "shuffle": _shuffled,
}


def _cells(row: Row) -> list[str]:
    rates = [f"{rate:.1f}" for rate in (row.lost, row.solost, row.ncut, row.head_1, row.head)]
    seen = [f"{value:.3f}" for value in (row.share, row.auc, row.agreement, row.border)]
    return [row.source, row.spoilt, *rates, *seen, row.verdict.partition(":")[0]]


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
