"""From boxes without classes to classes without names: crops -> class tokens -> k-means -> labels.

LOST's class-aware detection (BMVC 2021, section 4.4). The door is ``run.py``; no Ray.
"""
