"""A detector trained in two ways, ours and torchvision's, and what detecting costs in Ray.

To measure another kind: a name in ``config.detection.DetectorKind`` is enough, unless
torchvision wants other arguments for it (``stock``).

Shape letters:  M boxes of all images
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.training_ways import LoopTraining, RepeatedBatch
from benchmarks.training_workers import Job
from pipeline.config import TrainDetectorJob
from pipeline.config.detection import DetectorKind
from pipeline.config.settings import Precision
from pipeline.data.ground_truth import read_coco
from pipeline.data.pseudo_labels import SCHEMA
from pipeline.detection.box_loader import SeenSize
from pipeline.detection.c4 import STRIDES, BackboneName
from pipeline.detection.detector import Detector, build_detector
from pipeline.detection.exported_detector import StoredDetector
from pipeline.detection.options import DetectorOptions, default_options
from pipeline.detection.setup import set_up
from pipeline.detection.task import canvas_of, inputs_of
from pipeline.labelling.rows import Provenance
from pipeline.labelling.run import open_run
from pipeline.scenes.scenes import write_collection
from pipeline.storage import Location
from pipeline.training.loop import AUTOCAST
from pipeline.training.workers import Workers

# So low that the regions stay those of the first step: what they cost depends on their sizes.
LR, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 1e-4
# So many that no schedule ends here.
_WINDOWS = 1_000_000
_TEST_REGIONS = "rpn_post_nms_test"
PROVENANCE = Provenance("benchmark", "", "")


@dataclass(frozen=True)
class Plan:
    """Which detector on images of which size; all ways start from the same weights."""

    kind: DetectorKind
    backbone: BackboneName
    """``nano`` has its own."""

    side: int
    batch_size: int
    regions: int | None
    """Per image; None is the kind's own."""

    device: torch.device
    precision: Precision = "fp32"

    @property
    def options(self) -> DetectorOptions:
        """Of the detector, in training and in a test."""
        named = {} if self.kind == "nano" else {"backbone": self.backbone}
        own = default_options(self.kind, norm="pooled", **named)
        if self.regions is None:
            return own
        fewer = {
            name: min(self.regions, getattr(own, name)) for name in ("roi_batch", _TEST_REGIONS)
        }
        return replace(own, **fewer)

    def job(self, root: Path) -> TrainDetectorJob:
        """What ``jobs/train_detector.py`` would be asked for, on the table of ``plant_table``."""
        options = self.options
        return TrainDetectorJob.model_validate(
            {
                "labels": str(root / "labels"),
                "batch_size": self.batch_size,
                "steps": _WINDOWS,
                "windows": _WINDOWS,
                "precise_bn": 0,
                "loader_workers": 0,
                "precision": self.precision,
                # A job does it once in a hundred steps, torchvision never.
                "gradient_norm_steps": 0,
                "detector": {
                    "kind": self.kind,
                    "backbone": options.backbone,
                    "init": "none",
                    "freeze_at": options.freeze_at,
                    "roi_batch": options.roi_batch,
                },
                "data": {"short_sides": [self.side], "max_side": 2 * self.side},
                "optim": {"lr": LR, "reference_batch": None, "weight_decay": WEIGHT_DECAY},
            }
        )

    def stored(self) -> StoredDetector:
        """What detects, as ``jobs/detect_images.py`` reads it from a folder."""
        torch.manual_seed(0)
        detector = build_detector(self.options).eval()
        return StoredDetector(detector, SeenSize(self.side, 2 * self.side), ("object",), "", {})


def plant_table(root: Path, *, side: int, num_images: int) -> None:
    """Scenes as JPEGs in ``root/scenes/images``, a third larger than what the detector sees; the
    table of their boxes in ``root/labels``.
    """
    short, long = side * 4 // 3, side * 16 // 9
    truth = write_collection(
        root / "scenes", num_scenes=num_images, seed=0, sizes=((long, short), (short, long))
    )
    known = {"status": "ok", "method": "planted", "run_id": "", "config_hash": ""}
    known |= {"weights_sha256": ""}
    rows = [
        {
            **dict.fromkeys(SCHEMA.names),
            **known,
            "created_at": datetime.now(UTC),
            "image_id": image.file_name,
            "uri": str(root / "scenes" / "images" / image.file_name),
            "width": image.width,
            "height": image.height,
            "boxes": image.boxes_N4.tolist(),
            "scores": [1.0] * len(image.boxes_N4),
        }
        for image in read_coco(Location.parse(str(truth)))
    ]
    run = open_run(Location.parse(str(root / "labels")), {}, resume=False, overwrite=False)
    run.commit_rows(
        iter([pa.Table.from_pylist(rows, schema=SCHEMA)]),
        weights_sha256="",
        job={},
        versions={},
        collection={},
    )


class OurTraining(LoopTraining):
    """A job as it is set up, but for its loader: a window is the same batch, ``steps`` times."""

    def __init__(self, job: TrainDetectorJob, workers: Workers, steps: int) -> None:
        setup = set_up(job, workers)
        self.detector = setup.task.objective
        (self._batch,) = islice(setup.task.begin_epoch(0), 1)
        setup.task.loader = cast(Any, RepeatedBatch(cast(Any, self._batch), steps))
        super().__init__(setup.task, setup.state, setup.settings, workers)

    def inputs(self, workers: Workers) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """The images of a step on the device, and their targets."""
        samples = self._batch.samples
        return inputs_of(samples, canvas_of(samples, workers), workers.device)[:2]


class TorchvisionTraining:
    """Torchvision's detector in the order of its reference script, ``steps`` steps per call.

    Its progress lines and its look at the loss in every step are left out, and so is moving the
    images, which favours torchvision.
    """

    def __init__(self, ours: OurTraining, plan: Plan, steps: int) -> None:
        self._network = stock(ours.detector).to(plan.device).train()
        self._images, self._targets = ours.inputs(Workers(0, 1, plan.device))
        self._plan, self._steps = plan, steps
        weights = [one for one in self._network.parameters() if one.requires_grad]
        self._optimizer = torch.optim.SGD(
            weights, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )

    def __call__(self) -> None:
        for _ in range(self._steps):
            with self._autocast():
                losses: dict[str, Tensor] = self._network(self._images, self._targets)
                loss = torch.stack([*losses.values()]).sum()
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = AUTOCAST[self._plan.precision]
        return nullcontext() if kind is None else torch.autocast(self._plan.device.type, dtype=kind)


def stock(detector: Detector) -> nn.Module:
    """Torchvision's ``FasterRCNN`` of the same sizes and weights.

    Backbone and head are copies with torch's own batch norm (a pyramid is torchvision's class
    already); anchors, pooling, proposals, drawing and losses are torchvision's.
    """
    options = detector.options
    parts = build_detector(replace(options, norm="batch"))
    pyramidal = options.kind == "fpn"
    sizes = [(one,) for one in options.anchor_sizes] if pyramidal else [options.anchor_sizes]
    predictor: Any = detector.roi_heads.box_predictor
    network: nn.Module = FasterRCNN(
        parts.backbone,
        rpn_anchor_generator=AnchorGenerator(tuple(sizes), (options.anchor_ratios,) * len(sizes)),
        rpn_pre_nms_top_n_train=options.rpn_pre_nms_train,
        rpn_pre_nms_top_n_test=options.rpn_pre_nms_test,
        rpn_post_nms_top_n_train=options.rpn_post_nms_train,
        rpn_post_nms_top_n_test=options.rpn_post_nms_test,
        rpn_nms_thresh=options.rpn_nms,
        rpn_fg_iou_thresh=options.rpn_iou_high,
        rpn_bg_iou_thresh=options.rpn_iou_low,
        rpn_batch_size_per_image=options.rpn_batch,
        rpn_positive_fraction=options.rpn_positive_fraction,
        box_roi_pool=MultiScaleRoIAlign(
            [str(level) for level in range(len(STRIDES) if pyramidal else 1)],
            options.pool_size,
            options.sampling_ratio,
        ),
        box_head=parts.roi_heads.box_head,
        box_predictor=FastRCNNPredictor(predictor.cls_score.in_features, options.num_classes + 1),
        box_fg_iou_thresh=options.roi_iou,
        box_bg_iou_thresh=options.roi_iou,
        box_batch_size_per_image=options.roi_batch,
        box_positive_fraction=options.roi_positive_fraction,
        size_divisible=options.size_divisible,
        # The images have their size already, for both.
        _skip_resize=True,
    )
    network.load_state_dict(detector.state_dict())
    return network


def training_job(plan: Plan, root: Path, *, windows: int, steps: int, threads: int) -> Job:
    """``windows`` of ``steps`` steps each, decoding in the training process."""
    job = plan.job(root)
    flags: dict[str, object] = {"preset": "nano"} if plan.kind == "nano" else {}
    flags |= {
        "labels": root / "labels",
        "windows": windows,
        "steps": windows * steps,
        "precise-bn": 0,
        "loader-workers": 0,
        "precision": plan.precision,
        "optim.lr": LR,
        "optim.reference-batch": None,
        "data.short-sides": plan.side,
        "data.max-side": job.data.max_side,
    }
    names = ("kind", "backbone", "init", "freeze_at", "roi_batch")
    flags |= {f"detector.{name.replace('_', '-')}": getattr(job.detector, name) for name in names}
    return Job(
        script="train_detector.py",
        flags=flags,
        batch_size=plan.batch_size,
        threads=threads,
        use_gpu=plan.device.type == "cuda",
    )
