"""The job that fits a head; the life of the fit is labelling/head_run.py."""

import logging
import sys

from pipeline.cluster.bulk_job import spread_of
from pipeline.cluster.label_images import with_weights
from pipeline.config import FitHeadJob
from pipeline.labelling.head_run import REPORT, run_head_fit
from pipeline.storage import Location

_LOG = logging.getLogger("pipeline.fit_head")


def fit_head(job: FitHeadJob) -> int:
    """Fit a head on a sample of ``job.images`` and write it to ``job.output``.

    Returns:
        The exit code: 0, also where labelling will refuse the head.

    Raises:
        PatchseedError: of the kind that errors.py lists; finished blocks stay.
    """
    job, weights = with_weights(job)
    _, record = run_head_fit(job, weights, spread_of(job))
    if record.refused is not None:
        _LOG.warning("labelling will refuse this head and use the cut: %s", record.refused)
    output = Location.parse(job.output)
    sys.stdout.write(
        f"Read:        {output.child(REPORT)}\n"
        "Label:       python jobs/label_images.py --images IMAGES --output LABELS "
        f"--localization.rule head --localization.head {output}\n"
    )
    return 0
