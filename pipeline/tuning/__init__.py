"""A sweep of settings without Ray: its space, its proposals, one trial, its record, its results.

``sweep.py`` is the door; ``space.py`` reads a file of tune_spaces/, ``proposals.py`` finds the next
values, ``run_trial.py`` is one trial from its values to its outcome. Trials of labelling share
forward passes: ``localization_sweep.py``. Another way to propose: ``proposals.py``.
"""
