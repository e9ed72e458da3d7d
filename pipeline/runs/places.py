"""The settings of a job that name files and folders: made absolute, and looked for in time.

Each job lists what it reads in its class's ``places`` (config/); for one more, a line there. For
another kind of place: its name in ``Place`` of settings.py, and how to look for it in ``_require``.
"""

import os
from collections.abc import Container, Iterator
from operator import attrgetter
from typing import Any, TypeVar

from pipeline.config.settings import Place, Settings, TrainingJob
from pipeline.data.labelled_folders import is_archive
from pipeline.data.lake import Collection
from pipeline.storage import Location
from pipeline.tracking.tracker import absolute_tracking_uri

_Job = TypeVar("_Job", bound=TrainingJob)
_Group = TypeVar("_Group", bound=Settings)


def with_absolute_places(job: _Job) -> _Job:
    """The job as workers in other folders, and on other machines, understand it.

    Raises:
        ConfigError: a place is not one we read or write.
    """
    output = str(Location.parse(job.output))
    changed = {"output": output, "tracking_uri": absolute_tracking_uri(job.tracking_uri)}
    for name, value in (changed | absolute_places(job)).items():
        job = _with(job, name, value)
    return job


def absolute_places(job: Settings) -> dict[str, Any]:
    """What the job was told to read, by dotted names, with nothing relative in it.

    Raises:
        ConfigError: a place is not one we read.
    """
    return {name: _absolute(kind, value) for name, kind, value in _given(job)}


def require_places(job: Settings, *, but: Container[str] = ()) -> None:
    """Look for what the job was told to read, before anything that costs time is begun.

    Args:
        job: Whose places; weights that may have been published are not looked for.
        but: Dotted names of places that need not be there yet.

    Raises:
        ConfigError: a place is not one we read.
        DataError: there is nothing; the message names the flag, or the place.
    """
    for name, kind, value in _given(job):
        if name not in but:
            _require(kind, value, "--" + name.replace("_", "-"))


def _given(job: Settings) -> Iterator[tuple[str, Place, Any]]:
    for name, kind in job.places.items():
        value = attrgetter(name)(job)
        if value is not None:
            yield name, kind, value


def _absolute(kind: Place, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_absolute(kind, one) for one in value)
    # Weights may be called by the name they were published under.
    if kind == "weights" and not os.path.exists(value):
        return value
    return str(Location.parse(value))


def _require(kind: Place, value: Any, flag: str) -> None:
    if isinstance(value, tuple):
        for one in value:
            _require(kind, one, flag)
    elif kind == "file or folder" or (kind == "images" and is_archive(value)):
        Location.parse(value).required(flag)
    elif kind == "images":
        # Asks what kind of place it is, and lists nothing yet.
        Collection(value)


def _with(group: _Group, name: str, value: Any) -> _Group:
    first, dot, rest = name.partition(".")
    if dot:
        value = _with(getattr(group, first), rest, value)
    return group.model_copy(update={first: value})
