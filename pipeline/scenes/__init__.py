"""Procedural scenes with exact boxes and masks: a sample collection that needs no download.

``scenes.py`` is the door; ``shapes.py`` are the objects, ``backdrops.py`` what stands behind them,
``rendering.py`` paints. A scene is a function of its seed. Numpy and Pillow, nothing else.
"""
