"""THE ONLY ROOM THAT IMPORTS RAY: how the work of the other rooms is spread over machines.

In here: doors of jobs that Ray works for, and nothing that a notebook without Ray would miss.
``session.py`` joins or starts Ray; ``bulk_job.py`` and ``label_blocks.py`` label images,
``training.py`` trains with Ray Train, ``tune.py`` sweeps. A job of another kind: a door here that
calls its room.
"""
