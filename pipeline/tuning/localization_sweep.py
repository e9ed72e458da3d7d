"""Trials of labelling that share forward passes: features once, then boxes and CorLoc per trial.

``fill`` sees each image once and keeps every feature that the space may ask for; ``measured`` is a
trial. On a cache of fp32 its CorLoc is that of label_images.py and evaluate_boxes.py, exactly; a
head is fitted on the images of the sweep instead of a sample of the collection.

Shape letters:  N images   B images of a batch
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.boxes import as_boxes
from pipeline.config import LabelJob, LocalizationConfig
from pipeline.data.ground_truth import GroundTruth, read_ground_truth
from pipeline.data.lake import Collection
from pipeline.data.pixels import load_pixels
from pipeline.data.pseudo_labels import config_hash
from pipeline.errors import DataError
from pipeline.evaluation.corloc import best_ious, corloc
from pipeline.evaluation.predictions import Prediction, match
from pipeline.labelling.labeller import ForwardPass, Image, PseudoBoxLabeller
from pipeline.labelling.outcomes import in_original_pixels
from pipeline.labelling.rows import Provenance, decoded_images
from pipeline.localization.head import Head
from pipeline.localization.head_fit import CutImages, fit_head, why_not
from pipeline.localization.localize import localize
from pipeline.models.backbones import load_weights, with_recipe
from pipeline.models.checkpoints import Weights
from pipeline.models.features import NORMALIZATIONS, in_precision, normalize_and_pad, padded_size
from pipeline.storage import Location
from pipeline.tuning.feature_cache import (
    BYTES,
    FeatureBatch,
    FeatureCache,
    ManyFeatures,
    Sample,
    Source,
    gib,
)
from pipeline.tuning.space import Choice, Space

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a sweep's cache must hold."""

    job: LabelJob
    ground_truth: str
    num_images: int | None
    sources: tuple[Source, ...]
    precision: str
    device: str = "cpu"


def sources_of(space: Space, job: LabelJob) -> tuple[Source, ...]:
    """Every feature of every block that a trial may ask for."""
    backbone = with_recipe(job.backbone)
    features, blocks = (
        knob.values if isinstance(knob := space.knobs.get(name), Choice) else (base,)
        for name, base in (
            ("backbone.feature", backbone.feature),
            ("backbone.block", backbone.block),
        )
    )
    return tuple((feature, int(block)) for feature in features for block in blocks)


def fill(cache: FeatureCache, wanted: Wanted, tell: Tell) -> None:
    """Compute all features that are wanted, unless the cache holds them.

    Raises:
        DataError: no image is annotated, or annotations cannot be read.
        StorageError: the disk has no room.
        ConfigError, WeightsError: the network is not to be had.
    """
    backbone = with_recipe(wanted.job.backbone)
    job = wanted.job.model_copy(update={"backbone": backbone})
    wanted = replace(wanted, job=job)
    weights = load_weights(backbone.name, backbone.checkpoint)
    chosen, truths, num_missing = _annotated(job.images, wanted.ground_truth, wanted.num_images)
    key = _key(wanted, weights, chosen["uri"].to_pylist())
    if cache.holds(key, wanted.sources):
        tell(f"features are in {cache.folder}")
        return
    many = ManyFeatures(backbone.name, weights, wanted.sources)
    blocks = [
        chosen.slice(start, job.compute.block_size)
        for start in range(0, chosen.num_rows, job.compute.block_size)
    ]
    _require_room(cache, wanted, many, blocks, tell)
    cache.delete()
    seen: list[tuple[int, int]] = []
    sizes: list[tuple[int, int]] = []
    batches: list[FeatureBatch] = []
    for number, (decoded, images) in enumerate(_decoded(job, blocks)):
        first = len(seen)
        seen += [(0, 0) if one is None else (one.shape[1], one.shape[0]) for one in images]
        original = zip(decoded["width"].to_pylist(), decoded["height"].to_pylist(), strict=True)
        sizes += [(width or 0, height or 0) for width, height in original]
        batches += _forward(cache, wanted, many, images, (number, first))
    sample = Sample(
        np.array(seen, np.float64),
        np.array(sizes, np.float64),
        [one.boxes_N4 for one in truths],
        num_missing,
        many.backbone.patch_size,
    )
    cache.finish(key, wanted.sources, sample, batches)


def measured(folder: Location, job: LabelJob) -> dict[str, float]:
    """A trial: ``corloc`` and ``mean_best_iou`` of the job's settings, both in [0, 1].

    Raises:
        DataError: the cache is not whole, or has no such feature.
    """
    cache = FeatureCache(folder)
    sample = cache.sample()
    boxes_N4 = np.zeros((len(sample.objects), 4))
    backbone = with_recipe(job.backbone)
    source = (backbone.feature, backbone.block)
    head = _head(cache, source, job.localization)
    knobs = job.localization.arguments()
    if head is None and job.localization.rule == "head":
        knobs["rule"] = "ncut"
    for rows, tokens_BHWD in cache.features(source):
        found = localize(tokens_BHWD, head=head, **knobs)
        boxes_B4 = in_original_pixels(
            found.boxes_B4.numpy(), sample.stride, sample.seen_N2[rows], sample.sizes_N2[rows]
        )
        boxes_N4[rows] = np.where(found.found_B.numpy()[:, None], boxes_B4, 0)
    # As the table of labels holds them.
    best_N = best_ious(as_boxes(boxes_N4.astype(np.float32)), sample.objects)
    best_N = np.concatenate([best_N, np.zeros(sample.num_missing)])
    return {"corloc": corloc(best_N), "mean_best_iou": float(best_N.mean())}


def _head(cache: FeatureCache, source: Source, settings: LocalizationConfig) -> Head | None:
    """Of rule head: fitted on the cached images, whose boxes it does not see; None if refused."""
    if settings.rule != "head":
        return None
    knobs = settings.arguments() | {"rule": "ncut"}
    cuts = [localize(tokens_BHWD, **knobs).mask_BHW for _, tokens_BHWD in cache.features(source)]

    def sample() -> Iterator[CutImages]:
        for (_, tokens_BHWD), cut_BHW in zip(cache.features(source), cuts, strict=True):
            yield CutImages(tokens_BHWD, cut_BHW)

    try:
        fit = fit_head(sample)
    except ValueError:
        # Too few images have a cut: refused as well.
        return None
    return fit.head if why_not(fit) is None or settings.force_head else None


def _annotated(
    images: str, ground_truth: str, num_images: int | None
) -> tuple[pa.Table, list[GroundTruth], int]:
    """Annotated images with an object, in the collection's order; their annotations; how many
    others the annotations have. Names are matched as evaluation/predictions.py does.
    """
    truths = read_ground_truth(Location.parse(ground_truth))
    inputs = pa.concat_tables(list(Collection(images).chunks()))
    names = [Prediction(uri, None) for uri in inputs["uri"].to_pylist()]
    pairs = zip(truths, match(names, truths).predictions, strict=True)
    with_objects = [(truth, one) for truth, one in pairs if len(truth.boxes_N4)]
    by_uri = {one.name: truth for truth, one in with_objects if one is not None}
    rows = [row for row, one in enumerate(names) if one.name in by_uri][:num_images]
    if not rows:
        raise DataError(f"none of {inputs.num_rows} images of {images} has an annotated object")
    chosen = inputs.take(pa.array(rows))
    missing = len(with_objects) - len(by_uri) if num_images is None else 0
    return chosen, [by_uri[uri] for uri in chosen["uri"].to_pylist()], missing


def _key(wanted: Wanted, weights: Weights, uris: list[str]) -> dict[str, Any]:
    """All that decides the features, but for which of them."""
    job = wanted.job
    return {
        "uris": config_hash({"uris": uris}),
        "ground_truth": wanted.ground_truth,
        "weights_sha256": weights.sha256,
        "normalize": job.backbone.normalize,
        "decode": job.decode.model_dump(mode="json"),
        "batches": [job.compute.block_size, job.compute.batch_size],
        "precision": [job.compute.precision, wanted.precision],
    }


def _decoded(job: LabelJob, blocks: Sequence[pa.Table]) -> Iterator[tuple[pa.Table, list[Any]]]:
    """Each block's rows and their pixels."""
    for block in blocks:
        decoded = load_pixels(block, **dict(job.decode))
        yield decoded, decoded_images(decoded)


def _require_room(
    cache: FeatureCache, wanted: Wanted, many: ManyFeatures, blocks: Sequence[pa.Table], tell: Tell
) -> None:
    """Tell how much the features take, before any is computed; refuse what does not fit."""
    patch = many.backbone.patch_size
    channels = {
        source: one.shape[-1] for source, one in many(torch.zeros(1, 3, patch, patch)).items()
    }
    patches = count = 0
    for _, images in _decoded(wanted.job, blocks):
        for image in images:
            if image is not None:
                height, width = padded_size(image.shape[0], image.shape[1], patch)
                patches, count = patches + height * width // patch**2, count + 1
    total = patches * sum(channels.values()) * BYTES[wanted.precision]
    tell(
        f"features of {count:,} images: {len(channels)} x {gib(total / len(channels))} = "
        f"{gib(total)} of {wanted.precision} in {cache.folder}"
    )
    cache.require_room(total)


def _forward(
    cache: FeatureCache,
    wanted: Wanted,
    many: ManyFeatures,
    images: Sequence[Image | None],
    place: tuple[int, int],
) -> list[FeatureBatch]:
    """Write a block's features; its batches are those that label_images.py makes of it."""
    (number, first), job = place, wanted.job
    labeller = PseudoBoxLabeller(
        many.backbone,
        job.localization,
        Provenance("", "", ""),
        forward=ForwardPass(batch_size=job.compute.batch_size),
        device=wanted.device,
    )
    mean, std = NORMALIZATIONS[with_recipe(job.backbone).normalize]
    found: dict[Source, dict[str, torch.Tensor]] = {one: {} for one in wanted.sources}
    batches: list[FeatureBatch] = []
    for rows in labeller.batches(images):
        name = f"{len(batches):04d}"
        pixels = [image for row in rows if (image := images[row]) is not None]
        batch = normalize_and_pad(pixels, multiple=labeller.backbone.patch_size, mean=mean, std=std)
        with in_precision(job.compute.precision, wanted.device):
            for source, tokens_BHWD in many(batch.to(wanted.device)).items():
                found[source][name] = tokens_BHWD.cpu()
        batches.append(FeatureBatch([first + row for row in rows], f"{number:05d}", name))
    for source, tensors in found.items():
        cache.write_shard(number, source, tensors, wanted.precision)
    return batches
