"""Train the class-agnostic detector (CAD) on the boxes of a pseudo-label table, on Ray Train.

    python jobs/train_detector.py --labels labels/ --output OUT
    python jobs/train_detector.py --labels labels/ --num-workers 8 --use-gpu --output OUT
    python jobs/train_detector.py --labels labels/ --preset lost --output OUT     # or solost-repro,
                                                                                  # fast-fpn, nano
    python jobs/train_detector.py ... --probe.images val/ --probe.ground-truth val.json

Images are found through the table's URIs. The same command goes on with a run that was stopped.
"""

from pipeline.command_line import run_job
from pipeline.config import TrainDetectorJob
from pipeline.config.detection import presets


def main(job: TrainDetectorJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for torch and Ray."""
    from pipeline.cluster.train_detector import train_detector

    return train_detector(job)


if __name__ == "__main__":
    run_job(TrainDetectorJob, main, __doc__, presets())
