"""Recorded runs -> the paired table: what differs, seed by seed, and how sure that is.

``recorded_runs.py`` reads runs back from MLflow or their folders, ``paired.py`` pairs them and does
the arithmetic, ``report.py`` is the door and shows. Nothing here trains or measures. Another
column: ``report.py``; something else than DRLoc to compare: ``paired.py``.
"""
