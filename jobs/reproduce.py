"""Run the rows of a paper's table, and put the paper's figures beside ours.

    python jobs/reproduce.py --table drloc-2a --scale small --data-root data/ --dry-run
    python jobs/reproduce.py --table drloc-2a --scale small --data-root data/ --num-parallel 2
    python jobs/reproduce.py --table solost-4 --scale small --data.voc07 DIR --weights vit-ti16=FILE
    python jobs/reproduce.py --table drloc-4 --rows 'svhn-*' --data.svhn DIR --use-gpu

Tables: drloc-2a, -2b, -3, -4, -5 (DRLoc), lost-1, lost-3, solost-4, cad-5, and discovery: every
rule of ours by every measure. Rows whose data or weights are not at hand are marked, the others
run. The same command goes on where it was stopped, and repeats no run that is finished.
"""

from pathlib import Path

from pipeline.command_line import run_job
from pipeline.config import ReproduceJob


def main(job: ReproduceJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for torch."""
    from pipeline.reproduction.reproduce import reproduce

    return reproduce(job, Path(__file__).resolve().parent)


if __name__ == "__main__":
    run_job(ReproduceJob, main, __doc__)
