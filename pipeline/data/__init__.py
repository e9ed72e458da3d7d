"""Images, listings, sources of bytes, ground truth, labelled sets, the loader, and THE table.

What more than one room reads; data of one kind of training stands in its room. An image's way:
``lake.py`` lists it, ``sources.py`` fetches its bytes, ``images.py`` decodes them, ``pixels.py``
carries them to a network; ``pseudo_labels.py`` is the table in which stages meet. Labelled sets
(``classification_sets.py`` and the ``labelled_*`` readers) come in batches from ``loader.py``.
"""
