"""A place named by a URI: its bytes, its files, and writes that are whole or not there at all.

Everything that touches a disk or a bucket goes through ``Location``, so ``/data/x``, ``s3://bucket/x``
and ``gs://bucket/x`` behave alike. Credentials, region and endpoint come from the environment
(``AWS_PROFILE``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``...), never from a URI.

Plain paths and the keys of objects are taken letter by letter: ``%``, ``#``, ``?`` and spaces mean
themselves. Only ``file://`` is percent-decoded: so it can name bytes that are not UTF-8.

To add a store: a scheme Arrow knows goes into ``REMOTE_SCHEMES``.
"""

import functools
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import quote_from_bytes, unquote_to_bytes

from pyarrow import fs

from pipeline.errors import ConfigError, DataError, StorageError, one_line, without_secrets

LOCAL_SCHEMES = ("", "file")
REMOTE_SCHEMES = ("s3", "gs", "gcs")
_TEMPORARY = ".tmp-"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SIGNATURE = re.compile(r"[?&](X-Amz-|X-Goog-|AWSAccessKeyId=|Signature=|\w+_key=)", re.IGNORECASE)
# Options that Arrow reads from an S3 or GCS URI; here they would be lost with the next ``str``.
_OPTION = re.compile(r"\?(region|scheme|endpoint_override|retry_limit_seconds)=")


@dataclass(frozen=True)
class Location:
    """A file or folder: pyarrow's file system and the path in it. Cheap, immutable, picklable."""

    filesystem: Any
    path: str
    scheme: str = ""

    @classmethod
    def parse(cls, uri: str) -> "Location":
        """The place a user's text names; relative paths become absolute.

        Raises:
            ConfigError: the scheme is not one we read, or the URI carries credentials.
            StorageError: the store behind the URI cannot be reached.
        """
        scheme, path = split_uri(uri)
        if scheme == "":
            return cls(fs.LocalFileSystem(), path)
        bucket = path.split("/", 1)[0]
        try:
            return cls(_store(scheme, bucket, _environment()), path, scheme)
        except (OSError, ValueError) as fault:
            raise StorageError(f"cannot open {scheme}://{path}: {one_line(fault)}") from fault

    @property
    def is_local(self) -> bool:
        """Whether the path is one of this machine's (or of a disk mounted on it)."""
        return self.scheme == ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def __str__(self) -> str:
        if self.scheme:
            return f"{self.scheme}://{self.path}"
        return self.path if _is_text(self.path) else file_uri(self.path)

    def child(self, name: str) -> "Location":
        """The place ``name`` below this folder."""
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}", self.scheme)

    def kind(self) -> str:
        """``"file"``, ``"folder"`` or ``"missing"``."""
        if self.is_local:
            return str(self._reach(self._local_kind, "look at"))
        info = self._reach(lambda: self.filesystem.get_file_info(self.path), "look at")
        kinds = {fs.FileType.File: "file", fs.FileType.Directory: "folder"}
        return kinds.get(info.type, "missing")

    def required(self, flag: str) -> "Location":
        """This place, which ``flag`` names.

        Raises:
            DataError: there is nothing.
        """
        if self.kind() == "missing":
            raise DataError(f"{flag}: there is no {self}")
        return self

    def _local_kind(self) -> str:
        # Not through Arrow, which cannot say a name that is not UTF-8.
        try:
            mode = os.stat(self.path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "missing"
        return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "missing"

    def open(self) -> IO[bytes]:
        """The file as a seekable stream of bytes, to be closed by the caller.

        Raises:
            OSError: as the store says it.
        """
        if self.is_local:
            return Path(self.path).open("rb")
        stream: IO[bytes] = self.filesystem.open_input_file(self.path)
        return stream

    def read_bytes(self) -> bytes:
        """All bytes of the file.

        Raises:
            OSError: as the store says it; callers that read many files turn it into a status.
        """
        if self.is_local:
            return Path(self.path).read_bytes()
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write_bytes(self, data: bytes) -> None:
        """Write the file whole: a reader sees the old bytes or the new, never a part.

        Local files are written beside their place, flushed to disk and renamed; object stores
        publish an object only when its upload is complete.

        Raises:
            StorageError: the place cannot be written (full, read-only, unreachable).
        """
        if self.is_local:
            with self.publishing() as stream:
                stream.write(data)
        else:
            self._reach(lambda: self._put(data), "write")

    def _put(self, data: bytes) -> None:
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(data)

    @contextmanager
    def publishing(self) -> Iterator[BinaryIO]:
        """A stream whose bytes appear at this place only if the block ends without an error.

        Raises:
            StorageError: the place cannot be written (full, read-only, unreachable).
        """
        # A short name: the final one may already be as long as the file system allows.
        temporary = self._sibling(f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            if self.is_local:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            with self.filesystem.open_output_stream(temporary.path) as stream:
                yield stream
            if self.is_local:
                _flush_to_disk(temporary.path)
            self.filesystem.move(temporary.path, self.path)
        except BaseException as fault:
            with suppress(OSError, StorageError):
                temporary.delete()
            if isinstance(fault, OSError):
                raise StorageError(f"cannot write {self}: {one_line(fault)}") from fault
            raise

    def _sibling(self, name: str) -> "Location":
        folder = self.path.rstrip("/").rpartition("/")[0]
        return Location(self.filesystem, f"{folder}/{name}", self.scheme)

    def create_exclusively(self, data: bytes) -> bool:
        """Write the file only if it is not there yet; False where it is.

        Atomic on local disks. Object stores offer no such call through Arrow: there the last
        writer wins, so the caller must read back after a pause to learn who that was.

        Raises:
            StorageError: the place cannot be written (full, read-only, unreachable).
        """
        if not self.is_local:
            if self.kind() == "file":
                return False
            self.write_bytes(data)
            return True
        return bool(self._reach(lambda: self._create_locally(data), "write"))

    def _create_locally(self, data: bytes) -> bool:
        place = Path(self.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = place.open("xb")
        except FileExistsError:
            return False
        try:
            with stream:
                stream.write(data)
        except BaseException:
            # A claim without content would keep everybody out for good.
            place.unlink(missing_ok=True)
            raise
        return True

    def files(self, *, recursive: bool = False) -> Iterator["Location"]:
        """The files in this folder by name; none where the folder is missing."""
        for info in sorted(self._entries(recursive), key=lambda info: str(info.path)):
            hidden = info.base_name.startswith(_TEMPORARY)
            if info.type == fs.FileType.File and not hidden:
                yield Location(self.filesystem, info.path, self.scheme)

    def names(self) -> list[str]:
        """The names of the files and folders directly in this folder; none where it is missing."""
        names = [info.base_name for info in self._entries(recursive=False)]
        return sorted(name for name in names if not name.startswith(_TEMPORARY))

    def is_empty(self) -> bool:
        """Whether the folder is missing or holds nothing."""
        # Arrow shows no folder of a Google bucket that has no marker object, only what is in it.
        return not self._entries(recursive=self.scheme == "gs")

    def _entries(self, recursive: bool) -> list[fs.FileInfo]:
        """What Arrow knows of all that is in this folder; nothing where it is missing."""
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        found: list[fs.FileInfo] = self._reach(
            lambda: self.filesystem.get_file_info(selector), "list"
        )
        return found

    def delete(self) -> None:
        """Remove the file, or the folder with all it holds; nothing where it is missing."""
        kind = self.kind()
        if kind == "file":
            self._reach(lambda: self.filesystem.delete_file(self.path), "delete")
        elif kind == "folder":
            self._reach(lambda: self.filesystem.delete_dir(self.path), "delete")

    def _reach(self, action: Any, verb: str) -> Any:
        """Run ``action``; a store's complaint becomes one line that names the place."""
        try:
            return action()
        except OSError as fault:
            raise StorageError(f"cannot {verb} {self}: {one_line(fault)}") from fault


def split_uri(uri: str) -> tuple[str, str]:
    """Scheme (``""`` for local, ``"s3"``, ``"gs"``) and absolute path of a text; touches no store.

    Raises:
        ConfigError: the scheme is not one we read, or the URI carries credentials or options.
    """
    found = _SCHEME.match(uri)
    scheme = found[1].lower() if found else ""
    rest = uri[found.end() :] if found else uri
    if scheme not in LOCAL_SCHEMES + REMOTE_SCHEMES:
        shown = without_secrets(uri.split("?")[0])
        raise ConfigError(f"scheme must be a local path, file://, s3:// or gs://, got {shown}")
    if not rest.strip("/ ") and not rest.startswith("/"):
        raise ConfigError(f"a path must name something, got '{uri}'")
    if scheme == "file":
        return "", os.path.abspath(os.fsdecode(unquote_to_bytes(os.fsencode(rest))))
    if scheme == "":
        return "", os.path.abspath(os.path.expanduser(rest))
    _refuse_secrets_and_options(scheme, rest)
    return "gs" if scheme == "gcs" else scheme, rest.rstrip("/")


def file_uri(path: str) -> str:
    """``file://`` and the bytes of a local path, percent-encoded: ASCII whatever the name is."""
    return "file://" + quote_from_bytes(os.fsencode(path))


def _flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_secrets_and_options(scheme: str, rest: str) -> None:
    """Raise ConfigError, without repeating the secret, where ``rest`` is more than bucket/key."""
    bucket = rest.split("/", 1)[0]
    if "@" in bucket or ":" in bucket or _SIGNATURE.search(rest):
        raise ConfigError(
            f"a {scheme}:// URI must not carry credentials: give {scheme}://bucket/key, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile) in the environment"
        )
    if not bucket:
        raise ConfigError(f"a {scheme}:// URI must name a bucket, got {scheme}://{rest}")
    option = _OPTION.search(rest)
    if option:
        raise ConfigError(
            f"a {scheme}:// URI must not carry options, got '{option[1]}': set AWS_REGION and "
            "AWS_ENDPOINT_URL in the environment, where the workers find them too"
        )


def _environment() -> tuple[tuple[str, str], ...]:
    """What a store's client is made of, so that a change of it makes a new client."""
    return tuple(sorted(pair for pair in os.environ.items() if pair[0].startswith("AWS_")))


@functools.lru_cache(maxsize=16)
def _store(scheme: str, bucket: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """The client of a bucket; shared, because open connections are what makes small reads fast."""
    if scheme == "gs":
        # Google's client tries for 15 minutes by default: longer than anybody waits for an image.
        return fs.FileSystem.from_uri(f"gs://{bucket}?retry_limit_seconds=60")[0]
    # Arrow finds the bucket's region, but a file system from a URI asks a failing store 31 times,
    # and one that is pickled forgets the endpoint.
    region = fs.FileSystem.from_uri(f"s3://{bucket}")[0].region
    variables = dict(environment)
    return fs.S3FileSystem(
        region=region,
        endpoint_override=variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL"),
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=3),
    )


def _is_text(path: str) -> bool:
    """Whether ``path`` can be written as UTF-8; names on a disk are any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
