"""S3 and Google buckets are listed and read like folders, by real servers in this process."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import boto3  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from pipeline.data.lake import Collection, image_id
from pipeline.data.sources import ReadFault, fetch_bytes
from pipeline.errors import DataError, StorageError
from pipeline.storage import Location
from tests.conftest import point_s3_at
from tests.data.conftest import ids_of, listed


@pytest.fixture(scope="module")
def bucket(s3_bucket: str) -> str:
    """A bucket that holds a small tree."""
    names = ("a/cat.jpg", "b/cat.jpg", "b/c/dog.PNG", "top.webp", "b/notes.txt", ".hidden.jpg")
    put({f"photos/{name}": name.encode() for name in names})
    return s3_bucket


def put(objects: dict[str, bytes]) -> None:
    """Fill the bucket by other code than ours, which would not write some of the keys."""
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=endpoint)
    for key, body in objects.items():
        client.put_object(Bucket="lake", Key=key, Body=body)


def test_bucket_folder_is_listed_and_read_with_the_ids_of_the_disk(bucket: str) -> None:
    uris, report = listed(f"{bucket}/photos/")
    assert uris[0] == "s3://lake/photos/top.webp"
    assert fetch_bytes(uris) == [b"top.webp", b"a/cat.jpg", b"b/cat.jpg", b"b/c/dog.PNG"]
    assert report.ignored_by_extension == {".txt": 1, "(hidden)": 1}
    names = ("top.webp", "a/cat.jpg", "b/cat.jpg", "b/c/dog.PNG")
    assert ids_of(f"{bucket}/photos") == [image_id(name) for name in names]


def test_bucket_glob_lists_what_matches(bucket: str) -> None:
    assert listed(f"{bucket}/photos/*/cat.jpg")[0] == [
        "s3://lake/photos/a/cat.jpg",
        "s3://lake/photos/b/cat.jpg",
    ]


@pytest.mark.parametrize("name", ["sp ace.jpg", "per%20cent.jpg", "ha#sh.jpg", "q?x.jpg", "ä.jpg"])
def test_odd_keys_are_listed_and_read(bucket: str, name: str) -> None:
    Location.parse(f"{bucket}/odd").child(name).write_bytes(b"image")
    uris, _ = listed(f"{bucket}/odd")
    assert f"{bucket}/odd/{name}" in uris
    assert fetch_bytes([f"{bucket}/odd/{name}"]) == [b"image"]


def test_keys_that_cannot_be_walked_are_named(bucket: str) -> None:
    put({"slashes/a//b.jpg": b"x", "slashes/c.jpg": b"x"})
    uris, report = listed(f"{bucket}/slashes")
    assert uris == ["s3://lake/slashes/c.jpg"]
    assert report.unreadable_folders == [
        "s3://lake/slashes/a// (keys with an empty name between slashes)"
    ]


def test_list_in_a_bucket_is_relative_to_it(bucket: str) -> None:
    place = Location.parse(f"{bucket}/photos/list.txt")
    place.write_bytes(b"a/cat.jpg\n../photos/top.webp\ns3://lake/photos/a/cat.jpg\n")
    uris, report = listed(str(place))
    place.delete()
    assert uris == ["s3://lake/photos/a/cat.jpg", "s3://lake/photos/top.webp"]
    assert report.num_duplicates == 1


def test_table_in_a_bucket_is_read_by_rows(bucket: str) -> None:
    images = [{"bytes": f"image {row}".encode(), "path": f"{row}.jpg"} for row in range(3)]
    with Location.parse(f"{bucket}/tables/x.parquet").publishing() as stream:
        pq.write_table(pa.table({"image": images}), stream, row_group_size=2)
    uris, _ = listed(f"{bucket}/tables")
    assert uris[2] == "s3://lake/tables/x.parquet#2/2.jpg"
    assert fetch_bytes([uris[2], uris[0]]) == [b"image 2", b"image 0"]


def test_missing_keys_and_buckets_are_not_found(bucket: str) -> None:
    answers = fetch_bytes(
        [f"{bucket}/photos/none.jpg", "s3://nobody/x.jpg", f"{bucket}/p.parquet#0"]
    )
    assert answers == [ReadFault("not found")] * 3
    with pytest.raises(DataError, match="does not exist"):
        Collection("s3://nobody/photos")


class FailingStore(BaseHTTPRequestHandler):
    """Answers ``status`` for the first ``failures`` requests, then an object to every one."""

    failures, status, num_requests = 0, 503, 0

    def do_GET(self) -> None:
        kind = type(self)
        kind.num_requests += 1
        failed = kind.num_requests <= kind.failures
        body = b"" if failed else b"image"
        self.send_response(kind.status if failed else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def failing_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FailingStore]]:
    handler = type("Store", (FailingStore,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        point_s3_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield handler
        server.shutdown()


def test_store_that_fails_for_a_while_is_asked_again(failing_store: type[FailingStore]) -> None:
    # Arrow itself asks three times; seven failures are past its patience and within ours.
    failing_store.failures = 7
    assert fetch_bytes(["s3://lake/x.jpg"], wait_seconds=0.01) == [b"image"]


@pytest.mark.parametrize(
    ("status", "num_requests", "reason"),
    [(403, 1, "permission denied"), (404, 1, "not found"), (400, 1, "the store refused"),
     (503, 9, "When reading information")],
)  # fmt: skip
def test_store_that_refuses_is_not_asked_again(
    failing_store: type[FailingStore], status: int, num_requests: int, reason: str
) -> None:
    failing_store.failures, failing_store.status = 1000, status
    (fault,) = fetch_bytes(["s3://lake/x.jpg"], wait_seconds=0.01)
    assert isinstance(fault, ReadFault)
    assert fault.reason.startswith(reason)
    assert failing_store.num_requests == num_requests


def test_store_that_cannot_be_listed_is_a_storage_error(failing_store: type[FailingStore]) -> None:
    failing_store.failures, failing_store.status = 1000, 403
    with pytest.raises(StorageError, match="cannot look at s3://lake/photos"):
        Collection("s3://lake/photos")


class SmallGoogle(BaseHTTPRequestHandler):
    """The three calls of Google's JSON interface that a listing and a read make."""

    objects: ClassVar = {"photos/a/cat.jpg": b"cat", "photos/per%cent #1.jpg": b"odd"}

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        key = unquote(path.partition("/o/")[2])
        if path.endswith("/o"):
            body = self.page(dict(pair.split("=") for pair in query.split("&") if pair))
        elif key in self.objects:
            body = self.objects[key] if "alt=media" in query else self.describe(key).encode()
        else:
            body = b""
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def describe(self, key: str) -> str:
        size = len(self.objects[key])
        return f'{{"kind": "storage#object", "name": "{key}", "bucket": "lake", "size": "{size}"}}'

    def page(self, options: dict[str, str]) -> bytes:
        prefix = unquote(options.get("prefix", ""))
        keys = [key for key in self.objects if key.startswith(prefix)]
        here = [key for key in keys if "delimiter" not in options or "/" not in key[len(prefix) :]]
        folders = {key[: key.index("/", len(prefix)) + 1] for key in keys if key not in here}
        names = ", ".join(f'"{folder}"' for folder in sorted(folders))
        items = ", ".join(map(self.describe, here))
        return f'{{"kind": "storage#objects", "items": [{items}], "prefixes": [{names}]}}'.encode()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_google_bucket_is_listed_and_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SmallGoogle) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", endpoint)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(service_account(tmp_path)))
        uris, _ = listed("gs://lake/photos")
        assert uris == ["gs://lake/photos/a/cat.jpg", "gs://lake/photos/per%cent #1.jpg"]
        answers = fetch_bytes([*uris, "gcs://lake/photos/none.jpg"])
        assert answers == [b"cat", b"odd", ReadFault("not found")]
        server.shutdown()


def service_account(folder: Path) -> Path:
    """Credentials of nobody: the client signs its token itself and the server does not look."""
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {"type": "service_account", "project_id": "test", "private_key": key.decode()}
    account |= {"client_email": "a@b.c", "client_id": "1", "private_key_id": "1"}
    place = folder / "account.json"
    place.write_text(json.dumps({**account, "token_uri": "http://127.0.0.1:9/token"}))
    return place
