"""The knobs of DINO's pre-training, searched for the CorLoc of boxes from its teacher.

    python jobs/tune.py --space tune_spaces/dino.py --base dino.yaml --num-samples 16 \
        --set probe.images=PHOTOS probe.ground_truth=BOXES probe.every=1

Keys are those of cluster/training.py. A collapse shows as a CorLoc of the trivial boxes.
"""

from ray import tune

JOB = "dino"
METRIC, MODE = "probe/corloc", "max"
# A pre-training run has no best epoch: its last teacher is what is labelled with.
PICK = "last"

SPACE = {
    # The paper: 5e-4 per 256 images; small batches and networks bear more.
    "optim.lr": tune.loguniform(1e-4, 4e-3),
    # Above 0.07 training is unstable (the released code's own warning).
    "dino.teacher_temp": tune.quniform(0.03, 0.07, 0.005),
    # 0.996 is for 1024 images a step; fewer images want a slower teacher.
    "dino.teacher_momentum": tune.choice([0.99, 0.996, 0.998, 0.9995]),
    # How fast the centre follows; it is what keeps one prototype from winning.
    "dino.center_momentum": tune.choice([0.8, 0.9, 0.99]),
    # The paper ends at 0.4; small data sets overfit before.
    "optim.weight_decay_end": tune.choice([0.1, 0.2, 0.4]),
    # Local views teach parts; each costs a forward pass.
    "crops.num_local": tune.choice([2, 4, 6, 8]),
    # Prototypes: 65,536 are for ImageNet.
    "dino.out_dim": tune.choice([1024, 4096, 16384, 65536]),
}

# The paper's Table 8 weighs accuracy against time with 2, 6 and 10 local views.
LOCAL_VIEWS = {"crops.num_local": [2, 6, 10]}
GRID = [LOCAL_VIEWS]
