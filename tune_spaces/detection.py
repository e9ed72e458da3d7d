"""The knobs of a class-agnostic detector on pseudo-boxes, searched for AP50 on annotated photos.

    python jobs/tune.py --space tune_spaces/detection.py --base-preset nano --num-samples 16 \
        --set labels=labels/ probe.images=PHOTOS probe.ground_truth=BOXES probe.every=1

Keys are those of train_detector.py. The photos of the probe must not be those of the labels.
"""

from ray import tune

JOB = "detector"
METRIC, MODE = "probe/ap50", "max"
# The detector that is written is the one after the last step.
PICK = "last"

SPACE = {
    # Detectron2's is 0.02 for 16 images; pseudo-boxes are noisy, which bears less.
    "optim.lr": tune.loguniform(0.002, 0.08),
    # CutLER: 0.01 forgives regions without a pseudo-box; None punishes them, as LOST does.
    "detector.droploss": tune.choice([None, 0.01, 0.1]),
    # Trust boxes by their score, or all alike.
    "detector.weight_by_score": tune.choice([False, True]),
    # Fewer labels of a higher score, or all of them; scores are no probabilities.
    "data.min_score": tune.choice([None, 0.2, 0.3, 0.4]),
    # Half of the boxes that overlap by more are taken for one object (LOST's runs: 0.4 to 0.5).
    "detector.nms": tune.quniform(0.3, 0.7, 0.1),
    # Regions trained on per image; 512 is Detectron2's.
    "detector.roi_batch": tune.choice([64, 128, 256, 512]),
}

# CutLER's own switch, and LOST's training without it.
DROPLOSS = {"detector.droploss": [None, 0.01]}
GRID = [DROPLOSS]
