"""Boxes against ground truth -> numbers with their uncertainty, beside trivial baselines.

``evaluate_boxes.py`` is the job's door. ``predictions.py`` reads what is measured and joins it to
the annotations by file name. One box per image: ``one_box.py`` (``corloc.py`` is the arithmetic).
All boxes against all objects: ``all_boxes.py`` (``average_precision.py``, ``class_matching.py``).
What scores are worth: ``scored_boxes.py`` (``calibration.py``). ``report.py`` shows all of it. No
torch, no training.
"""
