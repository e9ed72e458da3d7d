"""The papers' tables again: their rows as runs, and their figures beside ours; without Ray.

``reproduce.py`` is the door. ``published_figures.py`` holds the papers' numbers with their sources,
``tables.py`` the cells; ``plan.py`` makes runs of them, ``measured.py`` reads what came out. The
work itself is done by the jobs, each run a process of its own that goes on where it was stopped.
"""
