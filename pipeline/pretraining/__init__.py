"""DINO: a ViT trained without labels, from settings to an exported teacher.

``run.py`` is the door, ``setup.py`` makes of settings what the loop needs, ``task.py`` is what a
step computes (the loss is losses/dino.py). ``images.py`` lists, ``views.py`` draws the crops,
``batch_images.py`` makes them, ``network.py`` is what is trained, ``probe.py`` watches it.
"""
