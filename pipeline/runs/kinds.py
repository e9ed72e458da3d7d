"""Which kinds of training there are: a job's settings, and where its run on one worker is found.

To add a kind: a job in config/ with a ``kind`` of its own, a room with ``run.py``, ``setup.py`` and
``task.py``, and a line in ``KINDS``. Whoever starts runs, or searches their settings, asks here.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipeline.config import PretrainDinoJob, TrainClassifierJob, TrainDetectorJob, TrainingJob
from pipeline.config import detection as detection_config
from pipeline.config import presets as classifier_config
from pipeline.config import pretraining as dino_config

if TYPE_CHECKING:
    from pipeline.runs.life import TrainHere


@dataclass(frozen=True)
class TrainingKind:
    """A kind of training."""

    job: type[TrainingJob]
    presets: Callable[[], dict[str, dict[str, Any]]]
    """Settings by the names that ``--preset`` takes."""

    script: str
    """What people start."""

    module: str
    function: str
    """Its run on one worker."""

    def train_here(self) -> "TrainHere":
        """The run on one worker; imported late, for it takes seconds."""
        found: TrainHere = getattr(importlib.import_module(self.module), self.function)
        return found


KINDS: Final = {
    kind.job.kind: kind
    for kind in (
        TrainingKind(
            TrainClassifierJob,
            classifier_config.presets,
            "jobs/train_classifier.py",
            "pipeline.classification.run",
            "train_classifier_here",
        ),
        TrainingKind(
            PretrainDinoJob,
            dino_config.presets,
            "jobs/pretrain_dino.py",
            "pipeline.pretraining.run",
            "pretrain_dino_here",
        ),
        TrainingKind(
            TrainDetectorJob,
            detection_config.presets,
            "jobs/train_detector.py",
            "pipeline.detection.run",
            "train_detector_here",
        ),
    )
}
"""By their names."""
