"""The store of checkpoints: what is kept, what is damaged, what is refused."""

import json
import os
import pickle
import random
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import StorageError, WeightsError
from pipeline.storage import Location
from pipeline.training.checkpoints import INDEX_NAME
from tests.training.saved_states import (
    assert_is,
    epochs_on_disk,
    flip_a_byte,
    listed,
    state_of,
    store_in,
)


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
