"""One DINO run from its settings to its results, on this worker; knows no Ray."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import PretrainDinoJob
from pipeline.models.exported_backbone import write_backbone
from pipeline.pretraining.dino_probe import Probes, read_probes
from pipeline.pretraining.dino_setup import DINOSetup, set_up
from pipeline.pretraining.figures import curves_picture
from pipeline.pretraining.run_folder import RunFolder
from pipeline.pretraining.run_life import (
    Outside,
    finished_results,
    go_back_to_latest,
    log_settings,
    open_job_tracker,
    summary_of,
)
from pipeline.pretraining.run_record import Epoch, RunRecord, log_results
from pipeline.pretraining.step_fault import keep_fault
from pipeline.tracking import NoTracker, Tracker
from pipeline.training.loop import Hooks, StepFault, train
from pipeline.training.workers import Workers

KIND = "dino"
"""Of these runs, in summaries and MLflow."""


def pretrain_dino_here(
    job: PretrainDinoJob, folder: RunFolder, workers: Workers, outside: Outside
) -> dict[str, Any]:
    """Train until the last epoch, from where the folder's checkpoints end.

    A finished run is not trained again: its results are told, and sent to MLflow, once more.

    Returns:
        The summary that also lies in the folder.

    Raises:
        PatchseedError: as errors.py lists; finished epochs are kept.
    """
    tags = {"patchseed.kind": KIND}
    finished = finished_results(job, folder, workers, outside, tags)
    if finished is not None:
        return finished
    setup = set_up(job, workers)
    # Only rank 0 probes, while the others wait for its next step.
    probes = read_probes(job) if workers.is_first else None
    record = _open_record(job, folder, setup, outside, tags) if workers.is_first else None
    with record.tracker if record else NoTracker() as tracker:
        go_back_to_latest(folder, setup.state, setup.settings.num_epochs, workers, record)
        run = _Run(job, folder, workers, outside, setup, record, probes)
        train(setup.task, setup.state, setup.settings, workers, run.hooks())
        return run.finish(tracker)


@dataclass
class _Run:
    """The run while it trains: what happens after each epoch, and at the end."""

    job: PretrainDinoJob
    folder: RunFolder
    workers: Workers
    outside: Outside
    setup: DINOSetup
    record: RunRecord | None
    probes: Probes | None
    _began: float = 0.0

    def hooks(self) -> Hooks:
        self._began = time.monotonic()
        return Hooks(
            on_epoch_end=self._after_epoch,
            on_step=self.record.on_step if self.record else lambda key, num_images: None,
            on_fault=self._keep_fault,
            before_update=self.setup.task.before_update,
            after_update=self.setup.task.after_update,
        )

    def _after_epoch(self, epoch: int, numbers: dict[str, float]) -> None:
        """Probe, write a checkpoint, and tell."""
        due = (epoch + 1) % self.job.probe.every == 0 or epoch + 1 == self.job.epochs
        if self.probes is not None and due:
            teacher = self.setup.task.objective.teacher
            numbers |= self.probes.numbers(teacher, self.workers.device)
        numbers["seconds"] = time.monotonic() - self._began
        self._began = time.monotonic()
        if self.record is not None:
            self.record.on_epoch(epoch, numbers)
            state = {"loop": self.setup.state.state_dict(), "history": self.record.history}
            self.folder.checkpoints.save(epoch, state, score=None)
        self.outside.report(numbers)

    def _keep_fault(self, fault: StepFault) -> str:
        return keep_fault(fault, self.job, self.folder, self.setup.state.objective, self.workers)

    def finish(self, tracker: Tracker) -> dict[str, Any]:
        """Write the teacher and the summary."""
        metrics: dict[str, float] = {}
        if self.record is not None:
            last = self.record.history[-1]
            metrics = {f"{name}_last": last[name] for name in _TOLD if name in last}
        metrics = self.workers.from_first(metrics)
        weights = self.setup.weights
        summary = {
            **summary_of(self.job, KIND, self.workers, metrics),
            "num_images": len(self.setup.images),
            "started_from": None if weights is None else weights.sha256,
        }
        if self.record is not None:
            model = self.folder.place.child("model")
            write_backbone(
                self.setup.task.objective.teacher.backbone.state_dict(),
                model,
                name=self.job.model.name,
                made_by=summary,
            )
            figures = {"curves": curves_picture(self.record.history, None)}
            for name, picture in figures.items():
                self.folder.place.child("figures").child(f"{name}.png").write_bytes(picture)
            self.folder.write_json("summary.json", summary)
            log_results(tracker, summary, figures)
            for file in model.files():
                tracker.log_artifact_bytes(file.read_bytes(), f"model/{file.name}")
        self.workers.wait()
        self.outside.report(metrics)
        return summary


_TOLD = (
    "train/dino",
    "train/teacher_entropy",
    "train/divergence",
    "train/feature_std",
    "probe/corloc",
    "probe/knn",
)


def _open_record(
    job: PretrainDinoJob,
    folder: RunFolder,
    setup: DINOSetup,
    outside: Outside,
    tags: dict[str, str],
) -> RunRecord:
    for line in _described(job, setup):
        outside.tell(line)
    tracker = open_job_tracker(job, folder)
    log_settings(tracker, job, tags)
    tracker.set_tags({"data.num_images": str(len(setup.images))})
    return RunRecord(
        folder=folder,
        tracker=tracker,
        tell=outside.tell,
        num_epochs=setup.settings.num_epochs,
        steps_per_epoch=setup.task.steps_per_epoch,
        every_s=job.progress_seconds,
        shown=_shown,
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
