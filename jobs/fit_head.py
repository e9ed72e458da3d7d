"""Fit a head that finds objects on a sample of one's own images: without labels, in minutes.

    python jobs/fit_head.py --images photos/ --output head/
    python jobs/label_images.py --images photos/ --output labels/
        --localization.rule head --localization.head head/

The cuts of the sample's images teach one linear direction in feature space (docs/method.md); the
report says whether it can be trusted. Killed runs go on with --resume; --compute.num-actors 0 works
in this process, without Ray.
"""

from pipeline.command_line import run_job
from pipeline.config import FitHeadJob


def main(job: FitHeadJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for torch and Ray."""
    from pipeline.cluster.fit_head import fit_head

    return fit_head(job)


if __name__ == "__main__":
    run_job(FitHeadJob, main, __doc__)
