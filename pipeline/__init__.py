"""Patchseed: train vision models where labels are few, make labels where there are none.

The rooms, from the ground up (imports only go downwards; `make check` proves it):

    errors.py          what can go wrong, and the exit code of each
    config/            every knob of every job, and the presets
    command_line.py    flags and YAML -> configuration -> exit code
    storage.py         a URI, its bytes, its atomic writes
    boxes.py           xyxy maths
    models/            image -> patch tokens; image -> logits and grids
    data/              images, collections, labels, and THE table the stages meet in
    losses/            a grid of tokens -> DRLoc; two networks' answers -> DINO
    training/          the loop, optimisers, schedules, checkpoints; it knows no task
    localization/      patch tokens -> one box (LOST, SoLOST); the rule is seed_expansion.py
    evaluation/        CorLoc with its interval; paired comparisons of runs
    drawing/images.py   what the method saw, as pictures
    tracking/tracker.py        MLflow, which may fail without harm
    comparison/recorded_runs.py recorded runs, read back
    comparison/compare_runs.py    runs -> the paired table
    labelling/labeller.py       a batch of images -> rows of the table (no Ray)
    pretraining/       a classifier's or a DINO run from settings to results (no Ray)
    detection/         the class-agnostic detector: model, training, use (no Ray)
    clustering/        crops of boxes -> classes without labels (no Ray)
    cluster/           the only room that imports Ray
"""
