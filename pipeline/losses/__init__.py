"""Losses: feature grids in, a scalar out; no file here knows a model.

``drloc.py`` is dense relative localization on one grid, ``multi_stage.py`` the door for training.
"""
