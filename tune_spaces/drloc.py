"""The knobs of DRLoc, searched for the accuracy on validation images.

    python jobs/tune.py --space tune_spaces/drloc.py --base-preset small-cifar10-swin \
        --set data.root=data/ --num-samples 32

Keys are those of cluster/training.py. The test images choose nothing here: hold the best settings
against a baseline over seeds (jobs/compare_runs.py).
"""

from ray import tune

JOB = "classifier"
METRIC, MODE = "val/accuracy", "max"
# A classifier's run exports the epoch that was best on validation images.
PICK = "best"

SPACE = {
    # The paper's Table 2a has 32 to 256, with 64 best; 7 x 7 cells give 2,401 pairs.
    "drloc.num_pairs": tune.choice([8, 16, 32, 64, 128, 256]),
    # Table 2b has 0.1, 0.5 and 1; raw targets (normalize none) want less than those in sides.
    "drloc.weight": tune.loguniform(0.02, 5.0),
    # The paper's MLP is 512 wide; its size was never published as a table.
    "drloc.hidden_dim": tune.choice([64, 128, 256, 512, 1024]),
    # 0 is no choice of the job; more than 3 makes the MLP solve what the network should.
    "drloc.num_hidden": tune.choice([1, 2, 3]),
    # arXiv v1, Table 1b: regression was best, classification next.
    "drloc.mode": tune.choice(["l1", "ce", "cbr"]),
    # Cells, sides, or sides less one: a scale of the loss, so it goes with the weight.
    "drloc.normalize": tune.choice(["none", "side", "side_minus_one"]),
    # Matters for grids of 14 cells and more alone (CvT, T2T and ViT at 224 px).
    "drloc.pooling": tune.choice(["none", "mean_2x2", "overlap_3x3"]),
}

# Classification counts cells: its targets have no unit.
CONDITIONS = {"drloc.normalize": ("drloc.mode", "l1")}

# The paper's ablations, CIFAR-100, 100 epochs (with Swin-T m = 64 and lambda = 0.5 were best).
TABLE_2A = {"drloc.num_pairs": [32, 64, 128, 256]}
TABLE_2B = {"drloc.weight": [0.1, 0.5, 1.0]}
GRID = [TABLE_2A, TABLE_2B]
