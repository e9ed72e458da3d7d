"""Boxes against ground truth -> numbers with their uncertainty, beside trivial baselines.

``evaluate_boxes.py`` is the job's door. One box per image: ``one_box.py`` (``corloc.py`` is the
arithmetic, ``report.py`` prints). All boxes against all objects: ``all_boxes.py``
(``average_precision.py``, ``class_matching.py``; ``ap_report.py`` prints). ``predictions.py`` reads
what is measured, ``matching.py`` joins it to the annotations by file name. No torch, no training.
"""
