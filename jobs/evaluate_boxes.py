"""Measure boxes against ground truth: CorLoc with its interval, beside two trivial baselines.

    python jobs/evaluate_boxes.py --labels labels/ --ground-truth VOC2007/Annotations

The labels are a pseudo-label table or a JSON file {file name: [x0, y0, x1, y1]}; the ground truth
is COCO JSON or Pascal VOC XML. The last line printed is one JSON object with every number.
"""

from pipeline.command_line import run_job
from pipeline.config import EvaluateJob


def evaluate(job: EvaluateJob) -> None:
    """Print the report, then the same numbers as one line of JSON."""
    import json

    from rich.console import Console

    from pipeline.evaluation.evaluate import evaluate_boxes
    from pipeline.evaluation.report import as_json, print_report

    evaluation = evaluate_boxes(
        job.labels,
        job.ground_truth,
        ignore_difficult=job.ignore_difficult,
        num_resamples=job.num_resamples,
        seed=job.seed,
    )
    print_report(evaluation, Console())
    print(json.dumps(as_json(evaluation)))


if __name__ == "__main__":
    run_job(EvaluateJob, evaluate, __doc__)
