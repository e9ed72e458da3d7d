"""Image -> patch features, or logits and grids; where weights come from, and how they are written.

``backbones.py`` builds any network by name; ``features.py`` and ``grid_classifier.py`` are the two
promises. No network here knows a loss or a rule. timm is imported in ``backbones.py`` and
``published_weights.py`` alone. A network of our own: a file of its own, a name in
``model_options.py``.
"""
