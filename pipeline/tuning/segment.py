"""One generation of a member of a population: a training run that begins with another's
checkpoints, and ends before its last epoch.

Its schedules are those of the whole run, so segments that follow each other without a change of
their settings are the run that was never cut, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.runs.folder import RunFolder
from pipeline.runs.life import Outside
from pipeline.storage import Location


@dataclass(frozen=True)
class SegmentTask:
    """Where a segment's run lies, and from where to where it trains; plain values.

    Attributes:
        output: folder of its run's folder.
        after: epochs that were trained before it.
        until: the last epoch that it trains, from 1.
        parent: folder of the run that it goes on from; None starts anew.
    """

    output: str
    after: int
    until: int
    parent: str | None


class _SegmentIsOver(Exception):
    """Raised through the loop once the last epoch's checkpoint is written."""


def train_segment(
    segment: SegmentTask,
    folder: RunFolder,
    num_epochs: int,
    train: Callable[[Outside], dict[str, Any]],
    on_epoch: Callable[[], None],
) -> dict[str, Any] | None:
    """Train to the segment's end, from where its own checkpoints end or its parent's.

    Args:
        segment: which epochs.
        folder: the segment's, held.
        num_epochs: of the whole run.
        train: the run, told whom it reports to.
        on_epoch: called after each epoch that is not the last one of a segment.

    Returns:
        The summary of a whole run; None of a segment that others come after.

    Raises:
        StorageError: the parent's checkpoints are gone.
        PatchseedError: as of the run.
    """
    if segment.parent is not None:
        folder.checkpoints.begin_with(RunFolder(Location.parse(segment.parent)).checkpoints)
    latest = folder.checkpoints.latest()
    done = 0 if latest is None else latest.epoch + 1
    # It holds all weights once more.
    del latest
    ends_early = segment.until < num_epochs
    if ends_early and done >= segment.until:
        # It was killed between its last checkpoint and its record.
        return None

    def report(numbers: dict[str, float]) -> None:
        nonlocal done
        done += 1
        if ends_early and done >= segment.until:
            raise _SegmentIsOver
        on_epoch()

    try:
        return train(Outside(tell=lambda line: None, report=report))
    except _SegmentIsOver:
        return None


def forget_checkpoints(output: Location) -> None:
    """Delete the checkpoints of the runs in a folder; settings and histories stay."""
    for name in output.names():
        output.child(name).child("checkpoints").delete()
