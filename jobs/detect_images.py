"""Find the objects of every image of a collection with a trained detector, as Parquet.

    python jobs/detect_images.py --images photos/ --detector OUT --output found/
    python jobs/detect_images.py --labels labels/ --detector OUT --output found/   # the table's own
    python jobs/detect_images.py --images ... --detector OUT --output ... --resume
    ray job submit --working-dir . -- python jobs/detect_images.py --images ... --output ...

The table is that of jobs/label_images.py: one row per image, also for those that cannot be read.
Killed runs go on with --resume.
"""

from pipeline.command_line import run_job
from pipeline.config import DetectJob


def main(job: DetectJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for torch and Ray."""
    from pipeline.cluster.detect_images import detect_images

    return detect_images(job)


if __name__ == "__main__":
    run_job(DetectJob, main, __doc__)
