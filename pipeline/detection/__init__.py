"""The class-agnostic detector that learns from pseudo-boxes, composed from torchvision's parts.

``detector.py`` is the door. Torchvision's Faster R-CNN differs from Detectron2's R50-C4, which the
published numbers were made with, in anchors, losses, pooling and numbers of proposals; each file
here mends one part of it.
"""
