"""The knobs of LOST and SoLOST, searched for the CorLoc of a labelled probe set.

Keys are those of ``LabelJob``; a test draws samples and applies each.
"""

from ray import tune

METRIC, MODE = "corloc", "max"

SPACE = {
    "localization.rule": tune.choice(["lost", "solost"]),
    # LOST uses 100; 1 is the seed alone, 200 twice the paper's. Only LOST reads it.
    "localization.num_candidates": tune.choice([1, 25, 50, 100, 150, 200]),
    # SoLOST found 0.5 to 0.6 best; below 0.2 a box shrinks to its seed. Only SoLOST reads it.
    "localization.keep_fraction": tune.uniform(0.2, 1.0),
    # Changes only how votes are weighed, but moves a box in one case of six.
    "localization.similarity": tune.choice(["dot", "cosine", "pearson"]),
    # Keys are best for DINO; supervised nets want values of a middle block (docs/log.md).
    "backbone.feature": tune.choice(["key", "query", "value"]),
}
