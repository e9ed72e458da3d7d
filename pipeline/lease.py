"""One writer per output folder: a lease that its holder renews and a dead holder loses.

The lease is a small JSON file. On one machine a holder is alive while its process is; a holder on
another machine is believed until it has not renewed for ``EXPIRY_SECONDS``. Object stores have no
atomic create through Arrow, so there a new holder waits and reads back who won.
"""

import json
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import psutil

from pipeline.errors import StorageError
from pipeline.storage import Location

RENEW_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
# Long enough for two rivals' writes to settle, so that both read the same winner.
SETTLE_SECONDS = {"local": 0.2, "remote": 2.0}


@dataclass
class Lease:
    """Exclusive use of ``folder`` between ``with`` and its end.

    Raises:
        StorageError: on entry, someone else holds it; ``check`` raises when it was lost since.
    """

    folder: Location
    _token: str = field(default_factory=lambda: uuid.uuid4().hex)
    _since: float = field(default_factory=time.time)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lost: str | None = None

    @property
    def _place(self) -> Location:
        return self.folder.child("_lease.json")

    def __enter__(self) -> "Lease":
        if not self._place.create_exclusively(self._content()):
            holder = self._read()
            if holder is not None and _is_alive(holder):
                raise StorageError(f"{self.folder} is in use by {_describe(holder)}")
            self._place.delete()
            self._place.create_exclusively(self._content())
        time.sleep(SETTLE_SECONDS["local" if self.folder.is_local else "remote"])
        winner = self._read()
        if winner is None or winner["token"] != self._token:
            who = _describe(winner) if winner else "another job"
            raise StorageError(f"{self.folder} is in use by {who}")
        threading.Thread(target=self._renew, name="lease", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        holder = self._read()
        if holder is not None and holder["token"] == self._token:
            self._place.delete()

    def check(self) -> None:
        """Raise a StorageError if the lease was lost (a long pause, and someone took over)."""
        if self._lost is not None:
            raise StorageError(f"{self.folder}: {self._lost}; this job stops so as not to spoil it")

    def _renew(self) -> None:
        renewed = time.time()
        while not self._stop.wait(RENEW_SECONDS):
            try:
                holder = self._read()
                if holder is None or holder["token"] != self._token:
                    self._lost = "another job took the output over"
                    return
                self._place.write_bytes(self._content())
                renewed = time.time()
            except StorageError as fault:
                # A short outage of the store is not worth dying for; past the expiry it is.
                if not _is_fresh(renewed):
                    self._lost = f"the lease cannot be renewed ({fault})"
                    return

    def _content(self) -> bytes:
        process = psutil.Process()
        return json.dumps(
            {
                "token": self._token,
                "host": _host(),
                "pid": process.pid,
                "process_started": process.create_time(),
                "since": self._since,
                "renewed": time.time(),
            }
        ).encode()

    def _read(self) -> dict[str, Any] | None:
        """The present holder; None where there is none or a half-written one of a dying disk."""
        try:
            holder = json.loads(self._place.read_bytes())
        except (OSError, json.JSONDecodeError):
            return None
        return holder if isinstance(holder, dict) and "token" in holder else None


def _is_fresh(renewed: float) -> bool:
    return time.time() - renewed < EXPIRY_SECONDS


def _is_alive(holder: dict[str, Any]) -> bool:
    if holder["host"] != _host():
        return _is_fresh(holder["renewed"])
    try:
        started = psutil.Process(holder["pid"]).create_time()
    except psutil.NoSuchProcess:
        return False
    # The same number may by now be another process.
    return abs(started - float(holder["process_started"])) < 1.0


def _host() -> str:
    """This machine's name; with the boot's id, because containers may share a name."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()}/{boot}"


def _describe(holder: dict[str, Any]) -> str:
    minutes = (time.time() - holder["since"]) / 60
    age = time.time() - holder["renewed"]
    host = str(holder["host"]).partition("/")[0]
    return (
        f"process {holder['pid']} on {host} (for {minutes:.1f} min, last sign {age:.0f} s ago); "
        "wait for it, stop it, or choose another --output"
    )
