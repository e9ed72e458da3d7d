"""The door of jobs/pretrain_dino.py: a DINO run, and its teacher at the top of the output."""

from functools import partial
from typing import Any

import safetensors.torch

from pipeline.cluster.training import run_training, say
from pipeline.config import PretrainDinoJob
from pipeline.models.exported_backbone import WEIGHTS, write_backbone
from pipeline.pretraining.run import pretrain_dino_here
from pipeline.runs.folder import RunFolder
from pipeline.runs.places import require_places, with_absolute_places
from pipeline.storage import Location


def pretrain_dino(job: PretrainDinoJob) -> int:
    """Train what ``job`` describes, or go on with it.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; finished epochs are kept.
    """
    job = with_absolute_places(job)

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

    return run_training(job, pretrain_dino_here, finish, partial(require_places, job))
