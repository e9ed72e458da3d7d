"""Give every image of a collection one pseudo box, and write the boxes as Parquet.

    python jobs/label_images.py --images photos/ --output labels/
    python jobs/label_images.py --images s3://lake/photos --output s3://lake/labels --resume
    ray job submit --working-dir . -- python jobs/label_images.py --images ... --output ...

One row per image, also for those that cannot be read. Killed runs go on with --resume.
"""

from pipeline.command_line import run_job
from pipeline.config import LabelJob


def main(job: LabelJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for torch and Ray."""
    from pipeline.cluster.label_images import label_images

    return label_images(job)


if __name__ == "__main__":
    run_job(LabelJob, main, __doc__)
