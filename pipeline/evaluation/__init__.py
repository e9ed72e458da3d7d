"""Boxes against ground truth -> numbers with their uncertainty, beside trivial baselines.

``evaluate.evaluate_boxes`` is the door: ``predictions`` reads what is measured, ``matching`` joins
it to the annotations by file name, ``corloc`` is the arithmetic, ``report`` prints. Of all boxes
against all objects ``evaluate_detections`` is the door: ``average_precision`` is COCO's,
``ap_interval`` how sure it is, ``voc_metric`` and ``class_matching`` the classes',
``ap_report`` and ``ap_picture`` what is shown. No torch here.
"""
