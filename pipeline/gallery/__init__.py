"""A table -> pictures of its boxes, and of the maps a box came from.

``gallery.py`` is the door; ``maps.py`` computes the maps again, and alone needs the network. How a
picture looks is drawing/images.py.
"""
