"""One sweep over a frozen list of inputs, in numbered blocks: what is listed, done, left to do.

Cheap to pickle, so that the tasks of a cluster can hold it. How sweeps become a table is told in
label_run.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.lake import INPUT_SCHEMA
from pipeline.data.pseudo_labels import encode_table
from pipeline.errors import StorageError
from pipeline.storage import Location, one_line


@dataclass(frozen=True)
class LabelPass:
    """A sweep; ``folder`` is its own, ``config`` goes into every block's metadata."""

    folder: Location
    config: dict[str, Any]

    @property
    def _inputs(self) -> Location:
        return self.folder.child("inputs.parquet")

    def _block(self, index: int) -> Location:
        return self.folder.child("blocks").child(f"block-{index:08d}.parquet")

    @property
    def is_listed(self) -> bool:
        """Whether the list of inputs is complete and frozen."""
        return self._inputs.kind() == "file"

    def freeze_inputs(self, chunks: Iterator[pa.Table], block_size: int) -> None:
        """Write down what is to be labelled, cut into blocks of ``block_size`` images."""
        with self._inputs.publishing() as stream, pq.ParquetWriter(stream, INPUT_SCHEMA) as writer:
            waiting = INPUT_SCHEMA.empty_table()
            for chunk in chunks:
                waiting = pa.concat_tables([waiting, chunk.select(INPUT_SCHEMA.names)])
                whole = waiting.num_rows // block_size * block_size
                if whole:
                    writer.write_table(waiting.slice(0, whole), row_group_size=block_size)
                waiting = waiting.slice(whole).combine_chunks()
            if waiting.num_rows:
                writer.write_table(waiting, row_group_size=block_size)

    def note_listing(self, listing: dict[str, Any]) -> None:
        """Keep what the listing met besides images; the manifest will show it."""
        self.folder.child("listing.json").write_bytes(json.dumps(listing).encode())

    def listing(self) -> dict[str, Any] | None:
        """What ``note_listing`` kept; None where this sweep was not listed from a collection."""
        place = self.folder.child("listing.json")
        return json.loads(place.read_bytes()) if place.kind() == "file" else None

    def sizes(self) -> list[int]:
        """The number of images in each block."""
        with self._inputs.open() as stream:
            footer = pq.ParquetFile(stream).metadata
            return [footer.row_group(block).num_rows for block in range(footer.num_row_groups)]

    def inputs_of(self, block: int) -> pa.Table:
        """``image_id`` and ``uri`` of the block's images."""
        with self._inputs.open() as stream:
            return pq.ParquetFile(stream).read_row_group(block)

    def finished_blocks(self) -> set[int]:
        """The blocks whose rows are on disk."""
        names = [place.name for place in self.folder.child("blocks").files()]
        return {int(name.removeprefix("block-").removesuffix(".parquet")) for name in names}

    def commit_block(self, block: int, rows: pa.Table) -> None:
        """Put a finished block on disk; a second time changes nothing a reader could tell."""
        self._block(block).write_bytes(encode_table(rows, self.config))

    def rows_of(self, block: int, inputs: pa.Table) -> pa.Table:
        """A finished block's rows, proved to be exactly its inputs.

        Raises:
            StorageError: it is damaged or belongs to other inputs; it has been thrown away.
        """
        place = self._block(block)
        try:
            rows = pq.read_table(pa.BufferReader(place.read_bytes()))
            if rows["image_id"].to_pylist() == inputs["image_id"].to_pylist():
                return rows
            reason = "its rows are not those of its inputs"
        except (OSError, pa.ArrowInvalid) as fault:
            reason = one_line(fault)
        place.delete()
        raise StorageError(
            f"{place} was damaged ({reason}) and is deleted: run again with --resume"
        )

    def all_rows(self) -> Iterator[pa.Table]:
        """The rows of every block, in order."""
        with self._inputs.open() as stream:
            file = pq.ParquetFile(stream)
            for block in range(file.num_row_groups):
                yield self.rows_of(block, file.read_row_group(block))
