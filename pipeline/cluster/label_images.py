"""The labelling job: its weights, its backbone, its recipe; the rest is any bulk job's life."""

import logging

from pipeline.cluster.bulk_job import Work, run_bulk_job
from pipeline.config import LabelJob
from pipeline.data.lake import Collection
from pipeline.data.places import with_absolute_places
from pipeline.labelling.labeller import PseudoBoxes
from pipeline.models.backbones import build_backbone, load_weights
from pipeline.models.checkpoints import Weights
from pipeline.models.exported_backbone import network_of_checkpoint
from pipeline.models.published_weights import published_normalization

_LOG = logging.getLogger("pipeline.label_images")


def label_images(job: LabelJob) -> int:
    """Give every image of ``job.images`` one row of the table at ``job.output``.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; the output then still holds what is done.
    """
    logging.basicConfig(level=logging.INFO if job.debug else logging.WARNING, format="%(message)s")
    job = _with_backbone_of_checkpoint(with_absolute_places(job))
    weights = load_weights(job.backbone.name, job.backbone.checkpoint)
    build_backbone(
        job.backbone.name, weights, feature=job.backbone.feature, block=job.backbone.block
    )
    _warn_of_normalization(job)
    return run_bulk_job(job, _work(job, weights))


def _work(job: LabelJob, weights: Weights) -> Work:
    compute = job.compute
    return Work(
        name="label_images",
        verb="label",
        run_name=f"label-{job.localization.rule}",
        images=lambda: Collection(job.images),
        recipe=PseudoBoxes(
            job.backbone, weights, job.localization, compute.precision, compute.batch_size
        ),
        weights_sha256=weights.sha256,
        config=job.what_decides_the_boxes(weights.sha256),
    )


def _warn_of_normalization(job: LabelJob) -> None:
    """Tell who gives the network other inputs than it was trained on; weights of one's own may."""
    name, chosen = job.backbone.name, job.backbone.normalize
    trained = published_normalization(name)
    if trained not in (None, chosen):
        _LOG.warning(
            "the published %s was trained with --backbone.normalize %s, not %s",
            name,
            trained,
            chosen,
        )


def _with_backbone_of_checkpoint(job: LabelJob) -> LabelJob:
    """The job with the network that the file of weights says it belongs to, where it does."""
    backbone = job.backbone
    default = type(backbone).model_fields["name"].default
    name = network_of_checkpoint(backbone.name, backbone.checkpoint, default=default)
    return job.model_copy(update={"backbone": backbone.model_copy(update={"name": name})})
