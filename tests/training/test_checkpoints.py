"""The store of checkpoints: real files, a real S3 server, real kills and a disk that is full."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import StorageError, WeightsError
from pipeline.storage import Location
from pipeline.training.checkpoints import INDEX_NAME, CheckpointStore, SavedState
from tests.conftest import ROOT


def store_in(folder: Path | str, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(Location.parse(str(folder)), keep=keep)


def state_of(epoch: int, *, size: int = 1000) -> dict[str, Any]:
    """What only this epoch has."""
    return {"weights": torch.full((size,), float(epoch)), "epoch": epoch}


def assert_is(saved: SavedState | None, epoch: int, score: float | None) -> None:
    assert saved is not None
    assert (saved.epoch, saved.score, saved.state["epoch"]) == (epoch, score, epoch)
    assert saved.state["weights"].eq(epoch).all()


def epochs_on_disk(folder: Path) -> list[int]:
    return sorted(int(place.stem.split("_")[1]) for place in folder.glob("epoch_*.pt"))


def listed(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / INDEX_NAME).read_text())["checkpoints"]
    return found


def flip_a_byte(place: Path) -> None:
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)


def test_what_is_saved_comes_back_on_the_cpu_with_its_types(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": [torch.get_rng_state(), torch.Generator().get_state()],
        "python": random.getstate(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "run": {"name": "π", "id": None, "done": False, "bytes": b"\0\xff", "seed": 1 << 70},
    }
    store_in(tmp_path / "new" / "folder").save(0, state, score=0.5)
    saved = store_in(tmp_path / "new" / "folder").latest()
    assert saved is not None
    assert isinstance(saved.state["network"], OrderedDict)
    for name, tensor in network.state_dict().items():
        assert torch.equal(saved.state["network"][name], tensor)
    again = torch.optim.AdamW(network.parameters(), lr=9.0)
    again.load_state_dict(saved.state["optimizer"])
    assert again.param_groups[0]["lr"] == 1e-3
    assert torch.equal(saved.state["rng"][0], torch.get_rng_state())
    assert saved.state["python"] == random.getstate()
    assert saved.state["half"].dtype == torch.bfloat16
    assert saved.state["run"] == state["run"]


def test_a_new_folder_has_neither_latest_nor_best(tmp_path: Path) -> None:
    assert store_in(tmp_path / "none").latest() is None
    assert store_in(tmp_path).best() is None


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for epoch, score in enumerate([0.1, 0.7, 0.2, 0.7, 0.3]):
        store.save(epoch, state_of(epoch), score=score)
        assert_is(store.latest(), epoch, score)
    # The earlier of the two that scored 0.7.
    assert_is(store.best(), 1, 0.7)
    assert epochs_on_disk(tmp_path) == [1, 3, 4]
    assert [entry["epoch"] for entry in listed(tmp_path)] == [1, 3, 4]
    assert {place.name for place in tmp_path.iterdir()} == {
        INDEX_NAME,
        *(f"epoch_{epoch:06d}.pt" for epoch in (1, 3, 4)),
    }


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_counts_the_newest(tmp_path: Path, keep: int) -> None:
    store = store_in(tmp_path, keep)
    for epoch in range(5):
        store.save(epoch, state_of(epoch), score=None)
    assert epochs_on_disk(tmp_path) == list(range(5))[-keep:]
    assert store.best() is None


def test_epochs_without_a_score_are_never_the_best(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for epoch, score in enumerate([None, -3.0, None, -4.0]):
        store.save(epoch, state_of(epoch), score=score)
    assert_is(store.best(), 1, -3.0)


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "deleted", "replaced"])
def test_a_damaged_newest_gives_the_one_before_and_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_in(tmp_path)
    store.save(6, state_of(6), score=0.2)
    store.save(7, state_of(7), score=0.1)
    newest = tmp_path / "epoch_000007.pt"
    if damage == "flipped":
        flip_a_byte(newest)
    elif damage == "cut":
        os.truncate(newest, newest.stat().st_size - 1)
    elif damage == "emptied":
        newest.write_bytes(b"")
    elif damage == "deleted":
        newest.unlink()
    else:
        # A whole and honest checkpoint, but not the one the index lists.
        shutil.copy(tmp_path / "epoch_000006.pt", newest)
    assert_is(store.latest(), 6, 0.2)
    (warning,) = caplog.messages
    assert warning.startswith(f"damaged in {tmp_path}: epoch_000007.pt ")
    assert warning.endswith("; going back to epoch 6")


def test_a_damaged_best_gives_the_next_best(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for epoch, score in enumerate([0.9, 0.1, 0.2]):
        store.save(epoch, state_of(epoch), score=score)
    flip_a_byte(tmp_path / "epoch_000000.pt")
    assert_is(store.best(), 2, 0.2)


def test_nothing_whole_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for epoch in range(2):
        store.save(epoch, state_of(epoch), score=None)
        flip_a_byte(tmp_path / f"epoch_{epoch:06d}.pt")
    with pytest.raises(StorageError, match=r"epoch_000001.pt has not .*, .* --overwrite") as caught:
        store.latest()
    assert "\n" not in str(caught.value)


def test_a_file_the_index_does_not_list_is_no_checkpoint(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    torch.save(state_of(3), tmp_path / "epoch_000003.pt")
    assert store.latest() is None
    store.save(1, state_of(1), score=None)
    assert_is(store.latest(), 1, None)
    # And what a killed run left goes, what is not ours stays.
    assert epochs_on_disk(tmp_path) == [1]


def test_leftovers_of_a_kill_are_cleaned_and_other_files_are_not(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123").write_bytes(b"half")
    (tmp_path / "epoch_000000_2.pt").write_bytes(b"unlisted")
    others = {"notes.txt", "epoch_best.pt", ".hidden"}
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "epochs").mkdir()
    store_in(tmp_path).save(4, state_of(4), score=None)
    names = {place.name for place in tmp_path.iterdir()}
    assert names == {*others, "epochs", INDEX_NAME, "epoch_000004.pt"}


def test_a_run_that_went_back_takes_back_the_epochs_after(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=3)
    for epoch in range(4):
        store.save(epoch, state_of(epoch), score=float(epoch))
    store.save(2, state_of(2), score=-1.0)
    assert_is(store.latest(), 2, -1.0)
    assert_is(store.best(), 1, 1.0)
    assert epochs_on_disk(tmp_path) == [1, 2]


def test_saving_an_epoch_again_leaves_the_old_file_until_the_index_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path, keep=1)
    store.save(5, state_of(5), score=None)

    def die(place: Location, data: bytes) -> None:
        raise KeyboardInterrupt

    again = {**state_of(5), "second": True}
    with monkeypatch.context() as patch:
        patch.setattr(Location, "write_bytes", die)
        with pytest.raises(KeyboardInterrupt):
            store.save(5, again, score=None)
    saved = store.latest()
    assert_is(saved, 5, None)
    assert saved is not None
    assert "second" not in saved.state
    store.save(5, again, score=None)
    saved = store.latest()
    assert saved is not None
    assert saved.state["second"]
    assert len(list(tmp_path.glob("epoch_*.pt"))) == 1


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def list_as_whole(folder: Path, epoch: int) -> None:
    """Make the index vouch for the file as it is, as an attacker would."""
    from pipeline.models.checkpoints import file_sha256

    place = folder / f"epoch_{epoch:06d}.pt"
    size, sha256 = place.stat().st_size, file_sha256(place)
    line = {"epoch": epoch, "file": place.name, "score": None, "sha256": sha256, "size": size}
    content = {"version": 1, "checkpoints": [line]}
    (folder / INDEX_NAME).write_text(json.dumps(content))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, zipped: bool) -> None:
    place = tmp_path / "epoch_000003.pt"
    torch.save({"x": Malicious(tmp_path / "canary")}, place, _use_new_zipfile_serialization=zipped)
    list_as_whole(tmp_path, 3)
    with pytest.raises(WeightsError, match="nothing in it was run") as caught:
        store_in(tmp_path).latest()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1])])
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "epoch_000003.pt").write_bytes(content)
    list_as_whole(tmp_path, 3)
    with pytest.raises(WeightsError, match=r"epoch_000003\.pt") as caught:
        store_in(tmp_path).latest()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 2, "checkpoints": []}',
        '{"version": 1, "checkpoints": [{"epoch": 1}]}',
        '{"version": 1, "checkpoints": [{"epoch": 1, "file": "../epoch_000001.pt", "score": null, '
        '"sha256": "", "size": 1}]}',
    ],
)
def test_a_damaged_index_is_an_error_and_is_not_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_NAME).write_text(content)
    for act in (store_in(tmp_path).latest, lambda: store_in(tmp_path).save(0, {}, score=None)):
        with pytest.raises(StorageError, match="no index of checkpoints of version 1") as caught:
            act()
        assert "--overwrite" in str(caught.value)
    assert (tmp_path / INDEX_NAME).read_text() == content


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.float64(0.5), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (Path("x"), "pathlib.PosixPath"),
        ({1, 2}, "builtins.set"),
        (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU"),
    ],
)
def test_what_a_load_would_refuse_is_refused_by_the_save(
    tmp_path: Path, value: Any, found: str
) -> None:
    with pytest.raises(ValueError, match=rf"state\['a'\]\[1\] must be .*, got {found}"):
        store_in(tmp_path).save(0, {"a": [0, value]}, score=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("epoch", "score"), [(-1, 0.0), (0, float("nan")), (0, float("inf"))])
def test_epochs_and_scores_that_do_not_compare_are_refused(
    tmp_path: Path, epoch: int, score: float
) -> None:
    with pytest.raises(ValueError, match="epoch must be >= 0 and score finite"):
        store_in(tmp_path).save(epoch, {}, score=score)


def test_keep_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        store_in(tmp_path, keep=0)


def test_a_checkpoint_that_may_not_be_read_is_no_reason_to_lose_an_epoch(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for epoch in range(2):
        store.save(epoch, state_of(epoch), score=None)
    (tmp_path / "epoch_000001.pt").unlink()
    (tmp_path / "epoch_000001.pt").mkdir()
    with pytest.raises(StorageError, match=r"cannot read .*epoch_000001.pt: .*Is a directory"):
        store.latest()


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine mounts nothing: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


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
    module, call = "tests.training.test_checkpoints", "cut_short_at_every_line(Path(sys.argv[1]))"
    code = f"import sys; from pathlib import Path; from {module} import *; {call}"
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
