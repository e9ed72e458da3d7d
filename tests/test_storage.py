"""Whatever names a place is understood, and what is written there is whole or not there at all."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StorageError, one_line, without_secrets
from pipeline.storage import Location, file_uri, split_uri

CANARY = "wJalrXUtnFEMI/K7MDENG"


def at(place: Path) -> Location:
    return Location.parse(str(place))


def names(folder: Location, *, recursive: bool = False) -> list[str]:
    prefix = f"{folder}/"
    return [str(place).removeprefix(prefix) for place in folder.files(recursive=recursive)]


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "scheme", "path"),
    [
        ("/data/x.jpg", "", "/data/x.jpg"),
        ("/data/a/../x", "", "/data/x"),
        ("/data/100%25 #1?.jpg", "", "/data/100%25 #1?.jpg"),
        ("file:///data/100%25%20%231.jpg", "", "/data/100% #1.jpg"),
        ("file:///data/%FF.jpg", "", "/data/\udcff.jpg"),
        ("s3://bucket/a b/100%25#1?.jpg", "s3", "bucket/a b/100%25#1?.jpg"),
        ("S3://bucket/folder/", "s3", "bucket/folder"),
        ("gs://bucket", "gs", "bucket"),
        ("gcs://bucket/x", "gs", "bucket/x"),
    ],
)
def test_uri_is_taken_letter_by_letter_but_for_file(uri: str, scheme: str, path: str) -> None:
    assert split_uri(uri) == (scheme, path)


def test_relative_and_home_paths_become_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert split_uri("~/x") == ("", "/home/me/x")
    assert split_uri("x") == ("", f"{Path.cwd()}/x")


@pytest.mark.parametrize("name", ["plain", "100%", "a#1.jpg", "a\nb.jpg", "漢.jpg", "\udcff"])
def test_written_and_read_again_a_place_is_the_same(name: str) -> None:
    place = Location.parse("/data").child(name)
    assert Location.parse(str(place)) == place
    assert split_uri(file_uri(place.path)) == ("", place.path)
    str(place).encode()


@pytest.mark.parametrize(
    "uri", ["http://host/x", "hdfs://host/x", "", "s3://", "s3:///x", "file://"]
)
def test_other_schemes_and_nothing_are_config_errors(uri: str) -> None:
    with pytest.raises(ConfigError):
        Location.parse(uri)


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIA:{CANARY}@bucket/x",
        f"s3://{CANARY.replace('/', '')}@bucket/x",
        f"gs://user:{CANARY}@bucket/x",
        f"https://user:{CANARY}@host/x",
        f"s3://bucket/x?X-Amz-Signature={CANARY}",
        f"s3://bucket/x?access_key=a&secret_key={CANARY}",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Location.parse(uri)
    assert "MDENG" not in str(caught.value)


@pytest.mark.parametrize("option", ["region=eu-west-1", "endpoint_override=localhost:9000"])
def test_options_in_a_uri_are_refused_with_what_to_set_instead(option: str) -> None:
    with pytest.raises(ConfigError, match=r"AWS_REGION and AWS_ENDPOINT_URL"):
        Location.parse(f"s3://bucket/x?{option}")


@pytest.mark.parametrize(
    "text",
    [
        f"PUT https://b.s3.amazonaws.com/x?X-Amz-Credential={CANARY}&a=1",
        f"see s3://AKIA:{CANARY}@bucket/x and s3://other/y",
        f"AWS_SECRET_ACCESS_KEY={CANARY}",
        f"postgresql://me:{CANARY}@host/db",
    ],
)
def test_secrets_are_blotted_out_of_any_text(text: str) -> None:
    shown = without_secrets(text)
    assert "MDENG" not in shown
    assert "***" in shown


def test_text_without_secrets_stays_as_it_is() -> None:
    text = "cannot read s3://bucket/a@b/c.jpg: not found"
    assert without_secrets(text) == text


def test_one_line_is_one_line_and_short() -> None:
    assert one_line(OSError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(OSError("x" * 1000), limit=50)) == 50


# --- looking ------------------------------------------------------------------------------------


def test_kind_tells_files_folders_and_nothing(tmp_path: Path) -> None:
    place = at(tmp_path)
    place.child("x").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    found = [place.child(name).kind() for name in ("x", ".", "none", "x/below", "pipe")]
    assert found == ["file", "folder", "missing", "missing", "missing"]


def test_names_that_are_not_utf8_are_seen_and_read(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.jpg"
    Path(os.fsdecode(path)).write_bytes(b"image")
    place = at(tmp_path).child(os.fsdecode(b"\xff.jpg"))
    assert place.kind() == "file"
    assert place.read_bytes() == b"image"
    with place.open() as stream:
        stream.seek(3)
        assert stream.read() == b"ge"


def test_files_are_sorted_and_reach_below_on_demand(tmp_path: Path) -> None:
    for name in ("b", "a", "c/d"):
        at(tmp_path).child(name).write_bytes(b"")
    assert names(at(tmp_path)) == ["a", "b"]
    assert names(at(tmp_path), recursive=True) == ["a", "b", "c/d"]
    assert names(at(tmp_path / "none")) == []


def test_empty_is_what_is_missing_or_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert at(tmp_path / "folder").is_empty()
    assert at(tmp_path / "none").is_empty()
    assert not at(tmp_path).is_empty()


def test_delete_takes_files_folders_and_what_is_not_there(tmp_path: Path) -> None:
    at(tmp_path / "a" / "b").write_bytes(b"")
    at(tmp_path / "c").write_bytes(b"")
    for name in ("a", "c", "none"):
        at(tmp_path / name).delete()
    assert list(tmp_path.iterdir()) == []


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "new/folder/x", "x" * 255, "100% #1?\n.bin"])
def test_bytes_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    place = at(tmp_path).child(name)
    place.write_bytes(b"old")
    place.write_bytes(b"new")
    assert place.read_bytes() == b"new"
    assert names(at(tmp_path), recursive=True) == [name]


DIE_BEFORE_THE_RENAME = """
import os, signal, sys
from pipeline import storage
storage._flush_to_disk = lambda path: os.kill(os.getpid(), signal.SIGKILL)
storage.Location.parse(sys.argv[1]).write_bytes(b"new" * 100_000)
"""


def test_writer_killed_before_the_rename_leaves_the_old_bytes(tmp_path: Path) -> None:
    at(tmp_path / "x").write_bytes(b"old")
    command = [sys.executable, "-c", DIE_BEFORE_THE_RENAME, str(tmp_path / "x")]
    assert subprocess.run(command, check=False).returncode == -9
    assert at(tmp_path / "x").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2, "the killed writer left its part behind"
    assert names(at(tmp_path)) == ["x"]


def publish_half(place: Location) -> None:
    with place.publishing() as stream:
        stream.write(b"half")
        raise ZeroDivisionError


def test_fault_while_publishing_leaves_the_old_bytes_and_no_rest(tmp_path: Path) -> None:
    at(tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        publish_half(at(tmp_path / "x"))
    assert [place.name for place in tmp_path.iterdir()] == ["x"]
    assert at(tmp_path / "x").read_bytes() == b"old"


def test_folder_in_the_place_of_a_file_is_a_storage_error(tmp_path: Path) -> None:
    at(tmp_path / "file").write_bytes(b"")
    below = at(tmp_path / "file" / "x")
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/file/x"):
        below.write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        below.create_exclusively(b"")


def test_full_disk_is_a_storage_error_and_keeps_what_was_there(small_disk: Path) -> None:
    at(small_disk / "x").write_bytes(b"old")
    with pytest.raises(StorageError, match=f"cannot write {small_disk}/x: .*No space left"):
        at(small_disk / "x").write_bytes(b"new" * 100_000)
    assert at(small_disk / "x").read_bytes() == b"old"
    assert [place.name for place in small_disk.iterdir()] == ["x"]


def test_full_disk_leaves_no_half_a_claim(small_disk: Path) -> None:
    with pytest.raises(StorageError, match="No space left"):
        at(small_disk / "claim").create_exclusively(b"me" * 100_000)
    assert at(small_disk).is_empty()
    assert at(small_disk / "claim").create_exclusively(b"me")


def claim(place: str, owner: int) -> bool:
    return Location.parse(place).create_exclusively(str(owner).encode())


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_one_of_eight_creates_a_file(tmp_path: Path, kind: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    pool: Executor = (
        ThreadPoolExecutor(8) if kind == "threads" else ProcessPoolExecutor(4, mp_context=spawn)
    )
    with pool:
        for claimed in range(20 if kind == "threads" else 3):
            place = str(tmp_path / f"claim-{claimed}")
            won = list(pool.map(claim, [place] * 8, range(8)))
            assert won.count(True) == 1
            assert at(Path(place)).read_bytes() == str(won.index(True)).encode()


# --- stores -------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3_bucket: str) -> Location:
    return Location.parse(s3_bucket)


def test_object_is_written_read_and_deleted(bucket: Location) -> None:
    place = bucket.child("a b/100%25 #1?.bin")
    place.write_bytes(b"old")
    place.write_bytes(b"new")
    assert (place.kind(), place.read_bytes()) == ("file", b"new")
    assert Location.parse(str(place)).read_bytes() == b"new"
    place.delete()
    assert place.kind() == "missing"
    with pytest.raises(FileNotFoundError):
        place.read_bytes()


def test_folder_of_a_bucket_is_listed_and_deleted(bucket: Location) -> None:
    folder = bucket.child("folder")
    assert folder.is_empty()
    for name in ("b", "a", "c/d"):
        folder.child(name).write_bytes(b"")
    assert folder.kind() == "folder"
    assert not folder.is_empty()
    assert names(folder) == ["a", "b"]
    assert names(folder, recursive=True) == ["a", "b", "c/d"]
    folder.delete()
    assert folder.is_empty()


def test_object_is_created_once(bucket: Location) -> None:
    place = bucket.child("claim")
    assert place.create_exclusively(b"first")
    assert not place.create_exclusively(b"second")
    assert place.read_bytes() == b"first"


def test_fault_while_publishing_an_object_leaves_the_old_one(bucket: Location) -> None:
    place = bucket.child("published/x")
    place.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        publish_half(place)
    assert place.read_bytes() == b"old"
    assert names(bucket.child("published")) == ["x"]


def test_bucket_that_is_not_there_is_a_storage_error(bucket: Location) -> None:
    missing = Location.parse("s3://nobody/x")
    with pytest.raises(StorageError, match="cannot write s3://nobody/x"):
        missing.write_bytes(b"")


def read_in_another_process(place: Location) -> bytes:
    # The endpoint travels with the place; only the credentials are this process's own.
    del os.environ["AWS_ENDPOINT_URL"]
    return place.read_bytes()


def test_places_travel_between_processes(bucket: Location, tmp_path: Path) -> None:
    stored, local = bucket.child("travel"), at(tmp_path / "x")
    for place in (stored, local):
        place.write_bytes(b"here")
        assert pickle.loads(pickle.dumps(place)) == place
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(read_in_another_process, stored).result() == b"here"


def test_client_of_a_bucket_is_shared_until_the_environment_changes(
    bucket: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Location.parse("s3://lake/a").filesystem is bucket.filesystem
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert Location.parse("s3://lake/a").filesystem is not bucket.filesystem
