"""Search the knobs of a job: of training, or of labelling with features computed once.

    python jobs/tune.py --space tune_spaces/drloc.py --base BASE.yaml --num-samples 32
    python jobs/tune.py --space tune_spaces/localization.py --labels-for PHOTOS --ground-truth GT
    python jobs/tune.py --space FILE --resume NAME
    ray job submit --working-dir . -- python jobs/tune.py ...

A failed trial is noted with its reason, and the sweep goes on. best.yaml is what --config takes.
"""

from pipeline.command_line import run_job
from pipeline.config.tuning import TuneJob


def main(job: TuneJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for torch and Ray."""
    from pipeline.cluster.tune import tune

    return tune(job)


if __name__ == "__main__":
    run_job(TuneJob, main, __doc__)
