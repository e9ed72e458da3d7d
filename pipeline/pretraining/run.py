"""One DINO run from its settings to its results, on this worker; knows no Ray."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.config import PretrainDinoJob
from pipeline.models.exported_backbone import write_backbone
from pipeline.pretraining.probe import Probes, read_probes
from pipeline.pretraining.setup import DINOSetup, set_up
from pipeline.runs.curves import curves_picture
from pipeline.runs.folder import RunFolder
from pipeline.runs.life import (
    Outside,
    Telling,
    TrainingRun,
    summary_of,
)
from pipeline.runs.record import Epoch
from pipeline.tracking.tracker import Tracker
from pipeline.training.loop import Hooks
from pipeline.training.workers import Workers


def pretrain_dino_here(
    job: PretrainDinoJob, folder: RunFolder, workers: Workers, outside: Outside
) -> dict[str, Any]:
    """Train on this worker, or tell what was trained; see ``TrainingRun.run``."""
    return _DinoRun(job, folder, workers, outside).run()


class _DinoRun(TrainingRun):
    """Probes, and the teacher written at the end."""

    job: PretrainDinoJob
    setup: DINOSetup
    probes: Probes | None = None
    """Of rank 0: the others wait for its next step while it probes."""

    def set_up(self) -> DINOSetup:
        setup = set_up(self.job, self.workers)
        if self.workers.is_first:
            self.probes = read_probes(self.job)
        return setup

    def telling(self) -> Telling:
        lines = _described(self.job, self.setup)
        return Telling(lines, {"num_images": len(self.setup.images)}, _shown)

    def hooks(self) -> Hooks:
        task = self.setup.task
        return replace(
            super().hooks(), before_update=task.before_update, after_update=task.after_update
        )

    def look(self, epoch: int, numbers: dict[str, float]) -> float | None:
        due = (epoch + 1) % self.job.probe.every == 0 or epoch + 1 == self.job.epochs
        if self.probes is not None and due:
            teacher = self.setup.task.objective.teacher
            numbers |= self.probes.numbers(teacher, self.workers.device)
        return None

    def finish(self, tracker: Tracker) -> dict[str, Any]:
        """Write the teacher and the summary."""
        weights = self.setup.weights
        summary = {
            **summary_of(self.job, self.workers, self.last_numbers(_TOLD.__contains__)),
            "num_images": len(self.setup.images),
            "started_from": None if weights is None else weights.sha256,
        }
        if self.record is not None:
            write_backbone(
                self.setup.task.objective.teacher.backbone.state_dict(),
                self.folder.place.child("model"),
                name=self.job.model.name,
                made_by=summary,
            )
            figures = {"curves": curves_picture(self.record.history, None)}
            self.publish(summary, figures, tracker)
        return summary


_TOLD = (
    "train/dino",
    "train/teacher_entropy",
    "train/divergence",
    "train/feature_std",
    "probe/corloc",
    "probe/knn",
)


def _described(job: PretrainDinoJob, setup: DINOSetup) -> list[str]:
    backbone = setup.task.objective.student.backbone
    num_weights = sum(one.numel() for one in backbone.parameters())
    crops, steps = job.crops, setup.task.steps_per_epoch
    return [
        f"{len(setup.images):,} images; {steps} step{'s' * (steps > 1)} per epoch",
        f"network: {job.model.name}, {num_weights:,} weights; views: 2 of {crops.global_size} px, "
        f"{crops.num_local} of {crops.local_size} px",
    ]


def _shown(history: Sequence[Epoch]) -> str:
    """The last epoch, for people: a collapse is a divergence of 0, or a spread of 0."""
    numbers = history[-1]
    told = (
        f"loss {numbers['train/dino']:.3f} teacher entropy {numbers['train/teacher_entropy']:.2f} "
        f"divergence {numbers['train/divergence']:.3f} spread {numbers['train/feature_std']:.2f}"
    )
    for name, word in (("probe/corloc", "CorLoc"), ("probe/knn", "k-NN")):
        if name in numbers:
            told += f" {word} {numbers[name]:.1%}"
    return told
