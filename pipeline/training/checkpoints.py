"""Where a training run left off: whole checkpoints in a folder of a disk or a bucket.

    FOLDER/epoch_000012.pt      all of the state after epoch 12, as ``torch.save`` writes it
    FOLDER/checkpoints.json     the index: epoch, file, score, sha256, size of each; written last

A checkpoint is one only once the index lists it, and the index never lists a file that is not there
whole; so whenever the process dies, the checkpoint before is still good. Plain runs, torchrun and
Ray Train resume by this code alone. What is loaded holds tensors and plain values: no file is ever
allowed to run code.

To keep others than the newest and the best: change ``CheckpointStore._worth_keeping``.
"""

import errno
import hashlib
import json
import logging
import math
import os
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, BinaryIO, cast

import torch
from pyarrow import fs
from torch import Tensor, nn

from pipeline.errors import StorageError, WeightsError, one_line
from pipeline.storage import Location

INDEX_NAME = "checkpoints.json"
INDEX_VERSION = 1

_FILE = re.compile(r"epoch_\d{6,}(_\d+)?\.pt")
# How pipeline.storage calls what it is still writing; ``Location`` does not list such files.
_TEMPORARY = ".tmp-"
_CHUNK = 8 << 20
_PLAIN = (Tensor, nn.Parameter, bool, int, float, str, bytes, type(None))
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SavedState:
    """What was saved after ``epoch``, tensors on the CPU, and the score it had."""

    epoch: int
    score: float | None
    state: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class _Entry:
    """A line of the index."""

    epoch: int
    file: str
    score: float | None
    sha256: str
    size: int


class _DamagedError(Exception):
    """A listed checkpoint that is not what was written; the message says in what."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run, of which one process writes and any may read.

    Attributes:
        folder: Nothing else than checkpoints should lie there; it need not exist.
        keep: How many of the newest are kept, at least 1; the best is kept besides.
    """

    folder: Location
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")

    def save(self, epoch: int, state: dict[str, Any], *, score: float | None) -> None:
        """Keep ``state`` as the one after ``epoch``; checkpoints of later epochs are taken back.

        Memory: the bytes go to the store as they are made, so it takes little besides ``state``.

        Args:
            epoch: From 0.
            state: Tensors, numbers, strings and None in dicts, lists and tuples.
            score: Higher is better; None where nothing was measured.

        Raises:
            StorageError: the folder cannot be written; the checkpoints before are untouched.
            ValueError: the epoch or the score is no number to compare by, or the state holds what
                a load would refuse.
        """
        if epoch < 0 or (score is not None and not math.isfinite(score)):
            raise ValueError(f"epoch must be >= 0 and score finite, got {epoch} and {score}")
        _require_plain(state, "state")
        listed = self._index()
        # A file that is listed stays as it is until the index no longer names it.
        file = _free_name(epoch, {entry.file for entry in listed})
        sha256, size = self._write(file, state)
        entry = _Entry(epoch, file, None if score is None else float(score), sha256, size)
        # A run that went back to an earlier epoch goes another way from there.
        kept = self._worth_keeping([*(old for old in listed if old.epoch < epoch), entry])
        self._write_index(kept)
        self._clean({entry.file for entry in kept})

    def latest(self) -> SavedState | None:
        """The newest checkpoint that is whole; None where none was ever finished.

        Raises:
            StorageError: some are listed and none of them is whole, or the store cannot be read.
            WeightsError: the file is as the index says, but holds more than tensors and values.
        """
        return self._first_whole(sorted(self._index(), key=lambda entry: -entry.epoch))

    def best(self) -> SavedState | None:
        """The checkpoint of the highest score (of equal ones the earliest) that is whole.

        None where none was saved with a score.

        Raises:
            StorageError: as for ``latest``.
            WeightsError: as for ``latest``.
        """
        return self._first_whole(_best_first(self._index()))

    def _worth_keeping(self, entries: Sequence[_Entry]) -> list[_Entry]:
        """The newest and the best of ``entries``, which are in the order of their epochs."""
        newest, best = entries[-self.keep :], _best_first(entries)[:1]
        return [entry for entry in entries if entry in newest or entry in best]

    def _write_index(self, entries: Sequence[_Entry]) -> None:
        index = {"version": INDEX_VERSION, "checkpoints": [asdict(entry) for entry in entries]}
        self.folder.child(INDEX_NAME).write_bytes(json.dumps(index, indent=1).encode())

    def _write(self, file: str, state: dict[str, Any]) -> tuple[str, int]:
        """Write the state whole under that name; its sha256 and bytes."""
        with self.folder.child(file).publishing() as stream:
            hashing = _HashingStream(stream)
            try:
                torch.save(state, cast(BinaryIO, hashing))
            except BaseException:
                # The writer of archives hides a full disk behind a complaint of its own.
                if hashing.fault is not None:
                    raise hashing.fault from None
                raise
        return hashing.digest.hexdigest(), hashing.size

    def _index(self) -> list[_Entry]:
        """The lines of the index in the order of their epochs; none where there is no index."""
        place = self.folder.child(INDEX_NAME)
        if place.kind() == "missing":
            return []
        try:
            return _parse_index(place.read_bytes())
        except OSError as fault:
            raise StorageError(f"cannot read {place}: {one_line(fault)}") from fault
        except (ValueError, TypeError, KeyError) as fault:
            raise StorageError(
                f"{place} is no index of checkpoints of version {INDEX_VERSION} "
                f"({one_line(fault, 120)}); start anew with --overwrite"
            ) from fault

    def _first_whole(self, entries: Sequence[_Entry]) -> SavedState | None:
        """The first of ``entries`` that can be used, with a warning if others come before it."""
        faults: list[str] = []
        for entry in entries:
            try:
                saved = self._load(entry)
            except _DamagedError as fault:
                faults.append(f"{entry.file} {fault}")
                continue
            if faults:
                reasons, epoch = ", ".join(faults), entry.epoch
                _logger.warning(
                    "damaged in %s: %s; going back to epoch %d", self.folder, reasons, epoch
                )
            return saved
        if faults:
            raise StorageError(
                f"no checkpoint in {self.folder} is whole: {', '.join(faults)}; bring the files "
                "back, or start anew with --overwrite"
            )
        return None

    def _load(self, entry: _Entry) -> SavedState:
        """The state of that line; what was checked is what is read, byte by byte."""
        place = self.folder.child(entry.file)
        try:
            with place.open() as stream, _on_this_machine(stream, place) as local:
                size = local.seek(0, os.SEEK_END)
                if size != entry.size:
                    raise _DamagedError(f"has {size} bytes of {entry.size}")
                local.seek(0)
                if hashlib.file_digest(cast(Any, local), "sha256").hexdigest() != entry.sha256:
                    raise _DamagedError("has not the sha256 it was written with")
                local.seek(0)
                return SavedState(entry.epoch, entry.score, _unpickle(local, place))
        except FileNotFoundError as fault:
            raise _DamagedError("is missing") from fault
        except OSError as fault:
            # A bad block will not heal. Anything else may: then an epoch must not be lost for it.
            if place.is_local and fault.errno == errno.EIO:
                raise _DamagedError(f"cannot be read ({one_line(fault)})") from fault
            raise StorageError(f"cannot read {place}: {one_line(fault)}") from fault

    def _clean(self, listed: set[str]) -> None:
        """Delete what the index does not list: replaced files, and what killed runs left."""
        selector = fs.FileSelector(self.folder.path, allow_not_found=True)
        try:
            for info in self.folder.filesystem.get_file_info(selector):
                name = info.base_name
                ours = name.startswith(_TEMPORARY) or _FILE.fullmatch(name) is not None
                if ours and name not in listed:
                    self.folder.child(name).delete()
        except (OSError, StorageError) as fault:
            # The checkpoint is safe; the next save tries again.
            _logger.warning("cannot clean up in %s: %s", self.folder, one_line(fault))


class _HashingStream:
    """Passes bytes on and hashes them on the way; remembers the fault of the store."""

    def __init__(self, stream: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self.fault: BaseException | None = None
        self._stream = stream

    def write(self, data: Any) -> int:
        """Write all of ``data``, whose memory may be gone afterwards."""
        try:
            self._stream.write(data)
        except BaseException as fault:
            self.fault = fault
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: whoever opened the stream closes it."""


def _best_first(entries: Sequence[_Entry]) -> list[_Entry]:
    """Those with a score, the highest first; of equal ones the earliest."""
    scored = [(entry.score, entry) for entry in entries if entry.score is not None]
    return [entry for _, entry in sorted(scored, key=lambda pair: (-pair[0], pair[1].epoch))]


def _free_name(epoch: int, taken: set[str]) -> str:
    """A name for the checkpoint of that epoch that is not in use."""
    name, number = f"epoch_{epoch:06d}.pt", 2
    while name in taken:
        name, number = f"epoch_{epoch:06d}_{number}.pt", number + 1
    return name


def _parse_index(content: bytes) -> list[_Entry]:
    """The lines of an index file.

    Raises:
        ValueError, TypeError, KeyError: it is none, or one of another version.
    """
    index = json.loads(content)
    if index["version"] != INDEX_VERSION:
        raise ValueError(f"version {index['version']}")
    entries = [_Entry(**line) for line in index["checkpoints"]]
    for entry in entries:
        # Names go into paths: only our own may.
        if not _FILE.fullmatch(entry.file):
            raise ValueError(f"file {entry.file!r}")
    return sorted(entries, key=lambda entry: entry.epoch)


def _require_plain(value: Any, path: str) -> None:
    """Raise ValueError where a load would refuse ``value`` or something in it.

    By exact type: numpy's numbers pass for Python's, and cannot be read back.
    """
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"keys of {path} must be strings or integers, got {key!r}")
            _require_plain(inner, f"{path}[{key!r}]")
    elif type(value) in (list, tuple):
        for position, inner in enumerate(value):
            _require_plain(inner, f"{path}[{position}]")
    elif type(value) not in _PLAIN:
        raise ValueError(
            f"{path} must be a tensor, number, string, None, or a dict, list or tuple of them, "
            f"got {type(value).__module__}.{type(value).__qualname__}"
        )


def _on_this_machine(stream: IO[bytes], place: Location) -> IO[bytes]:
    """The stream itself, or a nameless file with its bytes where they come from a bucket."""
    if place.is_local:
        return stream
    local = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    try:
        while chunk := stream.read(_CHUNK):
            local.write(chunk)
    except BaseException:
        local.close()
        raise
    return local


def _unpickle(stream: IO[bytes], place: Location) -> dict[str, Any]:
    """The dict in a file that ``save`` wrote; nothing in it is run.

    Raises:
        WeightsError: it holds something else, so ``save`` did not write it.
    """
    try:
        state = torch.load(stream, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as fault:
        raise WeightsError(
            f"{place} holds more than tensors and plain values ({one_line(fault, 120)}); nothing "
            "in it was run. Do not trust this folder; start anew with --overwrite"
        ) from fault
    except Exception as fault:  # the unpickler passes on whatever odd bytes bring about
        raise WeightsError(
            f"{place} is no checkpoint ({type(fault).__name__}: {one_line(fault, 120)}); "
            "start anew with --overwrite"
        ) from fault
    if not isinstance(state, dict):
        raise WeightsError(f"{place} must hold a dict, got {type(state).__name__}")
    return state
