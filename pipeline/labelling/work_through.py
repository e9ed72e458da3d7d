"""The blocks of a pass that wait are worked through, on whatever does the work, and told of.

``label_here`` does it in this process, for a notebook or a machine without Ray; on Ray it is
``label_blocks`` of cluster/label_blocks.py. Both do the same to a block, so its rows are the same.
"""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import torch

from pipeline.labelling.block_tasks import CommitBlock, LabelPlan, LoadBlock, Receipt, receipts_of
from pipeline.lease import Lease
from pipeline.progress import ProgressReporter
from pipeline.tracking.tracker import Tracker

Spread = Callable[[LabelPlan, list[int]], Iterator[Receipt]]
"""Does the blocks of these numbers; a receipt for each, as they get done."""

# Metrics go to MLflow at this pace: a curve people can read, not a point per block.
_METRIC_SECONDS = 10.0


def work_through(
    plan: LabelPlan,
    spread: Spread,
    *,
    verb: str,
    progress_seconds: float,
    tracker: Tracker,
    lease: Lease,
) -> float:
    """Do the blocks of the plan's pass that are not on disk yet.

    Returns:
        Images per second of this part; 0 where nothing was left to do.

    Raises:
        StorageError: a block could not be put on disk, or the output is another job's by now.
        ClusterError: the work died. Finished blocks stay.
    """
    sizes = plan.label_pass.sizes()
    finished = plan.label_pass.finished_blocks()
    waiting = [block for block in range(len(sizes)) if block not in finished]
    done = sum(sizes[block] for block in finished)
    if finished:
        sys.stdout.write(f"resuming: {done:,} of {sum(sizes):,} images are on disk\n")
        sys.stdout.flush()
    if not waiting:
        return 0.0
    with ProgressReporter(verb, sum(sizes), done=done, seconds=progress_seconds) as progress:
        for receipt in _at_a_pace(spread(plan, waiting), progress, tracker):
            lease.check()
            progress.advance(receipt.rows, _outcomes(receipt))
        return progress.items_per_second


def label_here(plan: LabelPlan, blocks: list[int]) -> Iterator[Receipt]:
    """Do the blocks in this process, one after another, while the next one is read.

    The network has the threads that an actor would have: with others its last bits are others.

    Raises:
        StorageError: a block could not be put on disk.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(plan.compute.cpus_per_actor)
    labeller = plan.recipe(plan.provenance, "cuda" if torch.cuda.is_available() else "cpu")
    load, commit = LoadBlock(plan.label_pass, plan.decode), CommitBlock(plan.label_pass)
    try:
        with ThreadPoolExecutor(1) as reader:
            numbers = [pa.table({"item": [block]}) for block in blocks]
            # Decoded pixels are large: one block ahead, not all.
            coming = reader.submit(load, numbers[0])
            for index in range(len(numbers)):
                pixels = coming.result()
                if index + 1 < len(numbers):
                    coming = reader.submit(load, numbers[index + 1])
                rows = labeller(pixels.drop_columns("block"))
                yield from receipts_of(commit(rows.append_column("block", pixels["block"])))
    finally:
        torch.set_num_threads(threads_before)


def _outcomes(receipt: Receipt) -> dict[str, int]:
    bad = sum(n for status, n in receipt.counts.items() if status.startswith("error_"))
    return {"bad": bad, "noobj": receipt.counts.get("no_object", 0)}


def _at_a_pace(
    receipts: Iterator[Receipt], progress: ProgressReporter, tracker: Tracker
) -> Iterator[Receipt]:
    """The receipts; every few seconds their speed goes to the tracker."""
    told = time.monotonic()
    for receipt in receipts:
        yield receipt
        if time.monotonic() - told >= _METRIC_SECONDS:
            told = time.monotonic()
            speed = {"images_per_second": progress.items_per_second, **progress.counts}
            tracker.log_metrics(speed, step=progress.done)
