"""Boxes against ground truth -> numbers with their uncertainty, beside trivial baselines.

``evaluate.evaluate_boxes`` is the door: ``predictions`` reads what is measured, ``matching`` joins
it to the annotations by file name, ``corloc`` is the arithmetic, ``report`` prints. No torch here.
"""
