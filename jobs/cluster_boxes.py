"""Give the boxes of a pseudo-label table classes without names: DINO's class tokens, k-means.

    python jobs/cluster_boxes.py --labels labels/ --num-clusters 20 --output classes/
    python jobs/cluster_boxes.py --labels labels/ --method lost --output classes/   # as the paper
    python jobs/train_detector.py --labels classes/ --output OUT                    # class-aware

The new table is the old one with labels from 1 to the number of clusters; jobs/evaluate_boxes.py
matches them with the classes of a ground truth. A picture shows samples of each cluster.
"""

from pipeline.command_line import run_job
from pipeline.config import ClusterJob


def main(job: ClusterJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for torch."""
    from pipeline.clustering.run import cluster_boxes

    return cluster_boxes(job)


if __name__ == "__main__":
    run_job(ClusterJob, main, __doc__)
