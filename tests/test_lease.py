"""One writer per output: a living holder is respected, a dead one is not waited for."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import lease as lease_module
from pipeline.errors import StorageError
from pipeline.lease import Lease
from pipeline.storage import Location

HOLD = """
import sys, time
from pipeline.lease import Lease
from pipeline.storage import Location
with Lease(Location.parse(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return Location.parse(str(tmp_path))


def rewrite(folder: Location, **changes: Any) -> None:
    place = folder.child("_lease.json")
    place.write_bytes(json.dumps({**json.loads(place.read_bytes()), **changes}).encode())


def holder(folder: Location) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder.path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_job_is_refused_and_told_who_holds_it(folder: Location) -> None:
    process = holder(folder)
    try:
        with (
            pytest.raises(StorageError, match=f"in use by process {process.pid} on .*wait for it"),
            Lease(folder),
        ):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_killed_holder_is_replaced_at_once(folder: Location) -> None:
    process = holder(folder)
    process.kill()
    process.wait()
    with Lease(folder) as lease:
        lease.check()


def test_the_lease_is_gone_afterwards(folder: Location) -> None:
    with Lease(folder):
        assert folder.names() == ["_lease.json"]
    assert folder.names() == []


def test_a_process_that_took_over_a_dead_holders_number_is_not_the_holder(folder: Location) -> None:
    with Lease(folder):
        rewrite(folder, process_started=1.0)
        with Lease(folder) as second:
            second.check()


@pytest.mark.parametrize(("age", "refused"), [(5, True), (3600, False)])
def test_a_holder_on_another_machine_is_believed_until_it_expires(
    folder: Location, age: int, refused: bool
) -> None:
    with Lease(folder):
        rewrite(folder, host="elsewhere/boot", renewed=time.time() - age)
        if refused:
            with pytest.raises(StorageError, match="on elsewhere"), Lease(folder):
                pass
        else:
            with Lease(folder):
                pass


def test_a_holder_that_lost_its_lease_is_stopped(
    folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.05)
    with Lease(folder) as lease:
        rewrite(folder, token="another")
        time.sleep(1.0)
        with pytest.raises(StorageError, match="took the output over"):
            lease.check()
    # The other's lease is not removed by the loser's exit.
    assert folder.names() == ["_lease.json"]


def test_the_lease_is_renewed(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.05)
    with Lease(folder):
        rewrite(folder, renewed=0.0)
        deadline = time.monotonic() + 5
        while json.loads(folder.child("_lease.json").read_bytes())["renewed"] == 0.0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
