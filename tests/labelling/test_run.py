"""Exactly once: a table holds every input's row, however the run that made it came to its end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.data.lake import INPUT_SCHEMA
from pipeline.data.pseudo_labels import MANIFEST_NAME, SCHEMA, Manifest, read_labels
from pipeline.errors import ConfigError, StorageError
from pipeline.labelling.run import LabelPass, LabelRun, open_run
from pipeline.storage import Location
from tests.tables import label_row

CONFIG = {"localization.rule": "solost", "images": "photos"}


def inputs(count: int) -> pa.Table:
    names = [f"{number:04d}" for number in range(count)]
    return pa.table({"image_id": names, "uri": [f"/photos/{n}.jpg" for n in names]}, INPUT_SCHEMA)


def rows_for(some: pa.Table, status: str = "ok") -> pa.Table:
    rows = [label_row(**image, status=status) for image in some.to_pylist()]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def start(output: Location, **flags: Any) -> LabelRun:
    return open_run(output, CONFIG, **{"resume": False, "overwrite": False, **flags})


def finish(run: LabelRun, number: int = 0) -> Manifest:
    return run.commit(number, weights_sha256="w", job={}, versions={}, tracking={})


def label_all(label_pass: LabelPass, status: str = "ok") -> None:
    for block in range(len(label_pass.sizes())):
        if block not in label_pass.finished_blocks():
            label_pass.commit_block(block, rows_for(label_pass.inputs_of(block), status))


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return Location.parse(str(tmp_path / "labels"))


@pytest.fixture
def run(output: Location) -> LabelRun:
    return start(output)


@pytest.fixture
def label_pass(run: LabelRun) -> LabelPass:
    label_pass = run.open_pass(0)
    label_pass.freeze_inputs(iter([inputs(10)]), block_size=4)
    return label_pass


def chunked(table: pa.Table, size: int) -> Iterator[pa.Table]:
    yield from (table.slice(first, size) for first in range(0, table.num_rows, size))


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 100])
def test_blocks_have_the_asked_size_however_the_listing_arrives(run: LabelRun, chunk: int) -> None:
    label_pass = run.open_pass(0)
    label_pass.freeze_inputs(chunked(inputs(10), chunk), block_size=4)
    assert label_pass.sizes() == [4, 4, 2]
    listed = pa.concat_tables([label_pass.inputs_of(block) for block in range(3)])
    assert listed.to_pylist() == inputs(10).to_pylist()


def test_a_listing_that_dies_leaves_no_list(run: LabelRun) -> None:
    def dying() -> Iterator[pa.Table]:
        yield inputs(10)
        raise KeyboardInterrupt

    label_pass = run.open_pass(0)
    with pytest.raises(KeyboardInterrupt):
        label_pass.freeze_inputs(dying(), block_size=4)
    assert not label_pass.is_listed


def test_a_block_committed_twice_is_there_once(run: LabelRun, label_pass: LabelPass) -> None:
    label_all(label_pass)
    label_pass.commit_block(1, rows_for(label_pass.inputs_of(1)))
    manifest = finish(run)
    assert manifest.rows == 10
    assert manifest.counts == {"ok": 10}


def test_the_table_holds_exactly_the_inputs_sorted(
    run: LabelRun, label_pass: LabelPass, output: Location
) -> None:
    label_all(label_pass)
    finish(run)
    assert read_labels(output)["image_id"].to_pylist() == inputs(10)["image_id"].to_pylist()
    assert output.child("_run").names() == ["run.json"]


def test_a_missing_block_is_not_committed_over(run: LabelRun, label_pass: LabelPass) -> None:
    label_pass.commit_block(0, rows_for(label_pass.inputs_of(0)))
    with pytest.raises(StorageError, match="--resume"):
        finish(run)
    assert not run.is_finished


@pytest.mark.parametrize("damage", [b"", b"PAR1 and then nothing"])
def test_a_damaged_block_is_thrown_away_and_told(
    run: LabelRun, label_pass: LabelPass, damage: bytes
) -> None:
    label_all(label_pass)
    place = label_pass.folder.child("blocks").child("block-00000001.parquet")
    place.write_bytes(damage)
    with pytest.raises(StorageError, match=r"was damaged .* --resume"):
        finish(run)
    assert label_pass.finished_blocks() == {0, 2}
    label_all(label_pass)
    assert finish(run).rows == 10


def test_a_block_with_other_images_is_thrown_away(run: LabelRun, label_pass: LabelPass) -> None:
    label_all(label_pass)
    label_pass.commit_block(1, rows_for(label_pass.inputs_of(0)))
    with pytest.raises(StorageError, match="not those of its inputs"):
        finish(run)


def test_resume_goes_on_with_the_blocks_that_are_left(
    label_pass: LabelPass, output: Location
) -> None:
    label_pass.commit_block(2, rows_for(label_pass.inputs_of(2)))
    again = start(output, resume=True).open_pass(0)
    assert again.is_listed
    assert again.finished_blocks() == {2}


def test_resume_of_nothing_is_a_new_run(output: Location) -> None:
    assert not start(output, resume=True).open_pass(0).is_listed


def test_an_unfinished_run_is_refused_without_a_flag(
    label_pass: LabelPass, output: Location
) -> None:
    with pytest.raises(StorageError, match="unfinished run: add --resume"):
        start(output)


def test_a_finished_run_is_refused_without_a_flag(
    run: LabelRun, label_pass: LabelPass, output: Location
) -> None:
    label_all(label_pass)
    finish(run)
    with pytest.raises(StorageError, match="already holds a finished table"):
        start(output)


def test_another_configuration_is_refused_with_the_keys_that_differ(
    label_pass: LabelPass, output: Location
) -> None:
    other = {**CONFIG, "localization.rule": "lost"}
    with pytest.raises(ConfigError, match="rule: 'solost' there, 'lost' now") as fault:
        open_run(output, other, resume=True, overwrite=False)
    assert "images" not in str(fault.value)


def test_overwrite_starts_anew_and_removes_the_old_table(
    run: LabelRun, label_pass: LabelPass, output: Location
) -> None:
    label_all(label_pass)
    finish(run)
    anew = start(output, overwrite=True)
    assert anew.run_id != run.run_id
    assert output.names() == ["_run"]


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_files_of_others_are_refused_and_never_deleted(
    output: Location, flags: dict[str, bool]
) -> None:
    output.child("thesis.docx").write_bytes(b"years of work")
    with pytest.raises(StorageError, match=r"e\.g\. thesis\.docx"):
        start(output, **flags)
    assert output.child("thesis.docx").read_bytes() == b"years of work"


def test_overwrite_deletes_nothing_where_somebody_else_put_a_file(
    run: LabelRun, label_pass: LabelPass, output: Location
) -> None:
    label_all(label_pass)
    finish(run)
    output.child("thesis.docx").write_bytes(b"years of work")
    with pytest.raises(StorageError, match="nothing was deleted"):
        start(output, overwrite=True)
    assert read_labels(output).num_rows == 10


def test_rows_older_than_a_column_survive_a_later_pass(
    run: LabelRun, label_pass: LabelPass, output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = pa.schema([field for field in SCHEMA if field.name != "num_frames"])
    label_all(label_pass, "error_read")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.pseudo_labels.SCHEMA", older)
        patch.setattr(
            LabelPass, "rows_of", lambda self, block, some: rows_for(some).select(older.names)
        )
        finish(run)
    again = run.open_pass(1)
    again.freeze_inputs(iter([inputs(2)]), block_size=2)
    label_all(again)
    assert finish(run, number=1).rows == 10
    assert read_labels(output).schema.names == SCHEMA.names


def test_what_the_listing_met_is_kept_through_later_passs(
    run: LabelRun, label_pass: LabelPass
) -> None:
    label_pass.note_listing({"ignored_by_extension": {".txt": 3}})
    label_all(label_pass, "error_read")
    assert finish(run).collection == {"ignored_by_extension": {".txt": 3}}
    again = run.open_pass(1)
    again.freeze_inputs(run.failed_inputs(), block_size=4)
    label_all(again)
    assert finish(run, number=1).collection == {"ignored_by_extension": {".txt": 3}}


def test_an_abandoned_run_frees_the_output(run: LabelRun, output: Location) -> None:
    run.abandon()
    start(output)


def test_a_later_pass_supersedes_the_rows_it_labelled_again(
    run: LabelRun, label_pass: LabelPass, output: Location
) -> None:
    for block, status in enumerate(["ok", "error_read", "ok"]):
        label_pass.commit_block(block, rows_for(label_pass.inputs_of(block), status))
    first = finish(run)
    again = run.open_pass(run.passes_committed())
    again.freeze_inputs(run.failed_inputs(), block_size=3)
    assert again.sizes() == [3, 1]
    label_all(again)
    second = finish(run, number=1)
    assert (first.counts, second.counts) == ({"error_read": 4, "ok": 6}, {"ok": 10})
    assert read_labels(output)["image_id"].to_pylist() == inputs(10)["image_id"].to_pylist()
    assert not {file.name for file in first.files} & set(output.names())
    assert run.passes_committed() == 2


def test_a_crash_before_the_new_manifest_leaves_the_old_table_readable(
    run: LabelRun, label_pass: LabelPass, output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_all(label_pass, "error_read")
    finish(run)
    again = run.open_pass(1)
    again.freeze_inputs(run.failed_inputs(), block_size=3)
    label_all(again)

    def crash(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.labelling.run.write_manifest", crash)
        with pytest.raises(OSError, match="power cut"):
            finish(run, number=1)
    assert set(read_labels(output)["status"].to_pylist()) == {"error_read"}
    assert finish(start(output, resume=True), number=1).counts == {"ok": 10}


def test_a_crash_after_the_manifest_leaves_only_litter_that_tidy_removes(
    run: LabelRun, label_pass: LabelPass, output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_all(label_pass)
    with monkeypatch.context() as patch:
        patch.setattr(LabelRun, "tidy", lambda self: None)
        finish(run)
    output.child("labels-of-an-older-manifest.parquet").write_bytes(b"stray")
    assert read_labels(output).num_rows == 10
    run.tidy()
    names = [file.name for file in run.manifest().files]
    assert output.names() == sorted([MANIFEST_NAME, "_run", *names])
    assert output.child("_run").names() == ["run.json"]


def test_tables_are_split_into_files_of_bounded_size(
    run: LabelRun, label_pass: LabelPass, output: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.labelling.run.ROWS_PER_FILE", 5)
    label_all(label_pass)
    manifest = finish(run)
    assert [file.rows for file in manifest.files] == [8, 2]
    assert read_labels(output).num_rows == 10


def test_the_run_says_how_it_is_configured(run: LabelRun, output: Location) -> None:
    said = json.loads(output.child("_run").child("run.json").read_bytes())
    assert said == {"run_id": run.run_id, "config": CONFIG}
