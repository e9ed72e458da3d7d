"""Training classifiers, with DRLoc beside the cross-entropy: a run's settings, task and results.

``run.py`` is the door, ``setup.py`` makes of settings what the loop needs, ``task.py`` is what a
step computes. In here: what only classifiers have (``augment.py``, ``confusion.py``). Losses are in
losses/, networks in models/, what all runs share in runs/. Another term beside the labels:
``task.py``.
"""
