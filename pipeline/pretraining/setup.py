"""From a DINO job's settings to what the loop needs; the job stops here."""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pipeline.config import PretrainDinoJob
from pipeline.data.labelled_images import LabelledImages
from pipeline.data.loader import train_loader
from pipeline.data.sharding import ShardedBatchSampler
from pipeline.models.backbones import build_vit, load_weights
from pipeline.models.checkpoints import PICKLED, Weights
from pipeline.pretraining.images import preload, random_square, read_unlabelled
from pipeline.pretraining.network import DINONetwork
from pipeline.pretraining.task import DINOObjective, DINOTask
from pipeline.training import schedules
from pipeline.training.loop import LoopSettings, LoopState
from pipeline.training.optim import build_optimizer, parameter_groups, scaled_lr
from pipeline.training.workers import Workers

# The batch that --optim.lr is meant for (DINO, section 3.2 of the paper's supplement).
_LR_BATCH = 256


@dataclass(frozen=True, eq=False)
class DINOSetup:
    """All of a run but its past."""

    images: LabelledImages
    task: DINOTask
    state: LoopState
    settings: LoopSettings
    weights: Weights | None
    """What the network started from; None where it starts from scratch."""


def set_up(job: PretrainDinoJob, workers: Workers) -> DINOSetup:
    """Build what the job describes, the same on every worker.

    Raises:
        ConfigError, DataError, WeightsError: settings, images or weights do not fit.
    """
    images = read_unlabelled(job.images)
    sampler = ShardedBatchSampler(
        len(images),
        batch_size=job.batch_size,
        rank=workers.rank,
        world_size=workers.size,
        seed=job.seed,
    )
    weights = _starting_weights(job)
    objective = build_objective(job, weights).to(workers.device)
    kept = preload(images, job.crops.source_side, limit_mib=job.cache_mib)
    loader = train_loader(
        kept,
        partial(random_square, side=job.crops.source_side),
        sampler=sampler,
        config=job,
        device_type=workers.device.type,
    )
    total_steps = job.epochs * len(sampler)
    task = DINOTask(
        objective=objective,
        loader=loader,
        crops=job.crops,
        teacher_temp=partial(teacher_temp_at, job),
        teacher_momentum=partial(
            schedules.cosine, start=job.dino.teacher_momentum, end=1.0, total_steps=total_steps
        ),
        workers=workers,
        seed=job.seed,
        accumulate=job.optim.accumulate,
    )
    return DINOSetup(
        images=images,
        task=task,
        state=_loop_state(job, objective, workers),
        settings=_loop_settings(job, len(sampler)),
        weights=weights,
    )


def build_objective(job: PretrainDinoJob, weights: Weights | None) -> DINOObjective:
    """Student and teacher as they are before the first step, on the CPU.

    Raises:
        ConfigError: there is no such network.
        WeightsError: the weights do not fit.
    """
    torch.manual_seed(job.seed)
    student = DINONetwork(
        build_vit(job.model.name, drop_path=job.model.drop_path, weights=weights),
        job.dino,
    )
    objective = DINOObjective(student, job.dino)
    if job.compile:
        # Neither network is called as a whole: what takes the time are the blocks.
        for network in (objective.student, objective.teacher):
            blocks: Any = network.backbone.blocks
            blocks.compile()
    return objective


def teacher_temp_at(job: PretrainDinoJob, epoch: int) -> float:
    """The temperature of the teacher's softmax in an epoch, from 0."""
    return schedules.teacher_temperature(
        epoch,
        start=job.dino.warmup_teacher_temp,
        end=job.dino.teacher_temp,
        warmup_epochs=job.dino.warmup_teacher_temp_epochs,
    )


def _starting_weights(job: PretrainDinoJob) -> Weights | None:
    if job.init is None:
        return None
    is_file = os.sep in job.init or job.init.endswith((".safetensors", *PICKLED))
    return load_weights(job.model.name if is_file else job.init, job.init if is_file else None)


def _loop_state(job: PretrainDinoJob, objective: DINOObjective, workers: Workers) -> LoopState:
    groups = parameter_groups(objective, weight_decay=job.optim.weight_decay)
    optimizer = build_optimizer(groups, kind="adamw", lr=job.optim.lr)
    scaler = torch.amp.GradScaler(workers.device.type, enabled=job.precision == "fp16")
    return LoopState(objective, optimizer, None, scaler)


def _loop_settings(job: PretrainDinoJob, steps_per_epoch: int) -> LoopSettings:
    chosen = job.optim
    total_steps = job.epochs * steps_per_epoch
    return LoopSettings(
        num_epochs=job.epochs,
        learning_rate=partial(
            schedules.warmup_then_cosine,
            peak=scaled_lr(chosen.lr, job.batch_size, _LR_BATCH),
            floor=chosen.min_lr,
            warmup_steps=round(chosen.warmup_epochs * steps_per_epoch),
            total_steps=total_steps,
        ),
        weight_decay=partial(
            schedules.cosine,
            start=chosen.weight_decay,
            end=chosen.weight_decay_end,
            total_steps=total_steps,
        ),
        seed=job.seed,
        clip=chosen.clip,
        precision=job.precision,
        gradient_norm_steps=job.gradient_norm_steps,
        detect_anomaly=job.detect_anomaly,
    )
