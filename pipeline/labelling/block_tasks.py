"""What is done to a block of images before and after a labeller has seen it, and with what plan.

Apart from work_through.py and the cluster's label_blocks.py because this file must not import
torch: every worker process that runs a task imports its file, and torch would cost it seconds and
half a gigabyte.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config import ComputeConfig, ImagesConfig
from pipeline.data.pixels import load_pixels
from pipeline.errors import StorageError
from pipeline.labelling.rows import Provenance
from pipeline.labelling.run import LabelPass

Labeller = Callable[[pa.Table], pa.Table]
"""Rows of ``PIXELS_SCHEMA`` in, as many rows of the pass's schema out."""

Recipe = Callable[[Provenance, str], Labeller]
"""What rows say of their making, and a device (``cpu``, ``cuda``), give a labeller. It is pickled
once, fetched once a node, and called where its device is."""


@dataclass(frozen=True)
class LabelPlan:
    """All that those who work on a pass need to know."""

    label_pass: LabelPass
    recipe: Recipe
    provenance: Provenance
    decode: ImagesConfig
    compute: ComputeConfig


RECEIPT = pa.schema(
    [
        ("block", pa.int64()),
        ("rows", pa.int64()),
        ("outcomes", pa.string()),
        ("fault", pa.string()),
    ]
)


@dataclass(frozen=True)
class Receipt:
    """A block is on disk: its rows by status, with an example URI each."""

    block: int
    rows: int
    counts: dict[str, int]
    examples: dict[str, str]


class LoadBlock:
    """Task: the number of a block -> its inputs, read and decoded."""

    def __init__(self, label_pass: LabelPass, decode: ImagesConfig) -> None:
        self.label_pass, self.decode = label_pass, decode

    def __call__(self, numbers: pa.Table) -> pa.Table:
        number = numbers["item"][0].as_py()
        pixels = load_pixels(self.label_pass.inputs_of(number), **dict(self.decode))
        return pixels.append_column("block", pa.repeat(pa.scalar(number), pixels.num_rows))


class CommitBlock:
    """Task: a block's rows -> Parquet; the receipt is all that goes on.

    A fault of the storage travels as a receipt: an exception would reach the driver as a text.
    """

    def __init__(self, label_pass: LabelPass) -> None:
        self.label_pass = label_pass

    def __call__(self, rows: pa.Table) -> pa.Table:
        number = rows["block"][0].as_py()
        try:
            self.label_pass.commit_block(number, rows.drop_columns("block"))
        except StorageError as fault:
            lost = {"block": [number], "rows": [0], "outcomes": ["{}"], "fault": [str(fault)]}
            return pa.table(lost, schema=RECEIPT)
        outcomes: dict[str, list[Any]] = {}
        for status, uri in zip(rows["status"].to_pylist(), rows["uri"].to_pylist(), strict=True):
            outcomes.setdefault(status, [0, uri])[0] += 1
        told = {"block": [number], "rows": [rows.num_rows], "outcomes": [json.dumps(outcomes)]}
        return pa.table({**told, "fault": [None]}, schema=RECEIPT)


def receipts_of(batch: pa.Table) -> Iterator[Receipt]:
    """The receipts in a table that ``CommitBlock`` returned.

    Raises:
        StorageError: a block could not be put on disk.
    """
    for row in batch.to_pylist():
        if row["fault"] is not None:
            raise StorageError(f"{row['fault']}. Finished blocks are kept: go on with --resume")
        outcomes = json.loads(row["outcomes"])
        yield Receipt(
            block=row["block"],
            rows=row["rows"],
            counts={status: number for status, (number, _) in outcomes.items()},
            examples={status: uri for status, (_, uri) in outcomes.items()},
        )
