"""What a run's folder is named by."""

import pytest

from pipeline.config import (
    DataConfig,
    PretrainDinoJob,
    TrainClassifierJob,
    TrainDetectorJob,
    TrainingJob,
)
from pipeline.runs.folder import RunFolder


@pytest.mark.parametrize(
    "job",
    [
        TrainClassifierJob(data=DataConfig(name="cifar10", root="data")),
        PretrainDinoJob(images=("photos",)),
        TrainDetectorJob(labels="labels"),
    ],
    ids=lambda job: type(job).__name__,
)
def test_a_run_that_looks_for_anomalies_is_the_same_run(job: TrainingJob) -> None:
    watched = job.model_copy(update={"detect_anomaly": True})
    assert RunFolder.of(watched) == RunFolder.of(job)
    other = job.model_copy(update={"seed": job.seed + 1})
    assert RunFolder.of(other) != RunFolder.of(job)
