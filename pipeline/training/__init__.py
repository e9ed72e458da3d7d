"""What a training run is made of, whatever it learns: the loop, optimisers, schedules, checkpoints.

``loop.py`` is the door; it knows no task, no file format and no Ray. What a step computes is a
``Task`` of the room that trains; what surrounds a run is runs/.
"""
