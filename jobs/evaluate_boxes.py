"""Measure boxes against ground truth: CorLoc beside two trivial baselines, AP50, AP and recall.

    python jobs/evaluate_boxes.py --labels labels/ --ground-truth VOC2007/Annotations
    python jobs/evaluate_boxes.py --labels labels/ --ground-truth gt.json --output evaluation/

The labels are a pseudo-label table or a JSON file {file name: [x0, y0, x1, y1]}; the ground truth
is COCO JSON or Pascal VOC XML. CorLoc judges the best box of each image, against all objects; AP
judges every box, by the rule of --difficult. The last line printed is one JSON object with every
number.
"""

from pipeline.command_line import run_job
from pipeline.config import EvaluateJob


def main(job: EvaluateJob) -> None:
    """Print the report, then the same numbers as one line of JSON."""
    import json

    from pipeline.evaluation.evaluate_boxes import evaluate_boxes

    print(json.dumps(evaluate_boxes(job)))


if __name__ == "__main__":
    run_job(EvaluateJob, main, __doc__)
