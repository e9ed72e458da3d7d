"""A training step that diverged, computed again on any machine: ``python -m pipeline.replay FILE``.

What was kept is read in ``kept_step.py`` and computed in ``replaying.py``; what they must know of
each kind of job is in ``kinds.py``. It was written by ``runs/step_fault.py``.
"""
