"""From a job's settings to what the loop needs: data, network, heads, optimiser, schedules.

This is the door of the room: the job stops here. All that can be wrong with it is told before the
first step. To add a way to vary images: ``augment.py``; a data set:
``data/classification_sets.py``.
"""

import logging
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.classification.augment import SMALL_SIDE, eval_transform, train_transform
from pipeline.classification.task import SupervisedObjective, SupervisedTask
from pipeline.config import TrainClassifierJob
from pipeline.config.classification import Pooling
from pipeline.data.classification_sets import ClassificationData, load_classification
from pipeline.data.labelled_images import LabelledImages, cached
from pipeline.data.loader import BatchLoader, eval_loader, train_loader
from pipeline.data.sharding import ShardedBatchSampler
from pipeline.errors import ConfigError
from pipeline.losses.multi_stage import DRLocObjective, pooled_shape
from pipeline.models.backbones import build_model, load_classifier_weights
from pipeline.models.checkpoints import Weights
from pipeline.models.grid_classifier import GridClassifier
from pipeline.training import schedules
from pipeline.training.loop import LoopSettings, LoopState
from pipeline.training.optim import (
    backbone_scales,
    build_optimizer,
    layerwise_scales,
    parameter_groups,
    scaled_lr,
)
from pipeline.training.workers import Workers

_FEW_STEPS = 10
_LOG = logging.getLogger(__name__)


def load_data(job: TrainClassifierJob, workers: Workers) -> ClassificationData:
    """The labelled images, divided as the job says.

    Raises:
        ConfigError, DataError: as load_classification does.
    """

    def load(*, download: bool) -> ClassificationData:
        data = job.data
        return load_classification(
            data.name, data.root, split=data, seed=job.seed, download=download
        )

    # One worker fetches, the others find what it fetched.
    first = load(download=job.data.download) if workers.is_first else None
    workers.wait()
    return first or load(download=False)


def training_batches(
    job: TrainClassifierJob, data: ClassificationData, image_size: int, workers: Workers
) -> BatchLoader:
    """This worker's slices of the training batches.

    Raises:
        ConfigError, DataError: a batch, or the set, is too small for so many workers.
    """
    sampler = ShardedBatchSampler(
        len(data.train),
        batch_size=job.batch_size,
        rank=workers.rank,
        world_size=workers.size,
        seed=job.seed,
        # Mixing pairs neighbours, which must not be parted.
        group=2 if job.augment.mixes else 1,
    )
    _warn_of_few_steps(len(sampler), len(data.train), job.batch_size)
    return train_loader(
        cached(data.train, limit_mib=job.data.cache_mib),
        train_transform(job.augment, image_size, mirror_safe=data.mirror_safe),
        sampler=sampler,
        config=job.data,
        device_type=workers.device.type,
    )


def evaluation_batches(
    job: TrainClassifierJob, images: LabelledImages, image_size: int, workers: Workers
) -> BatchLoader:
    """This worker's share of the images, each once."""
    return eval_loader(
        cached(images, limit_mib=job.data.cache_mib),
        eval_transform(job.augment, image_size),
        batch_size=max(1, job.batch_size // workers.size // job.optim.accumulate),
        workers=workers,
        config=job.data,
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


# Grids with a side this fine are made coarse: 14 x 14 -> 7 x 7 as in the paper.
_FINE_SIDE = 14
# At small images the stem is made finer until the last grid has this side.
_WANTED_SIDE = 4


@dataclass(frozen=True, eq=False)
class ClassifierSetup:
    """All of a run but its past."""

    data: ClassificationData
    image_size: int
    """Side in pixels that the network sees."""

    task: SupervisedTask
    state: LoopState
    settings: LoopSettings
    validation: BatchLoader
    test: BatchLoader | None
    weights: Weights | None
    """What the network started from; None where it starts from scratch."""

    patch_size: int | None
    """As the network was built: the job's, or the one that suits small images."""

    @property
    def evaluated(self) -> GridClassifier:
        """The network that is measured and exported: the average where there is one."""
        holder = self.state.average.module if self.state.average is not None else None
        objective = holder or self.task.objective
        assert isinstance(objective, SupervisedObjective)
        return objective.classifier


def set_up(job: TrainClassifierJob, workers: Workers) -> ClassifierSetup:
    """Build what the job describes, the same on every worker.

    Raises:
        ConfigError, DataError, WeightsError: settings, images or weights do not fit.
    """
    data = load_data(job, workers)
    image_size = job.model.image_size or data.native_size
    weights = _starting_weights(job)
    patch_size = suitable_patch_size(job, len(data.classes), image_size)
    objective = build_objective(
        job,
        num_classes=len(data.classes),
        image_size=image_size,
        patch_size=patch_size,
        weights=weights,
    ).to(workers.device)
    if job.channels_last:
        objective = objective.to(memory_format=torch.channels_last)
    if job.compile:
        # In place: names and state stay as they are.
        objective.classifier.compile()
    task = SupervisedTask(
        objective=objective,
        loader=training_batches(job, data, image_size, workers),
        augment=job.augment,
        num_classes=len(data.classes),
        drloc_weight=lambda epoch: lambda_at(job, epoch),
        workers=workers,
        seed=job.seed,
        accumulate=job.optim.accumulate,
        channels_last=job.channels_last,
    )
    return ClassifierSetup(
        data=data,
        image_size=image_size,
        task=task,
        state=_loop_state(job, objective, workers),
        settings=_loop_settings(job, task.steps_per_epoch),
        validation=evaluation_batches(job, data.validation, image_size, workers),
        test=None if data.test is None else evaluation_batches(job, data.test, image_size, workers),
        weights=weights,
        patch_size=patch_size,
    )


def build_objective(
    job: TrainClassifierJob,
    *,
    num_classes: int,
    image_size: int,
    patch_size: int | None,
    weights: Weights | None = None,
) -> SupervisedObjective:
    """The network and its DRLoc heads as they are before the first step, on the CPU.

    Raises:
        ConfigError: the network cannot be built so, or its grid is too small for DRLoc.
        WeightsError: the weights do not fit.
    """
    # Networks draw their first weights from the global generator.
    torch.manual_seed(job.seed)
    classifier = _network(job, num_classes, image_size, patch_size, weights)
    drloc = _build_drloc(job, classifier, image_size)
    if job.model.sync_batch_norm and job.use_gpu:
        classifier = nn.SyncBatchNorm.convert_sync_batchnorm(classifier)  # type: ignore[no-untyped-call]
    return SupervisedObjective(classifier, drloc)


def _network(
    job: TrainClassifierJob,
    num_classes: int,
    image_size: int,
    patch_size: int | None,
    weights: Weights | None = None,
) -> GridClassifier:
    return build_model(
        job.model.name,
        num_classes=num_classes,
        image_size=image_size,
        patch_size=patch_size,
        drop_path=job.model.drop_path,
        stages=job.drloc.stages,
        tap=job.model.tap,
        options=job.model.option_values(),
        weights=weights,
    )


def _starting_weights(job: TrainClassifierJob) -> Weights | None:
    if not job.model.pretrained and job.model.checkpoint is None:
        return None
    return load_classifier_weights(job.model.name, job.model.checkpoint)


def suitable_patch_size(job: TrainClassifierJob, num_classes: int, image_size: int) -> int | None:
    """The job's stem, or at small images the coarsest one that leaves a grid of 4 x 4.

    Small images through a stem made for large ones leave one token: the cheapest gain there is.
    """
    chosen = job.model
    starts_trained = chosen.pretrained or chosen.checkpoint is not None
    if chosen.patch_size is not None or starts_trained or image_size > SMALL_SIDE:
        return chosen.patch_size
    finest: int | None = None
    for patch_size in (None, 4, 2, 1):
        try:
            # On no device: only the shapes are asked for.
            with torch.device("meta"):
                network = _network(job, num_classes, image_size, patch_size)
        except ConfigError:
            continue
        finest = patch_size
        _, height, width = network.grid_shapes((image_size, image_size))[-1]
        if min(height, width) >= _WANTED_SIDE:
            break
    return finest


def _build_drloc(
    job: TrainClassifierJob, classifier: GridClassifier, image_size: int
) -> DRLocObjective | None:
    """The heads for the network's grids; None at lambda 0."""
    if job.drloc.weight == 0:
        return None
    shapes = classifier.grid_shapes((image_size, image_size))
    pooling = [_pooling(job, height, width) for _, height, width in shapes]
    for (_, height, width), kind in zip(shapes, pooling, strict=True):
        grid = pooled_shape(height, width, kind)
        if min(grid) < 2:
            raise ConfigError(
                f"DRLoc needs a grid of at least 2 x 2 tokens, got {grid[0]} x {grid[1]} from "
                f"{job.model.name} at {image_size} px; give a larger --model.image-size, a smaller "
                "--model.patch-size, --drloc.pooling none, or --drloc.weight 0"
            )
    try:
        return DRLocObjective(shapes, job.drloc, pooling=pooling, seed=job.seed)
    except ValueError as fault:
        raise ConfigError(f"--drloc does not fit {job.model.name}: {fault}") from fault


def _pooling(job: TrainClassifierJob, height: int, width: int) -> Pooling:
    return job.drloc.pooling if max(height, width) >= _FINE_SIDE else "none"


def lambda_at(job: TrainClassifierJob, epoch: int) -> float:
    """DRLoc's weight in an epoch, from 0."""
    ramp = job.drloc.ramp_epochs
    return schedules.drloc_weight(
        epoch,
        weight=job.drloc.weight,
        schedule=job.drloc.schedule,
        ramp_epochs=round(job.optim.warmup_epochs) if ramp is None else ramp,
        total_epochs=job.epochs,
    )


def _loop_state(
    job: TrainClassifierJob, objective: SupervisedObjective, workers: Workers
) -> LoopState:
    groups = parameter_groups(
        objective, weight_decay=job.optim.weight_decay, lr_scales=_lr_scales(job, objective)
    )
    optimizer = build_optimizer(
        groups,
        kind=job.optim.kind,
        lr=job.optim.lr,
        betas=job.optim.betas,
        momentum=job.optim.betas[0],
    )
    decay = job.optim.ema_decay
    average = None
    if decay:
        rule = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average = AveragedModel(objective, multi_avg_fn=rule, use_buffers=True)
    scaler = torch.amp.GradScaler(workers.device.type, enabled=job.precision == "fp16")
    return LoopState(objective, optimizer, average, scaler)


def _lr_scales(job: TrainClassifierJob, objective: SupervisedObjective) -> dict[str, float]:
    """The learning rates of fine-tuning, relative to the classifier layer's."""
    names = [name for name, _ in objective.classifier.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    if job.optim.layer_decay < 1:
        layers = objective.classifier.layer_groups()
        scales |= layerwise_scales(names, layers, job.optim.layer_decay)
    if job.optim.backbone_lr_ratio < 1:
        heads = objective.classifier.head_prefixes
        below = backbone_scales(names, heads, job.optim.backbone_lr_ratio)
        scales = {name: scale * below.get(name, 1.0) for name, scale in scales.items()}
    return {f"classifier.{name}": scale for name, scale in scales.items() if scale != 1}


def _loop_settings(job: TrainClassifierJob, steps_per_epoch: int) -> LoopSettings:
    chosen = job.optim

    def scaled(lr: float) -> float:
        return lr if chosen.lr_batch is None else scaled_lr(lr, job.batch_size, chosen.lr_batch)

    cosine_epochs = job.epochs - chosen.cooldown_epochs

    late = chosen.one_step_late
    schedule = schedules.warmup_cosine_one_late if late else schedules.warmup_cosine

    def learning_rate(step: int) -> float:
        return schedule(
            step,
            peak=scaled(chosen.lr),
            warmup_start=scaled(chosen.warmup_lr),
            floor=scaled(chosen.min_lr),
            warmup_steps=round(chosen.warmup_epochs * steps_per_epoch),
            total_steps=cosine_epochs * steps_per_epoch,
        )

    return LoopSettings(
        num_epochs=job.num_epochs,
        learning_rate=learning_rate,
        seed=job.seed,
        clip=chosen.clip,
        precision=job.precision,
        gradient_norm_steps=job.gradient_norm_steps,
        detect_anomaly=job.detect_anomaly,
    )
