"""Train an image classifier where labels are few, with DRLoc beside the cross-entropy.

    python jobs/train_classifier.py --data.name cifar10 --data.root data/ --data.download
    python jobs/train_classifier.py --preset paper-cifar100-swin --data.root data/
    python jobs/train_classifier.py ... --num-workers 8 --use-gpu   # or under torchrun
    python jobs/train_classifier.py ... --drloc.weight 0        # the paired baseline
    ray job submit --working-dir . -- python jobs/train_classifier.py ...

The same command goes on with a run that was stopped. jobs/compare_runs.py compares runs.
"""

from pipeline.command_line import run_job
from pipeline.config import TrainClassifierJob
from pipeline.config.presets import presets


def main(job: TrainClassifierJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for torch and Ray."""
    from pipeline.cluster.training import train_classifier

    return train_classifier(job)


if __name__ == "__main__":
    run_job(TrainClassifierJob, main, __doc__, presets())
