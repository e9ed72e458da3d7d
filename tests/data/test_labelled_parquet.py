"""Labelled images in Parquet: any number of files, row groups, and forms of image and label."""

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import labelled_parquet
from pipeline.data.labelled_images import LabelledImages
from pipeline.data.labelled_parquet import read_parquet
from pipeline.errors import DataError
from pipeline.storage import Location
from tests.data.labelled import flat, greys, names
from tests.data.pictures import encode, noise

BYTES = [encode(flat(value), "PNG") for value in range(20)]


def write(path: Path, labels: Any, *, first: int = 0, **form: Any) -> Path:
    """Rows with greys first, first + 1, ...; five to a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures: list[Any] = BYTES[first : first + len(labels)]
    if form.get("struct"):
        pictures = [{"bytes": data, "path": "x.png"} for data in pictures]
    table = pa.table({form.get("image", "image"): pictures, form.get("label", "label"): labels})
    if "names" in form:
        features = {"label": {"names": form["names"], "_type": "ClassLabel"}}
        note = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": note})
    pq.write_table(table, path, row_group_size=5)
    return path


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [index % 3 for index in range(17)])
    parts = read_parquet(str(path))
    order = [16, 0, 5, 4, 9, 10, 15, 1]
    read = [parts.train.image(index).getpixel((0, 0)) for index in order]
    assert read == [(index, index, index) for index in order]
    assert parts.train.targets.tolist() == [index % 3 for index in range(17)]
    assert parts.classes == ("0", "1", "2")
    assert parts.train.name(16) == "t.parquet#16"
    assert parts.test is parts.validation is None


@pytest.mark.parametrize(
    "layout",
    [
        {"train": ["train-00000-of-00002", "train-00001-of-00002"], "test": "test-00000-of-00001"},
        {"train": ["data/train_a", "data/train_b"], "test": "data/test"},
        {"train": ["train/0", "train/1"], "test": "test/0"},
    ],
)
def test_splits_are_known_by_file_or_folder(tmp_path: Path, layout: dict[str, Any]) -> None:
    write(tmp_path / f"{layout['train'][0]}.parquet", ["b", "a", "b", "a", "a", "b"])
    write(tmp_path / f"{layout['train'][1]}.parquet", ["c", "a"], first=6)
    write(tmp_path / f"{layout['test']}.parquet", ["c", "b"], first=10)
    parts = read_parquet(str(tmp_path))
    assert parts.classes == ("a", "b", "c")
    assert greys(parts.train) == list(range(8))
    assert parts.train.targets.tolist() == [1, 0, 1, 0, 0, 1, 2, 0]
    assert parts.test is not None
    assert (greys(parts.test), parts.test.targets.tolist()) == ([10, 11], [2, 1])
    assert names(parts.train)[6:] == [f"{layout['train'][1]}.parquet#{row}" for row in (0, 1)]


def test_folder_of_tables_without_a_split_is_all_training_images(tmp_path: Path) -> None:
    write(tmp_path / "trainee.parquet", [0, 1])
    write(tmp_path / "valley.parquet", [1, 0], first=2)
    assert greys(read_parquet(str(tmp_path)).train) == [0, 1, 2, 3]


@pytest.mark.parametrize("form", [{"struct": True}, {"image": "img"}, {"label": "fine_label"}])
def test_columns_of_hugging_face_are_known(tmp_path: Path, form: dict[str, Any]) -> None:
    parts = read_parquet(str(write(tmp_path / "t.parquet", [0, 1, 1], **form)))
    assert (greys(parts.train), parts.train.targets.tolist()) == ([0, 1, 2], [0, 1, 1])


def test_names_of_classes_come_from_the_note(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [2, 0, 2], names=["cat", "dog", "eel"])
    parts = read_parquet(str(path))
    assert parts.classes == ("cat", "dog", "eel")
    assert parts.train.targets.tolist() == [2, 0, 2]


def test_numbers_with_gaps_become_labels_without(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [7, 3, 100])
    write(tmp_path / "val.parquet", [100, 3], first=3)
    parts = read_parquet(str(tmp_path))
    assert parts.classes == ("3", "7", "100")
    assert parts.train.targets.tolist() == [1, 0, 2]
    assert parts.validation is not None
    assert parts.validation.targets.tolist() == [2, 0]


def test_dictionary_columns_are_strings(tmp_path: Path) -> None:
    labels = pa.array(["x", "a", "x"]).dictionary_encode()
    parts = read_parquet(str(write(tmp_path / "t.parquet", labels)))
    assert (parts.classes, parts.train.targets.tolist()) == (("a", "x"), [1, 0, 1])


def read_all(images: LabelledImages, sink: Any) -> None:
    sink.put([greys(images) for _ in range(5)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_read_at_the_same_time(tmp_path: Path, method: str) -> None:
    images = read_parquet(str(write(tmp_path / "t.parquet", [index % 2 for index in range(20)])))
    assert len(pickle.dumps(images.train)) < 10_000
    images.train.image(0)
    context: Any = multiprocessing.get_context(method)
    sink = context.Queue()
    workers = [context.Process(target=read_all, args=(images.train, sink)) for _ in range(2)]
    for worker in workers:
        worker.start()
    read = [sink.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert read == [[list(range(20))] * 5] * 2


def test_no_more_is_kept_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = [encode(noise(), "PNG")] * 20
    pq.write_table(
        pa.table({"image": heavy, "label": list(range(20))}), tmp_path / "t", row_group_size=5
    )
    images = read_parquet(str(tmp_path / "t")).train
    assert isinstance(images, labelled_parquet.ParquetImages)
    monkeypatch.setattr(labelled_parquet, "CACHE_BYTES", 12 * len(heavy[0]))
    seen = []
    for index in range(20):
        images.image(index)
        seen.append(len(images._kept))
    assert max(seen) == 2
    assert len(pickle.loads(pickle.dumps(images))._kept) == 0


def test_table_in_a_bucket(tmp_path: Path, s3_bucket: str) -> None:
    path = write(tmp_path / "train.parquet", ["a", "b", "a", "b", "a", "b"])
    Location.parse(f"{s3_bucket}/set/train.parquet").write_bytes(path.read_bytes())
    for uri in (f"{s3_bucket}/set", f"{s3_bucket}/set/train.parquet"):
        parts = read_parquet(uri)
        assert greys(parts.train) == list(range(6))
        assert greys(pickle.loads(pickle.dumps(parts.train))) == list(range(6))


def test_undecodable_row_is_named(tmp_path: Path) -> None:
    table = pa.table({"image": [b"", None, b"rubbish", BYTES[0]], "label": [0, 1, 0, 1]})
    pq.write_table(table, tmp_path / "t.parquet")
    images = read_parquet(str(tmp_path / "t.parquet")).train
    for row, reason in enumerate(["empty", "empty", "text"]):
        with pytest.raises(DataError, match=rf"{tmp_path}/t\.parquet#{row} cannot .*{reason}"):
            images.image(row)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 1]}, "images .* in a column image or img or bytes, got label: int64"),
        ({"image": ["a.jpg", "b.jpg"], "label": [0, 1]}, "encoded images .*got image: string"),
        ({"image": BYTES[:2]}, "labels in a column label or .*got image: binary"),
        ({"image": BYTES[:2], "label": [0.5, 1.0]}, "got image: binary, label: double"),
        ({"image": BYTES[:2], "label": [0, None]}, "must not be null, got 1 nulls"),
        ({"image": BYTES[:2], "label": [0, -1]}, "at least 0, got -1"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        read_parquet(str(tmp_path / "t.parquet"))


def test_labels_unknown_to_training_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ["a", "b"])
    write(tmp_path / "test.parquet", ["a", "c", "z"], first=2)
    with pytest.raises(DataError, match=r"\(test\): .* the 2 classes .*got 'c' and 1 others"):
        read_parquet(str(tmp_path))


def test_number_beyond_the_published_names_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [0, 5], names=["cat", "dog"])
    with pytest.raises(DataError, match=r"among the 2 classes .*got '5'"):
        read_parquet(str(path))


def test_tables_of_two_types_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [0, 1])
    write(tmp_path / "train-1.parquet", ["a", "b"])
    with pytest.raises(DataError, match="labels of one type"):
        read_parquet(str(tmp_path))


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder of them, got none"):
        read_parquet(str(tmp_path))
    write(tmp_path / "test.parquet", [0, 1])
    with pytest.raises(DataError, match=r"and one train, got test\.parquet"):
        read_parquet(str(tmp_path))
    write(tmp_path / "train.parquet", [0, 1])
    write(tmp_path / "extra.parquet", [0, 1])
    with pytest.raises(DataError, match=r"got extra\.parquet: rename"):
        read_parquet(str(tmp_path))


def test_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"not a table at all")
    with pytest.raises(DataError, match=r"cannot read .*t\.parquet as Parquet"):
        read_parquet(str(tmp_path / "t.parquet"))
