"""The knobs of LOST, SoLOST, the cut and the head, searched for the CorLoc on annotated images.

    python jobs/tune.py --space tune_spaces/localization.py --labels-for PHOTOS --ground-truth GT

Keys are those of label_images.py. All features of a space are computed once (docs/tune.md).
"""

from ray import tune

JOB = "localization"
METRIC, MODE = "corloc", "max"

SPACE = {
    # LOST and SoLOST differ in one step; a head is fitted in each trial, on these very images.
    "localization.rule": tune.choice(["lost", "solost", "ncut", "head"]),
    # LOST uses 100; 1 is the seed alone, 200 twice the paper's.
    "localization.num_candidates": tune.choice([1, 25, 50, 100, 150, 200]),
    # SoLOST found 0.5 to 0.6 best; below 0.2 a box shrinks to its seed.
    "localization.keep_fraction": tune.quniform(0.2, 1.0, 0.01),
    # Changes only how votes are weighed, but moves a box in one case of six.
    "localization.similarity": tune.choice(["dot", "cosine", "pearson"]),
    # 0.2 was best of 0 to 0.3 for the cut, and what a head is fitted on (docs/log.md).
    "localization.cut_threshold": tune.quniform(0.0, 0.4, 0.05),
    # Keys are best for DINO; supervised nets want values (docs/log.md).
    "backbone.feature": tune.choice(["key", "query", "value"]),
    # The last block for DINO; nets trained on labels are best around their middle.
    "backbone.block": tune.choice([-1, -2, -4, -6]),
}

CONDITIONS = {
    "localization.num_candidates": ("localization.rule", "lost"),
    "localization.keep_fraction": ("localization.rule", "solost"),
    "localization.similarity": ("localization.rule", ("lost", "solost")),
    "localization.cut_threshold": ("localization.rule", ("ncut", "head")),
}

# SoLOST's Table 3: both rules under each similarity, at the papers' own k and m.
RULES_AND_SIMILARITIES = {
    "localization.rule": ["lost", "solost"],
    "localization.similarity": ["dot", "cosine", "pearson"],
}
# LOST's k, and SoLOST's m in steps of a tenth.
CANDIDATES = {
    "localization.rule": ["lost"],
    "localization.num_candidates": [1, 50, 100, 150, 200],
}
FRACTIONS = {
    "localization.rule": ["solost"],
    "localization.keep_fraction": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
}
# The cut's own threshold, and the head that is learnt from such cuts.
CUTS = {
    "localization.rule": ["ncut", "head"],
    "localization.cut_threshold": [0.1, 0.2, 0.3],
}
GRID = [RULES_AND_SIMILARITIES, CANDIDATES, FRACTIONS, CUTS]
