"""The settings of a job that name files and folders: made absolute, and looked for in time.

Each job lists what it reads in its class's ``places`` (config/); for one more, a line there. For
another kind of place: its name in ``Place`` of settings.py, and how to look for it in ``_require``.
"""

import os
from collections.abc import Container, Iterator
from operator import attrgetter
from typing import Any, TypeVar

from pipeline.config.settings import Place, Settings
from pipeline.config.training import TrainingJob
from pipeline.data.labelled_archives import is_archive
from pipeline.data.lake import Collection
from pipeline.storage import Location
from pipeline.tracking import OFF, absolute_uri

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
    return {
        name: tuple(_absolute(kind, one) for one in value)
        if isinstance(value, tuple)
        else _absolute(kind, value)
        for name, kind, value in _given(job)
    }


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
        if name in but:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            _require(kind, one, "--" + name.replace("_", "-"))


def absolute_tracking_uri(uri: str | None) -> str | None:
    """The URI as workers in other folders understand it."""
    return uri if uri == OFF else absolute_uri(uri)


def _given(job: Settings) -> Iterator[tuple[str, Place, Any]]:
    for name, kind in job.places.items():
        value = attrgetter(name)(job)
        if value is not None:
            yield name, kind, value


def _absolute(kind: Place, text: str) -> str:
    # Weights may be called by the name they were published under.
    if kind == "weights" and not os.path.exists(text):
        return text
    return str(Location.parse(text))


def _require(kind: Place, text: str, flag: str) -> None:
    if kind == "file or folder" or (kind == "images" and is_archive(text)):
        Location.parse(text).required(flag)
    elif kind == "images":
        # Reads the folder's kind, and lists nothing yet.
        Collection(text)


def _with(group: _Group, name: str, value: Any) -> _Group:
    first, dot, rest = name.partition(".")
    if dot:
        value = _with(getattr(group, first), rest, value)
    return group.model_copy(update={first: value})
