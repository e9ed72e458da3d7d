"""Published weights as local files: from the caches of this machine, else from the network.

What is cached is used without asking anybody. Where a server is not reachable the answer comes
within seconds, in one line that names the way out. ``HF_HUB_OFFLINE=1`` forbids all network.
"""

import logging
import os
import threading
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import huggingface_hub
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from pipeline.errors import WeightsError, one_line

# Seconds within which a server must answer at all; a download may then take as long as it moves.
ANSWER_SECONDS = 10.0
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_CHUNK = 1 << 20
_CHECKPOINT_FLAG = "--backbone.checkpoint FILE (training: --model.checkpoint FILE)"
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def fetch_from_hub(name: str, repository: str, filename: str | None) -> Path:
    """The hub repository's file of weights, in huggingface_hub's cache.

    Args:
        name: The network, for the message.
        repository: ``owner/name`` on the hub.
        filename: The file in it; None takes model.safetensors, else pytorch_model.bin.

    Raises:
        WeightsError: the hub cannot be reached, or has no such repository or file.
    """
    filenames = (filename,) if filename else _HUB_FILES
    for candidate in filenames:
        cached = _cached_from_hub(repository, candidate)
        if cached is not None:
            return cached
    for candidate in filenames:
        try:
            return _download_from_hub(repository, candidate)
        except RemoteEntryNotFoundError:
            continue
        except Exception as fault:  # the faults of the hub's HTTP client share no other base
            raise _unreachable(name, f"{repository} on the hub", fault) from fault
    raise WeightsError(
        f"{repository} on the hub holds none of {', '.join(filenames)}; "
        f"give the weights of {name} with {_CHECKPOINT_FLAG}"
    )


def fetch_url(name: str, url: str) -> Path:
    """The file behind the address, in torch's cache.

    Args:
        name: The network, for the message.
        url: An address that ends in the file's name.

    Raises:
        WeightsError: the file cannot be fetched, or the cache cannot be written.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    try:
        if huggingface_hub.is_offline_mode():
            raise ConnectionError("HF_HUB_OFFLINE is set")
        _logger.info("fetching %s", url)
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(url, path)
    except OSError as fault:  # among them: URLError, timeouts, a full disk
        raise _unreachable(name, url, fault) from fault
    return path


def _cached_from_hub(repository: str, filename: str) -> Path | None:
    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _download_from_hub(repository: str, filename: str) -> Path:
    """Ask once whether the file is there, then download it.

    huggingface_hub alone takes 23 seconds and six warnings to notice that there is no network, and
    minutes where packets are swallowed.
    """
    url = huggingface_hub.hf_hub_url(repository, filename)
    _answer_within(
        ANSWER_SECONDS,
        lambda: huggingface_hub.get_hf_file_metadata(url, timeout=ANSWER_SECONDS),
    )
    _logger.info("fetching %s of %s from the hub", filename, repository)
    return Path(huggingface_hub.hf_hub_download(repository, filename))


def _download(url: str, path: Path) -> None:
    """Write what is behind ``url`` to ``path``, whole or not at all."""
    answer = _answer_within(
        ANSWER_SECONDS, lambda: urllib.request.urlopen(url, timeout=ANSWER_SECONDS)
    )
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        with answer, temporary.open("wb") as stream:
            while chunk := answer.read(_CHUNK):
                stream.write(chunk)
            announced = answer.headers.get("Content-Length")
            # urllib does not complain where a connection ends early.
            if announced is not None and stream.tell() != int(announced):
                raise ConnectionError(f"only {stream.tell()} of {announced} bytes arrived")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _answer_within(seconds: float, action: Callable[[], _T]) -> _T:
    """What ``action`` returns or raises; TimeoutError when it takes longer.

    Timeouts of sockets count per address and leave out the name's resolution, so that a swallowed
    connection takes minutes; a thread that may be left behind is the one bound that holds.
    """
    answer: Future[_T] = Future()

    def ask() -> None:
        try:
            answer.set_result(action())
        except BaseException as fault:
            answer.set_exception(fault)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(timeout=seconds)
    except TimeoutError as fault:
        raise TimeoutError(f"no answer within {seconds:g} s") from fault


def _unreachable(name: str, place: str, fault: BaseException) -> WeightsError:
    return WeightsError(
        f"weights of {name} cannot be fetched from {place} ({one_line(fault, 120)}); "
        f"give a local file with {_CHECKPOINT_FLAG}"
    )
