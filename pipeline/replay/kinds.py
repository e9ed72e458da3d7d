"""What replaying a step must know of each kind of job; all else is common (replaying.py).

To replay another kind of job: an entry in ``KINDS`` under the ``kind`` of its ``TrainingRun``, and
``remember_random_states`` in its setup where a pass draws from torch's global generators.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.classification import run, setup
from pipeline.classification.task import Inputs, SupervisedObjective, losses_of
from pipeline.config import PretrainDinoJob, TrainClassifierJob, TrainDetectorJob, TrainingJob
from pipeline.detection import run as detector_run
from pipeline.detection import setup as detector_setup
from pipeline.detection import task as detector_task
from pipeline.detection.detector import Detector
from pipeline.errors import WeightsError
from pipeline.pretraining import dino_run, dino_setup
from pipeline.pretraining.dino import Crops, DINOObjective
from pipeline.training.loop import Losses


@dataclass(frozen=True)
class Kind:
    """A kind of job: where it says Any, its own job and inputs."""

    job: type[TrainingJob]
    inputs: Callable[..., Any]
    """Its ``Part.inputs``, a NamedTuple, from the values of its fields."""

    build: Callable[[Any, Any, Mapping[str, Tensor]], nn.Module]
    """The objective on the CPU, of the job, the inputs of some part, and the weights it will be
    given; for its shapes, as it is given them later."""

    losses: Callable[[Any, Any, Any, int], Losses]
    """What the task gives, of the objective, a part's inputs, the job and the epoch."""

    described: Callable[[Any, int], str]
    """The job in a few words, and what it has of an epoch's own."""

    draws_by_keys: bool = False
    """Whether keys in the inputs decide all that a pass draws, and torch's generators nothing."""


def _build_classifier(
    job: TrainClassifierJob, inputs: Inputs, weights: Mapping[str, Tensor]
) -> SupervisedObjective:
    # Batch statistics over all workers exist only where there are several: here each has its own.
    alone = job.model.model_copy(update={"sync_batch_norm": False})
    job = job.model_copy(update={"model": alone})
    num_classes, image_size = inputs.targets_BK.shape[1], inputs.images_B3HW.shape[-1]
    return setup.build_objective(
        job,
        num_classes=num_classes,
        image_size=image_size,
        patch_size=setup.suitable_patch_size(job, num_classes, image_size),
    )


def _classifier_losses(
    objective: SupervisedObjective, inputs: Inputs, job: TrainClassifierJob, epoch: int
) -> Losses:
    return losses_of(objective(*inputs), setup.lambda_at(job, epoch))


def _describe_classifier(job: TrainClassifierJob, epoch: int) -> str:
    weight = setup.lambda_at(job, epoch)
    return f"{job.model.name} on {job.data.name}, lambda {weight:g}"


def _build_dino(
    job: PretrainDinoJob, inputs: Crops, weights: Mapping[str, Tensor]
) -> DINOObjective:
    # Compiled blocks would hide their modules, and take minutes for a few passes.
    return dino_setup.build_objective(job.model_copy(update={"compile": False}), weights=None)


def _dino_losses(
    objective: DINOObjective, inputs: Crops, job: PretrainDinoJob, epoch: int
) -> Losses:
    found: dict[str, Tensor] = objective(inputs, dino_setup.teacher_temp_at(job, epoch))
    return Losses({"dino": found.pop("loss")}, found)


def _describe_dino(job: PretrainDinoJob, epoch: int) -> str:
    first = job.images[0].rstrip("/").rpartition("/")[2]
    more = f" and {len(job.images) - 1} more" if len(job.images) > 1 else ""
    temp = dino_setup.teacher_temp_at(job, epoch)
    return f"DINO, {job.model.name} on {first}{more}, teacher's temperature {temp:g}"


def _build_detector(
    job: TrainDetectorJob, inputs: detector_task.Inputs, weights: Mapping[str, Tensor]
) -> Detector:
    # Its norms pool over all workers only where there are several: alone they are plain ones.
    bias = "roi_heads.box_predictor.cls_score.bias"
    if bias not in weights:
        raise WeightsError(
            f"the step must hold the detector's {bias}, which tells its number of classes, and "
            "does not; replay with the version that trained it"
        )
    return detector_setup.build_bare(job, num_classes=len(weights[bias]) - 1)


def _detector_losses(
    objective: Detector, inputs: detector_task.Inputs, job: TrainDetectorJob, epoch: int
) -> Losses:
    # In evaluation mode these would detect, without a loss; it is for their norms alone here.
    deciding = (objective, objective.rpn, objective.roi_heads)
    modes = [module.training for module in deciding]
    for module in deciding:
        module.training = True
    try:
        return detector_task.losses_of(objective, inputs)
    finally:
        for module, mode in zip(deciding, modes, strict=True):
            module.training = mode


def _describe_detector(job: TrainDetectorJob, epoch: int) -> str:
    start, table = (
        place.rstrip("/").rpartition("/")[2] for place in (job.detector.init, job.labels)
    )
    again = f", round {job.round}" if job.round > 1 else ""
    return f"detector {job.detector.kind} (--detector.init {start}) on {table}{again}"


KINDS = {
    run.KIND: Kind(
        TrainClassifierJob, Inputs, _build_classifier, _classifier_losses, _describe_classifier
    ),
    dino_run.KIND: Kind(PretrainDinoJob, Crops, _build_dino, _dino_losses, _describe_dino),
    detector_run.KIND: Kind(
        TrainDetectorJob,
        detector_task.Inputs,
        _build_detector,
        _detector_losses,
        _describe_detector,
        draws_by_keys=True,
    ),
}
"""By the name that kept steps have in ``kind``."""
