"""What replaying a step must know of each kind of job; all else is common (replay.py).

To replay another kind of job: an entry in ``KINDS``, and ``on_fault`` and
``remember_random_states`` in its run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.config import PretrainDinoJob, TrainClassifierJob, TrainingJob
from pipeline.pretraining import classifier_setup, dino_setup
from pipeline.pretraining.dino import Crops, DINOObjective
from pipeline.pretraining.supervised import Inputs, SupervisedObjective, losses_of
from pipeline.training.loop import Losses


@dataclass(frozen=True)
class Kind:
    """A kind of job: where it says Any, its own job and inputs."""

    job: type[TrainingJob]
    inputs: Callable[..., Any]
    """Its ``Part.inputs``, a NamedTuple, from the fields' values: tensors, and tuples of them."""

    build: Callable[[Any, Any], nn.Module]
    """The objective on the CPU, of the job and the inputs of some part; its weights come later."""

    losses: Callable[[Any, Any, Any, int], Losses]
    """What the task gives, of the objective, a part's inputs, the job and the epoch."""

    described: Callable[[Any, int], str]
    """The job in a few words, and what it has of an epoch's own."""


def kind_of(job: TrainingJob) -> str:
    """The name in ``KINDS``.

    Raises:
        ValueError: steps of such jobs cannot be kept.
    """
    for name, kind in KINDS.items():
        if isinstance(job, kind.job):
            return name
    raise ValueError(f"no step of a {type(job).__name__} can be replayed")


def _build_classifier(job: TrainClassifierJob, inputs: Inputs) -> SupervisedObjective:
    # Batch statistics over all workers exist only where there are several: here each has its own.
    alone = job.model.model_copy(update={"sync_batch_norm": False})
    job = job.model_copy(update={"model": alone})
    num_classes, image_size = inputs.targets_BK.shape[1], inputs.images_B3HW.shape[-1]
    return classifier_setup.build_objective(
        job,
        num_classes=num_classes,
        image_size=image_size,
        patch_size=classifier_setup.suitable_patch_size(job, num_classes, image_size),
    )


def _classifier_losses(
    objective: SupervisedObjective, inputs: Inputs, job: TrainClassifierJob, epoch: int
) -> Losses:
    return losses_of(objective(*inputs), classifier_setup.lambda_at(job, epoch))


def _describe_classifier(job: TrainClassifierJob, epoch: int) -> str:
    weight = classifier_setup.lambda_at(job, epoch)
    return f"{job.model.name} on {job.data.name}, lambda {weight:g}"


def _build_dino(job: PretrainDinoJob, inputs: Crops) -> DINOObjective:
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


KINDS = {
    "classifier": Kind(
        TrainClassifierJob, Inputs, _build_classifier, _classifier_losses, _describe_classifier
    ),
    "dino": Kind(PretrainDinoJob, Crops, _build_dino, _dino_losses, _describe_dino),
}
"""By the name that kept steps have in ``kind``."""
