"""Exactly-once labelling: which images are still to do, and how finished blocks become the table.

A run cuts its frozen list of inputs into numbered blocks. A block's rows are written whole, under
the block's number: done twice is the same file once, killed half-way is no file at all. What is
left to do is therefore a listing of names, and a resumed run repeats the very batches an
uninterrupted one would have had, so its boxes are the same bit for bit. Layout:

    OUTPUT/_MANIFEST.json                        the commit point, written last
    OUTPUT/labels-<run>-<pass>-00000.parquet     the finished table
    OUTPUT/_run/run.json                         whose run this is: run_id and configuration
    OUTPUT/_run/<run_id>/pass-0000/inputs.parquet          a row group per block
    OUTPUT/_run/<run_id>/pass-0000/blocks/block-00000007.parquet

``LabelPass`` is one pass over a frozen list of inputs: what is listed, done, left to do. It is
cheap to pickle, so that the tasks of a cluster can hold it. ``LabelRun`` is all passes and the
commit: a later pass (``--retry-failed``) labels some images again, and its rows supersede the
earlier ones. The block's folder carries the run's id, so that a straggler of a killed run cannot
reach a new one.
"""

import json
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.lake import INPUT_SCHEMA
from pipeline.data.pseudo_labels import (
    MANIFEST_NAME,
    SCHEMA,
    Manifest,
    TableFile,
    config_hash,
    describe_file,
    encode_table,
    iterate_labels,
    read_manifest,
    write_manifest,
)
from pipeline.errors import ConfigError, StorageError, one_line
from pipeline.storage import Location


@dataclass(frozen=True)
class LabelPass:
    """A pass over images; ``folder`` is its own, ``config`` goes into every block's metadata."""

    folder: Location
    config: dict[str, Any]
    schema: pa.Schema = SCHEMA
    """Of the blocks' rows, whose ``image_id`` are those of the inputs."""

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
        """What ``note_listing`` kept; None where this pass was not listed from a collection."""
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
        self._block(block).write_bytes(encode_table(rows, self.config, self.schema))

    def rows_of(self, block: int, inputs: pa.Table) -> pa.Table:
        """A finished block's rows, proved to be exactly its inputs.

        Raises:
            StorageError: it is damaged or belongs to other inputs; it has been thrown away.
        """
        place = self._block(block)
        try:
            rows = pq.read_table(pa.BufferReader(place.read_bytes()))
            if rows["image_id"].to_pylist() == inputs["image_id"].to_pylist():
                return with_all_columns(rows, self.schema)
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


ROWS_PER_FILE = 200_000

HEAD_CONFIG, HEAD_WEIGHTS = "config.json", "head.safetensors"
"""What fit_head.py makes of a pass instead of a table: the first is its commit point."""

HEAD_FOLDER = "_head"
"""Of an output: the head that its boxes were found with, where it was fitted for them."""

CALIBRATION_FOLDER = "_calibration"
"""Of an output: what its scores are worth, where they were made probabilities."""

# What may lie in an output beside its results: the lease, the run's blocks, the head, what is said
# of scores, and of older versions what MLflow had not got.
_OURS = ("_lease.json", "_run", HEAD_FOLDER, CALIBRATION_FOLDER, "_tracking")

# What a run makes, the commit points first, so that no reader is misled while it is deleted.
_RESULTS = (MANIFEST_NAME, HEAD_CONFIG, HEAD_WEIGHTS, "report.md", "boxes.png")


@dataclass(frozen=True)
class LabelRun:
    """The labelling run that owns an output folder."""

    output: Location
    run_id: str
    config: dict[str, Any]

    @property
    def _folder(self) -> Location:
        return self.output.child("_run").child(self.run_id)

    @property
    def is_finished(self) -> bool:
        """Whether the table is committed."""
        return self.output.child(MANIFEST_NAME).kind() == "file"

    def open_pass(self, number: int) -> LabelPass:
        """The pass with this number; 0 is the first."""
        return LabelPass(self._folder.child(f"pass-{number:04d}"), self.config)

    def passes_committed(self) -> int:
        """How many passes the table consists of; the next one has this number."""
        return read_manifest(self.output).passes if self.is_finished else 0

    def manifest(self) -> Manifest:
        """What the committed table consists of."""
        return read_manifest(self.output)

    def abandon(self) -> None:
        """Forget a run that has nothing to label, so that the output is free again."""
        _delete_run(self.output)

    def failed_inputs(self) -> Iterator[pa.Table]:
        """The committed rows that failed (status ``error_*``), as inputs of a further pass."""
        for table in iterate_labels(self.output, ["image_id", "uri", "status"]):
            failed = table.filter(pc.starts_with(table["status"], "error_"))
            if failed.num_rows:
                yield failed.select(["image_id", "uri"]).cast(INPUT_SCHEMA)

    def commit(
        self,
        number: int,
        *,
        weights_sha256: str,
        job: dict[str, Any],
        versions: dict[str, str],
        tracking: dict[str, str],
    ) -> Manifest:
        """Make the finished pass part of the table: files first, the manifest last.

        Until the manifest is replaced a reader sees the table as it was; what the new one does not
        list is deleted afterwards.
        """
        return self._commit(
            self._merged_rows(number),
            number,
            weights_sha256=weights_sha256,
            collection=self._collection(number),
            job=job,
            versions=versions,
            tracking=tracking,
        )

    def commit_rows(
        self,
        tables: Iterator[pa.Table],
        *,
        weights_sha256: str,
        job: dict[str, Any],
        versions: dict[str, str],
        collection: dict[str, Any],
    ) -> Manifest:
        """Make these rows the table, without a pass: for a job that makes one table of another."""
        return self._commit(
            tables,
            0,
            weights_sha256=weights_sha256,
            collection=collection,
            job=job,
            versions=versions,
        )

    def _commit(self, tables: Iterator[pa.Table], number: int, **fields: Any) -> Manifest:
        """Write the table's files, then its manifest, whose other ``fields`` these are."""
        files, counts = self._write_table(tables, number)
        manifest = Manifest(
            run_id=self.run_id,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=files,
            rows=sum(file.rows for file in files),
            counts=dict(sorted(counts.items())),
            config=self.config,
            config_hash=config_hash(self.config),
            passes=number + 1,
            **fields,
        )
        write_manifest(self.output, manifest)
        self.tidy()
        return manifest

    def _collection(self, number: int) -> dict[str, Any]:
        listing = self.open_pass(number).listing()
        if listing is not None:
            return listing
        return self.manifest().collection if self.is_finished else {}

    def tidy(self) -> None:
        """Delete what the committed table does not need: blocks, and files of earlier manifests."""
        listed = {file.name for file in read_manifest(self.output).files}
        for place in self.output.files():
            if _is_table_file(place.name) and place.name not in listed:
                place.delete()
        self._folder.delete()

    def _write_table(
        self, tables: Iterator[pa.Table], number: int
    ) -> tuple[list[TableFile], Counter[str]]:
        files: list[TableFile] = []
        counts: Counter[str] = Counter()
        for table in _in_files(tables):
            data = encode_table(table, self.config)
            name = f"labels-{self.run_id}-{number:04d}-{len(files):05d}.parquet"
            self.output.child(name).write_bytes(data)
            files.append(describe_file(name, table.num_rows, data))
            counts.update(table["status"].to_pylist())
        return files, counts

    def _merged_rows(self, number: int) -> Iterator[pa.Table]:
        """The table's rows with those of pass ``number`` in the place of their elders."""
        newest = self.open_pass(number).all_rows()
        if number == 0:
            yield from newest
            return
        # A later pass holds failed images only: few enough for memory.
        again = pa.concat_tables(list(newest))
        for table in iterate_labels(self.output):
            superseded = pc.is_in(table["image_id"], value_set=again["image_id"].combine_chunks())
            yield with_all_columns(table.filter(pc.invert(superseded)))
        yield again


def with_all_columns(table: pa.Table, schema: pa.Schema = SCHEMA) -> pa.Table:
    """The rows of a table that may be older than a column of ``schema``; what it lacks is null."""
    missing = pa.schema([field for field in schema if field.name not in table.column_names])
    for field in missing:
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(schema.names).cast(schema)


def _in_files(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables joined to ``ROWS_PER_FILE`` rows each, sorted by image_id within a file."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table.replace_schema_metadata(None))
        if sum(part.num_rows for part in waiting) >= ROWS_PER_FILE:
            yield pa.concat_tables(waiting).sort_by("image_id")
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).sort_by("image_id")


def open_run(
    output: Location, config: dict[str, Any], *, resume: bool, overwrite: bool
) -> LabelRun:
    """The run to work on: a new one, or the one that is there; the caller holds the lease.

    Raises:
        StorageError: the output holds a run and neither flag was given, or files of others.
        ConfigError: the run there was made with another configuration.
    """
    place = output.child("_run").child("run.json")
    is_ours = place.kind() == "file"
    if is_ours and resume:
        return _resume(output, json.loads(place.read_bytes()), config)
    require_free(output, overwrite=overwrite)
    _delete_run(output)
    run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:6]
    place.write_bytes(json.dumps({"run_id": run_id, "config": config}, indent=2).encode())
    return LabelRun(output, run_id, config)


def require_free(output: Location, *, overwrite: bool, resumable: bool = True) -> None:
    """Raise StorageError where a new run must not begin; nothing is deleted here.

    Args:
        output: Where the table is to be.
        overwrite: Whether an earlier run there may be replaced.
        resumable: Whether the job could go on with one; its complaint says so.
    """
    is_ours = output.child("_run").child("run.json").kind() == "file"
    if is_ours and not overwrite:
        raise StorageError(_taken(output, resumable))
    _refuse_strangers(output, is_ours)


def _resume(output: Location, found: dict[str, Any], config: dict[str, Any]) -> LabelRun:
    before = found["config"]
    names = sorted(before.keys() | config.keys())
    differing = [
        f"{name}: {before.get(name)!r} there, {config.get(name)!r} now"
        for name in names
        if before.get(name) != config.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{output} was begun with another configuration; give the same one, another --output, "
            "or --overwrite. Differing:\n  " + "\n  ".join(differing)
        )
    return LabelRun(output, found["run_id"], before)


def _taken(output: Location, resumable: bool) -> str:
    if not resumable:
        return f"{output} already holds a table: choose another --output, or --overwrite it"
    if output.child(MANIFEST_NAME).kind() == "file":
        return (
            f"{output} already holds a finished table: choose another --output, "
            "--resume --retry-failed to label its failed rows again, or --overwrite to replace it"
        )
    if output.child(HEAD_CONFIG).kind() == "file":
        return (
            f"{output} already holds a fitted head: --resume goes on with it, --overwrite replaces "
            "it, or choose another --output"
        )
    return f"{output} holds an unfinished run: add --resume to finish it, or --overwrite"


def _delete_run(output: Location) -> None:
    """Remove what an earlier run wrote and no more; the manifest first, so no reader is misled."""
    for name in _RESULTS:
        output.child(name).delete()
    for place in output.files():
        if _is_table_file(place.name):
            place.delete()
    output.child(CALIBRATION_FOLDER).delete()
    output.child("_run").delete()


def _is_table_file(name: str) -> bool:
    return name.startswith("labels-") and name.endswith(".parquet")


def _refuse_strangers(output: Location, is_ours: bool) -> None:
    """Nothing is touched in a folder that holds anything else; a table only beside its run."""
    strangers = [
        name
        for name in output.names()
        if name not in _OURS and not (is_ours and (name in _RESULTS or _is_table_file(name)))
    ]
    if strangers:
        raise StorageError(
            f"{output} holds {len(strangers)} entries that are not of a labelling run, e.g. "
            f"{strangers[0]}: choose an empty folder (nothing was deleted)"
        )
