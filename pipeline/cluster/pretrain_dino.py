"""The door of jobs/pretrain_dino.py: a DINO run, and its teacher at the top of the output."""

import os
from typing import Any

import safetensors.torch

from pipeline.cluster.training import absolute_tracking_uri, run_training, say
from pipeline.config import PretrainDinoJob
from pipeline.models.exported_backbone import WEIGHTS, write_backbone
from pipeline.pretraining.dino_run import pretrain_dino_here
from pipeline.pretraining.run_folder import RunFolder
from pipeline.storage import Location


def pretrain_dino(job: PretrainDinoJob) -> int:
    """Train what ``job`` describes, or go on with it.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; finished epochs are kept.
    """
    job = _with_absolute_places(job)

    def check() -> None:
        for place in job.images:
            Location.parse(place).required("--images")

    def finish(folder: RunFolder, summary: dict[str, Any]) -> None:
        target = Location.parse(job.output)
        content = folder.place.child("model").child(WEIGHTS).read_bytes()
        state = safetensors.torch.load(content)
        write_backbone(state, target, name=job.model.name, made_by=summary, half=job.half)
        teacher = target.child(WEIGHTS)
        say(f"teacher  {teacher}")
        say(
            f"label    python jobs/label_images.py --backbone.checkpoint {teacher} "
            "--images ... --output ..."
        )

    return run_training(job, pretrain_dino_here, finish, check)


def _with_absolute_places(job: PretrainDinoJob) -> PretrainDinoJob:
    """The job as workers in other folders, and on other machines, understand it."""
    init = job.init
    if init is not None and os.path.exists(init):
        init = os.path.abspath(init)
    watched = {
        name: str(Location.parse(place))
        for name in ("images", "ground_truth", "labelled")
        if (place := getattr(job.probe, name)) is not None
    }
    return job.model_copy(
        update={
            "output": str(Location.parse(job.output)),
            "tracking_uri": absolute_tracking_uri(job.tracking_uri),
            "images": tuple(str(Location.parse(text)) for text in job.images),
            "init": init,
            "probe": job.probe.model_copy(update=watched),
        }
    )
