"""Checkpoints on full disks, under real kills, short of memory and on a real S3 server."""

import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from pipeline.errors import StorageError
from pipeline.storage import Location
from pipeline.training.checkpoints import INDEX_NAME
from tests.conftest import ROOT
from tests.training.saved_states import (
    assert_is,
    state_of,
    store_in,
)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond that, as if the disk were full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# In the archive's header, in a small record, in the middle of a tensor, in the last bytes.
@pytest.mark.parametrize("size", [0, 100, 1000, 200_000, 400_900])
def test_a_full_disk_is_a_storage_error_and_the_one_before_stays(tmp_path: Path, size: int) -> None:
    store = store_in(tmp_path, keep=1)
    store.save(0, state_of(0, size=100_000), score=0.1)
    before = {place.name: place.read_bytes() for place in tmp_path.iterdir()}
    assert size < len(before["epoch_000000.pt"])
    with files_of_at_most(size), pytest.raises(StorageError, match="File too large") as caught:
        store.save(1, state_of(1, size=100_000), score=0.2)
    assert "\n" not in str(caught.value)
    assert {place.name: place.read_bytes() for place in tmp_path.iterdir()} == before
    assert_is(store.latest(), 0, 0.1)
    store.save(1, state_of(1, size=100_000), score=0.2)
    assert_is(store.latest(), 1, 0.2)


def test_a_disk_with_room_for_one_keeps_the_first(small_disk: Path) -> None:
    store = store_in(small_disk, keep=1)
    store.save(0, state_of(0, size=20_000), score=None)
    with pytest.raises(StorageError, match=r"cannot write .*epoch_000001.pt: .*No space left"):
        store.save(1, state_of(1, size=20_000), score=None)
    assert_is(store.latest(), 0, None)
    assert {place.name for place in small_disk.iterdir()} == {INDEX_NAME, "epoch_000000.pt"}


def save_for_ever(folder: Path, diary: Path) -> None:
    """Save epoch after epoch, noting each that is sure; sometimes one twice, as after a resume."""
    torch.set_num_threads(1)
    store = store_in(folder, keep=1)
    saved = store.latest()
    with diary.open("ab", buffering=0) as notes:
        for epoch in range(0 if saved is None else saved.epoch + 1, 1_000_000):
            for _ in range(1 + (epoch % 5 == 4)):
                store.save(epoch, state_of(epoch, size=400_000), score=None)
                notes.write(f"{epoch}\n".encode())


def last_noted(diary: Path) -> int:
    lines = diary.read_text().splitlines() if diary.exists() else []
    return int(lines[-1]) if lines else -1


@pytest.mark.slow
def test_whenever_the_process_is_killed_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    # Its children are real processes, but have imported torch before they start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.training.checkpoints", __name__])
    chance = random.Random(0)
    folder, diary, in_the_middle = tmp_path / "checkpoints", tmp_path / "diary", 0
    for _ in range(40):
        before = last_noted(diary)
        process = context.Process(target=save_for_ever, args=(folder, diary))
        process.start()
        while last_noted(diary) == before and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left = {place.name for place in folder.iterdir()}
        in_the_middle += len(left) > 2
        # As the kill left it: no cleaning has helped.
        saved = store_in(folder).latest()
        assert saved is not None
        assert_is(saved, saved.epoch, None)
        assert saved.epoch >= last_noted(diary)
    assert in_the_middle > 5, "the kills came between the saves and show nothing"
    store_in(folder, keep=1).save(1_000_000, state_of(1_000_000), score=None)
    assert len(list(folder.iterdir())) == 2


def die_at_line(number: int) -> None:
    """End this process, cleaning up nothing, at the n-th line of ours that it reaches."""
    ours, reached = ("training/checkpoints.py", "pipeline/storage.py"), 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal reached
        # What only looks at the state, or passes on a piece of it, leaves the folder as it is.
        dull = frame.f_code.co_name in ("_require_plain", "write", "flush")
        if dull or not frame.f_code.co_filename.endswith(ours):
            return None
        if event == "line":
            reached += 1
            if reached == number:
                os._exit(9)
        return trace

    sys.settrace(trace)


def save_until_line(folder: Path, number: int) -> None:
    """Epoch 5 again while it is listed, then epoch 6; one is kept."""
    store = store_in(folder, keep=1)
    die_at_line(number)
    store.save(5, {**state_of(5, size=10), "again": True}, score=None)
    store.save(6, state_of(6, size=10), score=None)
    os._exit(0)


def cut_short_at_every_line(folder: Path) -> None:
    """Print, line after line, at which epoch and in which state a killed process left a folder."""
    store_in(folder / "before").save(5, state_of(5, size=10), score=None)
    status, number = 9, 0
    while status == 9:
        number += 1
        shutil.copytree(folder / "before", folder / str(number))
        child = os.fork()
        if child == 0:
            save_until_line(folder / str(number), number)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        saved = store_in(folder / str(number)).latest()
        assert saved is not None
        print(saved.epoch, "again" in saved.state)
    assert status == 0


@pytest.mark.slow
def test_at_whatever_line_a_save_is_cut_short_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    call = "cut_short_at_every_line(Path(sys.argv[1]))"
    code = f"import sys; from pathlib import Path; from {__name__} import *; {call}"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    left = done.stdout.splitlines()
    # In this order, and from the second save on never epoch 5 as it was at first.
    assert [state for state, _ in itertools.groupby(left)] == ["5 False", "5 True", "6 False"]
    assert len(left) > 100


MEASURES_MEMORY = """
import resource, sys, torch
from pipeline.storage import Location
from pipeline.training.checkpoints import CheckpointStore

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
store = CheckpointStore(Location.parse(sys.argv[1]))
store.save(0, {"weights": torch.ones(10)}, score=None)
state = {f"layer{n}": torch.ones(25 << 18) for n in range(6)}
before = peak()
store.save(1, state, score=None)
saving = peak() - before
del state
saved = store.latest()
print(saving, peak() - before)
"""


@pytest.mark.slow
def test_150_mb_take_little_memory_besides_themselves(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURES_MEMORY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    saving, loading = map(float, done.stdout.split())
    assert (tmp_path / "epoch_000001.pt").stat().st_size > 150e6
    assert saving < 40
    # What was saved is gone by then, and what is loaded takes its place.
    assert loading < 60


def test_a_bucket_is_as_good_as_a_disk(s3_bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    store = store_in(f"{s3_bucket}/runs/one/checkpoints")
    assert store.latest() is None
    for epoch, score in enumerate([0.3, 0.9, 0.2, 0.1]):
        store.save(epoch, state_of(epoch), score=score)
    assert_is(store.latest(), 3, 0.1)
    assert_is(store.best(), 1, 0.9)
    names = ["checkpoints.json", "epoch_000001.pt", "epoch_000002.pt", "epoch_000003.pt"]
    assert store.folder.names() == names
    newest = store.folder.child("epoch_000003.pt")
    newest.write_bytes(newest.read_bytes()[:-1])
    assert_is(store.latest(), 2, 0.2)
    newest.delete()
    assert_is(store.latest(), 2, 0.2)
    assert ["is missing" in message for message in caplog.messages if "damaged" in message] == [
        False,
        True,
    ]
    store.folder.child(".tmp-0123").write_bytes(b"half")
    store.save(3, state_of(3), score=None)
    assert store.folder.child(".tmp-0123").kind() == "missing"


@pytest.mark.slow
def test_a_bucket_takes_a_checkpoint_of_many_parts(s3_bucket: str) -> None:
    store = store_in(f"{s3_bucket}/runs/big")
    store.save(0, state_of(0, size=8_000_000), score=None)
    assert_is(store.latest(), 0, None)


def test_a_bucket_out_of_reach_is_no_damage(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(f"{s3_bucket}/runs/two")
    store.save(0, state_of(0), score=None)

    def fail(place: Location) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(Location, "open", fail)
    with pytest.raises(StorageError, match=r"cannot read s3://.*NETWORK_CONNECTION") as caught:
        store.latest()
    assert "--overwrite" not in str(caught.value)
