"""From boxes without classes to classes without names: crops -> class tokens -> k-means -> classes.

LOST's class-aware detection (BMVC 2021, section 4.4). ``run.py`` is the door; another way to
cluster is a function in ``kmeans.py``.
"""
