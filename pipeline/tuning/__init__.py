"""A sweep without Ray: its space, its proposals, one trial, its record and its results.

space.py                 a file of tune_spaces/ -> knobs
proposals.py             knobs and earlier trials -> the next values
tuned_job.py             values -> the settings of the job they belong to
run_trial.py             one trial, from its values to its outcome
population.py, segment.py   population based training: who copies whom; a part of a run
localization_sweep.py, feature_cache.py, tuning/feature_cache.py   trials that share forward passes
trials.py                what was proposed and what came of it, on a disk
sweep_tracking.py        the same in MLflow
results.py, tuning/results.py  the table, the best settings, and which knob matters
"""
