"""Every knob of every job, with its default, its legal range and its reason.

To add a knob: add a field with a string under it to its group. The string is the flag's ``--help``,
the field's name is the flag (``localization.keep_fraction`` -> ``--localization.keep-fraction``),
and the range in ``Field`` is checked before anything is loaded. Then use it where the component
(a loss, a transform, a loader) holds its group: nothing lies between. Names of choices stand here
too, and pure functions that take one import it from here. A job stops at a room's door.

    settings.py         what all groups, all tracked jobs and all trainings share
    labelling.py        label_images, fit_head, evaluate_boxes, draw_boxes, demo
    calibration.py      calibrate_scores
    clustering.py       cluster_boxes
    classification.py   train_classifier, compare_runs
    pretraining.py      pretrain_dino
    detection.py        train_detector, detect_images
    reproduction.py     reproduce
    tuning.py           tune
    presets.py          the papers' rows and the published recipes, as values of those knobs
"""

from pipeline.config.calibration import CalibrateJob
from pipeline.config.classification import (
    AugmentConfig,
    ClassifierConfig,
    CompareJob,
    DataConfig,
    DRLocConfig,
    OptimConfig,
    TrainClassifierJob,
)
from pipeline.config.clustering import ClusterJob, TokenBackboneConfig
from pipeline.config.detection import DetectJob, DetectorConfig, TrainDetectorJob
from pipeline.config.labelling import (
    BackboneConfig,
    BlockJob,
    BulkJob,
    ComputeConfig,
    DemoJob,
    DrawJob,
    EvaluateJob,
    FitHeadJob,
    ImagesConfig,
    LabelJob,
    LocalizationConfig,
)
from pipeline.config.pretraining import PretrainDinoJob
from pipeline.config.reproduction import ReproduceJob
from pipeline.config.settings import Settings, TrackedSettings, TrainingJob, flatten
from pipeline.config.tuning import TuneJob

__all__ = [
    "AugmentConfig",
    "BackboneConfig",
    "BlockJob",
    "BulkJob",
    "CalibrateJob",
    "ClassifierConfig",
    "ClusterJob",
    "CompareJob",
    "ComputeConfig",
    "DRLocConfig",
    "DataConfig",
    "DemoJob",
    "DetectJob",
    "DetectorConfig",
    "DrawJob",
    "EvaluateJob",
    "FitHeadJob",
    "ImagesConfig",
    "LabelJob",
    "LocalizationConfig",
    "OptimConfig",
    "PretrainDinoJob",
    "ReproduceJob",
    "Settings",
    "TokenBackboneConfig",
    "TrackedSettings",
    "TrainClassifierJob",
    "TrainDetectorJob",
    "TrainingJob",
    "TuneJob",
    "flatten",
]
