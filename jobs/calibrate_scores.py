"""Turn the scores of a pseudo-label table into probabilities, by some tens of labelled images.

    python jobs/calibrate_scores.py --labels labels/ --ground-truth few.json --output labels2/
    python jobs/evaluate_boxes.py --labels labels2/ --ground-truth others.json

A box's new score is the probability that it has IoU >= 0.5 with some object. The new table is the
old one with other scores; its folder _calibration says what they are worth, measured on labelled
images that they were not fitted on. Draw the images to label at random: at least 10, better 50.
"""

from pipeline.command_line import run_job
from pipeline.config import CalibrateJob


def main(job: CalibrateJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for what it needs."""
    from pipeline.labelling.calibrate_scores import calibrate_scores

    return calibrate_scores(job)


if __name__ == "__main__":
    run_job(CalibrateJob, main, __doc__)
