"""The labelling job: its weights, its backbone, its head; the rest is any bulk job's life."""

import logging
from typing import Any, TypeVar

from pipeline.cluster.bulk_job import Work, run_bulk_job, spread_of
from pipeline.config import FitHeadJob, LabelJob
from pipeline.config.labelling import ResolvedBackbone
from pipeline.data.lake import Collection
from pipeline.data.places import with_absolute_places
from pipeline.labelling.head_run import NoHeadFits, run_head_fit
from pipeline.labelling.labeller import PseudoBoxes
from pipeline.labelling.run import HEAD_FOLDER, require_free
from pipeline.labelling.saved_head import HeadRecord, read_head, require_same_features
from pipeline.lease import Lease
from pipeline.localization.head import Head
from pipeline.models.backbones import build_backbone, load_weights, with_recipe
from pipeline.models.checkpoints import Weights
from pipeline.models.published_weights import published_normalization
from pipeline.storage import Location
from pipeline.tracking.tracker import OFF

_LOG = logging.getLogger("pipeline.label_images")
_Job = TypeVar("_Job", LabelJob, FitHeadJob)


def label_images(job: LabelJob) -> int:
    """Give every image of ``job.images`` one row of the table at ``job.output``.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; the output then still holds what is done.
    """
    job, weights = with_weights(job)
    if job.localization.rule == "head":
        return run_bulk_job(job, _work_with_head(job, weights))
    if job.overwrite:
        _forget_head(Location.parse(job.output))
    return run_bulk_job(job, _work(job, weights))


def with_weights(job: _Job) -> tuple[_Job, Weights]:
    """The job with absolute places and the network of its weights, which fit; and the weights.

    Raises:
        PatchseedError: of the kind that errors.py lists.
    """
    logging.basicConfig(level=logging.INFO if job.debug else logging.WARNING, format="%(message)s")
    job = with_absolute_places(job)
    backbone = with_recipe(job.backbone)
    weights = load_weights(backbone.name, backbone.checkpoint)
    build_backbone(backbone.name, weights, feature=backbone.feature, block=backbone.block)
    _warn_of_normalization(backbone)
    return job.model_copy(update={"backbone": backbone}), weights


def _work(
    job: LabelJob, weights: Weights, head: Head | None = None, of_head: dict[str, Any] | None = None
) -> Work:
    """``of_head`` is what the configuration says of the head."""
    compute = job.compute
    return Work(
        name="label_images",
        verb="label",
        run_name=f"label-{job.localization.rule}",
        images=lambda: Collection(job.images),
        recipe=PseudoBoxes(
            job.backbone, weights, job.localization, compute.precision, compute.batch_size, head
        ),
        weights_sha256=weights.sha256,
        config=job.what_decides_the_boxes(weights.sha256) | (of_head or {}),
    )


def _work_with_head(job: LabelJob, weights: Weights) -> Work:
    """With the head that was given, or one fitted for these images; with the cut in its stead."""
    try:
        head, record = _head(job, weights)
    except NoHeadFits as fault:
        return _work_with_cut(job, weights, str(fault))
    if record.refused is not None and not job.localization.force_head:
        return _work_with_cut(job, weights, record.refused)
    return _work(job, weights, head, {"localization.head_sha256": record.head_sha256})


def _work_with_cut(job: LabelJob, weights: Weights, refused: str) -> Work:
    _LOG.warning(
        "the head is refused, the cut finds the boxes: %s (--localization.force-head uses it "
        "nevertheless)",
        refused,
    )
    cut = job.localization.model_copy(update={"rule": "ncut"})
    job = job.model_copy(update={"localization": cut})
    return _work(job, weights, None, {"localization.head_refused": refused})


def _head(job: LabelJob, weights: Weights) -> tuple[Head, HeadRecord]:
    output = Location.parse(job.output)
    if not job.resume:
        require_free(output, overwrite=job.overwrite)
    if job.localization.head is not None:
        if job.overwrite:
            _forget_head(output)
        head, record = read_head(Location.parse(job.localization.head))
        require_same_features(record, job.backbone, weights.sha256)
        return head, record
    return run_head_fit(_fit_job(job, output), weights, spread_of(job))


def _fit_job(job: LabelJob, output: Location) -> FitHeadJob:
    """For a head of the job's own, which lies in its output; it begins and resumes with the job."""
    shared = {name: getattr(job, name) for name in FitHeadJob.model_fields if hasattr(job, name)}
    own = {
        "output": str(output.child(HEAD_FOLDER)),
        "cut_threshold": job.localization.cut_threshold,
        "tracking_uri": OFF,
    }
    return FitHeadJob(**(shared | own))


def _forget_head(output: Location) -> None:
    """Of an earlier run that is overwritten."""
    with Lease(output):
        require_free(output, overwrite=True)
        output.child(HEAD_FOLDER).delete()


def _warn_of_normalization(backbone: ResolvedBackbone) -> None:
    """Tell who gives the network other inputs than it was trained on; weights of one's own may."""
    trained = published_normalization(backbone.name)
    if trained not in (None, backbone.normalize):
        _LOG.warning(
            "the published %s was trained with --backbone.normalize %s, not %s",
            backbone.name,
            trained,
            backbone.normalize,
        )
