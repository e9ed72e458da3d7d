"""Losses: tensors in, a scalar out; no file here knows a model.

``drloc.py`` is dense relative localization on one grid, ``multi_stage.py`` its door for training,
``pairs.py`` who is asked about whom. ``dino.py`` is the student's cross-entropy to the teacher, and
the centre of its answers. A variant is a function beside the others.
"""
