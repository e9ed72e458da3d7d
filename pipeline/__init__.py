"""Patchseed: make labels where there are none, train vision models where labels are few.

The rooms, from the ground up. Imports only go downwards, and `make check` proves it; what a room
holds and how it is extended stands in its own docstring.

    errors, storage               what can go wrong, with an exit code each; a URI and its bytes
    config, boxes, lease, command_line, progress
                                  every knob; xyxy maths; one writer per output; flags; a bar
    data, scenes, models, localization, losses, training, drawing, tracking
                                  what everything is made of: none of them knows a job
    runs, evaluation              a training run's life; boxes against ground truth
    classification, pretraining, detection, labelling, clustering, gallery, comparison
                                  what the jobs do, each in its room; a notebook can call them
    tuning, reproduction          many runs: sweeps of settings, the papers' tables
    cluster                       the only room that imports Ray
"""
