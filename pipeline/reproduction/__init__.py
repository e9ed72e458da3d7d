"""The papers' tables again: their rows as runs, and their figures beside ours; without Ray.

The work itself is done by the jobs (train_classifier, label_images, train_detector, detect_images),
each run a process of its own that goes on where it was stopped.
"""
