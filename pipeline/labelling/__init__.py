"""Images -> rows of the pseudo-label table, exactly once each; without Ray.

``labeller.py`` makes rows of a batch of images, ``rows.py`` is what all labellers share, ``run.py``
is a pass over frozen inputs and the commit of the table. How boxes are found is localization/; how
the work is spread is cluster/. ``calibrate_scores.py`` makes a table of a table, with probabilities
for scores. Another status: ``data/pseudo_labels.py`` and the branch that gives it.
"""
