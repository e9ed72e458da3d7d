"""Patchseed: train vision models where labels are few, make labels where there are none.

The rooms, from the ground up (imports only go downwards; `make check` proves it):

    errors.py          what can go wrong, and the exit code of each
    config.py          every knob of every job
    command_line.py    flags and YAML -> configuration -> exit code
    storage.py         a URI, its bytes, its atomic writes
    boxes.py           xyxy maths
    models/            image -> patch tokens
    data/              images, collections, ground truth, and THE table the stages meet in
    localization/      patch tokens -> one box (LOST, SoLOST); the rule is seed_expansion.py
    evaluation/        CorLoc with its interval and its trivial baselines
    visualisation.py   what the method saw, as pictures
    tracking.py        MLflow, which may fail without harm
    labelling.py       a batch of images -> rows of the table (no Ray)
    cluster/           the only room that imports Ray
"""
