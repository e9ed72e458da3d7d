"""From a job's settings to its images: the data set, how it is varied, and the batches of a worker.

To add a way to vary images: ``data/augment.py``; a data set: ``data/classification_sets.py``.
"""

import logging
import math
from typing import Literal

from pipeline.config import TrainClassifierJob
from pipeline.data.augment import AugmentOptions, MixOptions, eval_transform, train_transform
from pipeline.data.classification_sets import ClassificationData, load_classification
from pipeline.data.label_splits import SplitRule
from pipeline.data.labelled_images import LabelledImages, cached
from pipeline.data.loader import (
    BatchLoader,
    LoaderOptions,
    eval_loader,
    num_loaders,
    train_loader,
)
from pipeline.data.sharding import ShardedBatchSampler
from pipeline.models.features import NORMALIZATIONS
from pipeline.training.workers import Workers

SMALL_SIDE = 64
"""Up to this side images are shifted and not cropped by default, as is usual for CIFAR."""

_FEW_STEPS = 10
_LOG = logging.getLogger(__name__)


def load_data(job: TrainClassifierJob, workers: Workers) -> ClassificationData:
    """The labelled images, divided by the job's rule.

    Raises:
        ConfigError, DataError: as load_classification does.
    """
    rule = SplitRule(
        validation_fraction=job.data.validation_fraction,
        train_per_class=job.data.train_per_class,
        select_on_test=job.data.select_on_test,
        seed=job.seed,
    )

    def load(*, download: bool) -> ClassificationData:
        return load_classification(job.data.name, job.data.root, download=download, rule=rule)

    # One worker fetches, the others find what it fetched.
    first = load(download=job.data.download) if workers.is_first else None
    workers.wait()
    return first or load(download=False)


def augment_options(
    job: TrainClassifierJob, data: ClassificationData, image_size: int
) -> AugmentOptions:
    """How training images are varied and all are brought to ``image_size``."""
    chosen = job.augment
    usual: Literal["pad", "random_resized"] = (
        "pad" if image_size <= SMALL_SIDE else "random_resized"
    )
    mean, std = NORMALIZATIONS[chosen.normalize]
    return AugmentOptions(
        image_size=image_size,
        crop=chosen.crop or usual,
        scale=(chosen.min_scale, 1.0),
        hflip=chosen.hflip == "always" or (chosen.hflip == "unless_digits" and data.mirror_safe),
        rand_augment=chosen.rand_augment,
        color_jitter=chosen.color_jitter,
        random_erasing=chosen.random_erasing,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def mix_options(job: TrainClassifierJob, num_classes: int) -> MixOptions:
    """How batches are mixed and labels smoothed."""
    return MixOptions(
        num_classes=num_classes,
        mixup=job.augment.mixup,
        cutmix=job.augment.cutmix,
        label_smoothing=job.augment.label_smoothing,
    )


def training_batches(
    job: TrainClassifierJob, data: ClassificationData, augment: AugmentOptions, workers: Workers
) -> BatchLoader:
    """This worker's slices of the training batches.

    Raises:
        ConfigError, DataError: a batch, or the set, is too small for so many workers.
    """
    mixes = job.augment.mixup > 0 or job.augment.cutmix > 0
    sampler = ShardedBatchSampler(
        len(data.train),
        batch_size=job.batch_size,
        rank=workers.rank,
        world_size=workers.size,
        seed=job.seed,
        # Mixing pairs neighbours, which must not be parted.
        group=2 if mixes else 1,
    )
    _warn_of_few_steps(len(sampler), len(data.train), job.batch_size)
    images = cached(data.train, limit_mib=job.data.cache_mib)
    return train_loader(
        images, train_transform(augment), sampler=sampler, options=_loader_options(job, workers)
    )


def evaluation_batches(
    job: TrainClassifierJob, images: LabelledImages, augment: AugmentOptions, workers: Workers
) -> BatchLoader:
    """This worker's share of the images, each once."""
    return eval_loader(
        cached(images, limit_mib=job.data.cache_mib),
        eval_transform(augment),
        batch_size=max(1, job.batch_size // workers.size // job.optim.accumulate),
        rank=workers.rank,
        world_size=workers.size,
        options=_loader_options(job, workers),
    )


def _loader_options(job: TrainClassifierJob, workers: Workers) -> LoaderOptions:
    return LoaderOptions(
        num_workers=num_loaders(job.data.loader_workers),
        device_type=workers.device.type,
        max_bad_fraction=job.data.max_bad_fraction,
    )


def _warn_of_few_steps(steps: int, num_images: int, batch_size: int) -> None:
    if steps < _FEW_STEPS:
        _LOG.warning(
            "%d training images in batches of %d are %d optimiser step%s per epoch; a smaller "
            "--batch-size (such as %d) trains better",
            num_images,
            batch_size,
            steps,
            "" if steps == 1 else "s",
            max(8, 2 ** int(math.log2(max(num_images / 30, 8)))),
        )
