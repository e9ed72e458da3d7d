"""From a detector job's settings to what the loop needs; the job stops here."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.config import TrainDetectorJob
from pipeline.data.seeding import key_of
from pipeline.detection.batch_norm import fused
from pipeline.detection.box_loader import BoxLoader, BoxTransform, train_box_loader
from pipeline.detection.box_sampler import BucketBatchSampler
from pipeline.detection.box_table import BoxTable, merge_boxes, read_box_table
from pipeline.detection.detector import Detector, build_detector, default_options, initialise
from pipeline.detection.exported_detector import CONFIG, read_detector
from pipeline.detection.options import DetectorOptions
from pipeline.detection.task import BoxInputs, DetectionTask, canvas_of, inputs_of
from pipeline.detection.timm_pyramid import TIMM
from pipeline.errors import WeightsError
from pipeline.models.backbones import load_classifier_weights
from pipeline.models.checkpoints import file_sha256, read_state_dict
from pipeline.models.published_weights import published_normalization, require_timm
from pipeline.storage import Location
from pipeline.training import schedules
from pipeline.training.loop import LoopSettings, LoopState
from pipeline.training.optim import build_optimizer, parameter_groups
from pipeline.training.workers import Workers

# Published weights of ResNet-50 by the names that --detector.init takes.
_PUBLISHED = {"dino": "resnet50.dino", "imagenet": "resnet50.tv_in1k"}
_SCRATCH, _TIMM = "none", "timm"


@dataclass(frozen=True, eq=False)
class DetectorSetup:
    """All of a run but its past."""

    table: BoxTable
    task: DetectionTask
    state: LoopState
    settings: LoopSettings
    start: "Start"
    measured: BoxLoader | None
    """Batches that batch norm's statistics are measured on; None leaves them as they run."""

    def batches_to_measure(self) -> Iterator[BoxInputs]:
        """The same ones each time it is asked."""
        assert self.measured is not None
        self.measured.set_epoch(0)
        for batch in self.measured:
            samples, workers = batch.samples, self.task.workers
            yield inputs_of(samples, canvas_of(samples, workers), workers.device)


@dataclass(frozen=True, eq=False)
class Start:
    """Where a detector's weights start."""

    source: str
    sha256: str | None
    """Of the file; None from scratch."""

    backbone: dict[str, torch.Tensor] | None = None
    detector: Detector | None = None


def set_up(job: TrainDetectorJob, workers: Workers) -> DetectorSetup:
    """Build what the job describes, the same on every worker.

    Raises:
        ConfigError, DataError, WeightsError: settings, labels or weights do not fit.
    """
    table = read_table(job)
    start = read_start(job.detector.init, job.detector.backbone)
    detector = build(job, start, num_classes=int(table.labels_M.max())).to(workers.device)
    if workers.size > 1 and workers.device.type == "cuda":
        fused(detector)
    loader = _loader(job, table, workers, job.seed, job.steps_per_epoch)
    measured = None
    if job.precise_bn and job.detector.norm != "frozen":
        # Other images than the steps', in an order of their own.
        measured = _loader(job, table, workers, key_of("precise_bn", job.seed), job.precise_bn)
    groups = parameter_groups(detector, weight_decay=job.optim.weight_decay, decay_biases=True)
    optimizer = build_optimizer(groups, kind="sgd", lr=job.lr, momentum=job.optim.momentum)
    scaler = torch.amp.GradScaler(workers.device.type, enabled=job.precision == "fp16")
    return DetectorSetup(
        table=table,
        task=DetectionTask(detector, loader, workers, job.optim.accumulate),
        state=LoopState(detector, optimizer, None, scaler),
        settings=_loop_settings(job),
        start=start,
        measured=measured,
    )


def read_table(job: TrainDetectorJob) -> BoxTable:
    """The labels, with the detections that were added.

    Raises:
        DataError: a table cannot be read, or has no usable box.
    """
    table = read_box_table(Location.parse(job.labels), min_score=job.data.min_score)
    if job.add_labels is None:
        return table
    found = read_box_table(Location.parse(job.add_labels), min_score=job.self_training.min_score)
    return merge_boxes(table, found, iou=job.self_training.iou)


def read_start(init: str, backbone: str | None = None) -> Start:
    """The weights that ``--detector.init`` names.

    Args:
        init: what the setting says.
        backbone: whose weights timm is to give.

    Raises:
        ConfigError: timm has no such backbone.
        WeightsError: they cannot be had.
    """
    if init == _SCRATCH:
        return Start("scratch", None)
    published = _PUBLISHED.get(init)
    if init == _TIMM and backbone is not None:
        published = backbone.removeprefix(TIMM)
        require_timm(published)
    if published is not None:
        weights = load_classifier_weights(published, None)
        return Start(weights.source, weights.sha256, backbone=weights.state_dict)
    folder = Location.parse(init)
    if folder.child(CONFIG).kind() == "file":
        stored = read_detector(folder)
        return Start(init, stored.sha256, detector=stored.detector)
    if not os.path.isfile(init):
        raise WeightsError(
            f"--detector.init must be {', '.join(_PUBLISHED)}, {_TIMM}, {_SCRATCH}, a file of "
            f"weights or a detector's folder, got {init}"
        )
    path = Path(init).absolute()
    return Start(str(path), file_sha256(path), backbone=read_state_dict(path))


def options_of(job: TrainDetectorJob, *, from_scratch: bool, num_classes: int) -> DetectorOptions:
    """The detector that the settings describe; what they leave open is the kind's own.

    Raises:
        ConfigError: they do not go together.
    """
    chosen = job.detector.model_dump(exclude={"kind", "init"}, exclude_none=True)
    if from_scratch:
        # Frozen noise would learn nothing.
        chosen.setdefault("freeze_at", 0)
    backbone = job.detector.backbone or ""
    if backbone.startswith(TIMM):
        # As its published weights were trained, whichever weights it starts from: later rounds
        # start from a detector's.
        normalize = published_normalization(backbone.removeprefix(TIMM))
        chosen["normalize"] = normalize or "imagenet"
    return default_options(job.detector.kind, **chosen, num_classes=num_classes)


def build(job: TrainDetectorJob, start: Start, *, num_classes: int) -> Detector:
    """The detector before the first step, on the CPU.

    Raises:
        ConfigError: there is no such detector.
        WeightsError: the weights do not fit.
    """
    torch.manual_seed(job.seed)
    scratch = start.backbone is None and start.detector is None
    options = options_of(job, from_scratch=scratch, num_classes=num_classes)
    detector = build_detector(options)
    if start.backbone is not None:
        initialise(detector, start.backbone, start.source)
    if start.detector is not None:
        try:
            detector.load_state_dict(start.detector.state_dict())
        except RuntimeError as fault:
            raise WeightsError(
                f"{start.source} holds another detector than --detector.kind {job.detector.kind} "
                f"with {num_classes} class{'es' * (num_classes > 1)}; give the settings it was "
                "trained with"
            ) from fault
    return detector


def build_bare(job: TrainDetectorJob, *, num_classes: int) -> Detector:
    """The detector as it trains, on the CPU, for weights that come from elsewhere.

    Raises:
        ConfigError: there is no such detector.
    """
    scratch = job.detector.init == _SCRATCH
    return build_detector(options_of(job, from_scratch=scratch, num_classes=num_classes))


def _loader(
    job: TrainDetectorJob, table: BoxTable, workers: Workers, seed: int, steps: int
) -> BoxLoader:
    bucket_N = table.is_wide_N if job.data.aspect_buckets else table.is_wide_N & False
    sampler = BucketBatchSampler(
        bucket_N,
        batch_size=job.batch_size,
        steps_per_epoch=steps,
        rank=workers.rank,
        world_size=workers.size,
        seed=seed,
    )
    return train_box_loader(
        table,
        BoxTransform(job.data),
        sampler=sampler,
        config=job.loader,
        device_type=workers.device.type,
    )


def _loop_settings(job: TrainDetectorJob) -> LoopSettings:
    chosen: Any = job.optim
    total = job.num_epochs * job.steps_per_epoch
    return LoopSettings(
        num_epochs=job.num_epochs,
        learning_rate=partial(
            schedules.warmup_then_milestones,
            peak=job.lr,
            milestones=[round(share * total) for share in chosen.milestones],
            warmup_steps=chosen.warmup_steps,
        ),
        seed=job.seed,
        clip=chosen.clip,
        precision=job.precision,
        gradient_norm_steps=job.gradient_norm_steps,
        detect_anomaly=job.detect_anomaly,
    )
