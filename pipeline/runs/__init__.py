"""A training run's life, whatever it trains: its folder, its record, its curves, and the kinds.

In here: what classification/, pretraining/ and detection/ share around the loop of training/.
``life.py`` is the door: another kind of training is a ``TrainingRun`` of its own, and a line in
``kinds.py``. A number told of each epoch: ``record.py``; a curve: ``curves.py``; a file of the
folder: ``folder.py``.
"""
