"""A place named by a URI: its bytes, its files, and writes that are whole or not there at all.

Everything that touches a disk or a bucket goes through ``Location``, so ``/data/x``, ``s3://bucket/x``
and ``gs://bucket/x`` behave alike. Credentials come from the environment, never from a URI.
"""

import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

from pipeline.errors import ConfigError, StorageError

LOCAL_SCHEMES = ("", "file")
REMOTE_SCHEMES = ("s3", "gs", "gcs")
_TEMPORARY = ".tmp-"


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
        scheme = urlsplit(uri).scheme if re.match(r"[a-z0-9]+://", uri) else ""
        if scheme not in LOCAL_SCHEMES + REMOTE_SCHEMES:
            known = "a local path, file://, s3:// or gs://"
            raise ConfigError(f"scheme must be {known}, got {without_secrets(uri)}")
        if scheme in LOCAL_SCHEMES:
            local = uri.removeprefix("file://") if scheme else uri
            return cls(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(local)))
        if "@" in urlsplit(uri).netloc:
            raise ConfigError(
                f"{without_secrets(uri)} carries credentials; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (or a profile) in the environment instead"
            )
        try:
            filesystem, path = fs.FileSystem.from_uri(uri)
        except (OSError, ValueError) as fault:
            raise StorageError(f"cannot open {uri}: {one_line(fault)}") from fault
        return cls(filesystem, path, scheme)

    @property
    def is_local(self) -> bool:
        """Whether the path is one of this machine's (or of a disk mounted on it)."""
        return self.scheme == ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}" if self.scheme else self.path

    def child(self, name: str) -> "Location":
        """The place ``name`` below this folder."""
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}", self.scheme)

    def kind(self) -> str:
        """``"file"``, ``"folder"`` or ``"missing"``."""
        info = self._reach(lambda: self.filesystem.get_file_info(self.path), "look at")
        kinds = {fs.FileType.File: "file", fs.FileType.Directory: "folder"}
        return kinds.get(info.type, "missing")

    def read_bytes(self) -> bytes:
        """All bytes of the file.

        Raises:
            OSError: as the store says it; callers that read many files turn it into a status.
        """
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write_bytes(self, data: bytes) -> None:
        """Write the file whole: a reader sees the old bytes or the new, never a part.

        Local files are written beside their place, flushed to disk and renamed; object stores
        publish an object only when its upload is complete.

        Raises:
            StorageError: the place cannot be written (full, read-only, unreachable).
        """
        self._reach(lambda: self._write_whole(data), "write")

    def _write_whole(self, data: bytes) -> None:
        if not self.is_local:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(data)
            return
        final = Path(self.path)
        final.parent.mkdir(parents=True, exist_ok=True)
        # A short name: the final one may already be as long as the file system allows.
        temporary = final.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def create_exclusively(self, data: bytes) -> bool:
        """Write the file only if it is not there yet; False where it is.

        Atomic on local disks. Object stores offer no such call through Arrow: there the last
        writer wins, so the caller must read back after a pause to learn who that was.
        """
        if not self.is_local:
            if self.kind() == "file":
                return False
            self.write_bytes(data)
            return True
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        return True

    def files(self, *, recursive: bool = False) -> Iterator["Location"]:
        """The files in this folder by name; none where the folder is missing."""
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        found = self._reach(lambda: self.filesystem.get_file_info(selector), "list")
        for info in sorted(found, key=lambda info: str(info.path)):
            hidden = info.base_name.startswith(_TEMPORARY)
            if info.type == fs.FileType.File and not hidden:
                yield Location(self.filesystem, info.path, self.scheme)

    def is_empty(self) -> bool:
        """Whether the folder is missing or holds nothing."""
        selector = fs.FileSelector(self.path, recursive=False, allow_not_found=True)
        return not self._reach(lambda: self.filesystem.get_file_info(selector), "list")

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


def one_line(fault: BaseException, limit: int = 300) -> str:
    """An exception's message on one line, shortened."""
    text = " ".join(str(fault).split()) or type(fault).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def without_secrets(text: str) -> str:
    """``text`` with user:password@, signed queries and AWS keys blotted out."""
    text = re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
    return re.sub(r"((?:X-Amz-|AWS)[A-Za-z-_]*=)[^&\s]+", r"\1***", text, flags=re.IGNORECASE)
