"""One run: a job with its settings, what it costs, and the file that says it is done."""

from dataclasses import dataclass, replace

from pipeline.reproduction.cells import Values
from pipeline.storage import Location


@dataclass(frozen=True)
class Cost:
    """Of one run.

    Attributes:
        seconds: on one GPU, or on one core at the small scale.
        disk_bytes: that stay.
    """

    seconds: float
    disk_bytes: float


@dataclass(frozen=True)
class Run:
    """One job to be done.

    Attributes:
        name: of its settings and its log; equal runs have equal names.
        job: of which script, ``train_classifier``.
        values: its settings.
        result: the file that is there when it is done.
        cost: of all of it.
        after: names of the runs it needs the results of.
    """

    name: str
    job: str
    values: Values
    result: Location
    cost: Cost
    after: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        return self.result.kind() == "file"

    @property
    def folder(self) -> Location:
        """Where its results lie."""
        return replace(self.result, path=self.result.path.rpartition("/")[0])
