"""MLflow, which may fail without harm: the only room that imports it.

``tracker.py`` is the door. Nothing here can stop or slow a job; what MLflow did not take is sent
again by the same command.
"""
