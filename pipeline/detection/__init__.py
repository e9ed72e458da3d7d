"""The class-agnostic detector that learns from pseudo-boxes, composed from torchvision's parts.

``run.py`` trains, ``labeller.py`` uses, ``detector.py`` builds. Torchvision's Faster R-CNN differs
from Detectron2's R50-C4, which the published numbers were made with, in anchors, losses, pooling
and numbers of proposals; each file here mends one part of it. Its data is the ``box_*`` files: the
table's usable rows, their order, their batches. A number of the detector: ``options.py``.
"""
