"""Does DRLoc help? Runs with it against their paired baselines without, over seeds.

    python jobs/compare_runs.py --experiment patchseed
    python jobs/compare_runs.py --runs runs/ --output comparison/

Runs are paired that differ in nothing but DRLoc: train each seed twice, the second time with
--drloc.weight 0. The last line printed is one JSON object with every number.
"""

from pipeline.command_line import run_job
from pipeline.config import CompareJob


def main(job: CompareJob) -> None:
    """Print the paired table, then the same numbers as one line of JSON."""
    import json

    from pipeline.comparison.report import compare_runs

    numbers = compare_runs(
        experiment=job.experiment,
        runs=job.runs,
        tracking_uri=job.tracking_uri,
        metric=job.metric,
        confidence=job.confidence,
        output=job.output,
    )
    print(json.dumps(numbers))


if __name__ == "__main__":
    run_job(CompareJob, main, __doc__)
