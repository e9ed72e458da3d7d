"""Downloads against a server on this machine: no test asks the real network."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from pipeline.errors import WeightsError
from pipeline.models import hub
from pipeline.models.backbones import load_weights

CONTENT = b"weights" * 1000
DINO = "vit_small_patch16_224.dino"


class Server(BaseHTTPRequestHandler):
    """Speaks as much of the hub's language as a download needs; counts what it is asked."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.asked.append(self.path)
        known = self.path.endswith(("/model.bin", "pytorch_model.bin", "/cut.pth"))
        self.send_response(200 if known else 404)
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "a" * 40)
        if not known:
            self.send_header("X-Error-Code", "EntryNotFound")
        body = CONTENT if known else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[:100] if "/cut.pth" in self.path else body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A server on this machine that is the hub, with empty caches; its address."""
    monkeypatch.setattr(Server, "asked", [], raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as listener:
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.server_address[1]}"
        use_hub(monkeypatch, address, tmp_path)
        yield address
        listener.shutdown()
        thread.join()


@pytest.fixture
def swallowing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An address that takes connections and never answers, as the hub."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        use_hub(monkeypatch, address, tmp_path)
        monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.5)
        yield address


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache / "torch"))


def test_a_hub_file_is_fetched_once_and_then_taken_from_the_cache(server: str) -> None:
    for _ in range(2):
        path = hub.fetch_from_hub("net", "owner/net", None)
        # There is no model.safetensors: the pickled file is the second choice.
        assert path.name == "pytorch_model.bin"
        assert path.read_bytes() == CONTENT
        asked, Server.asked[:] = list(Server.asked), []
    assert not asked


def test_a_named_hub_file_is_the_only_one_asked_for(server: str) -> None:
    assert hub.fetch_from_hub("net", "owner/net", "model.bin").read_bytes() == CONTENT
    assert {path.rsplit("/", 1)[-1] for path in Server.asked} == {"model.bin"}
    with pytest.raises(WeightsError, match=r"owner/net on the hub holds none of other\.bin"):
        hub.fetch_from_hub("net", "owner/net", "other.bin")


def test_a_file_is_fetched_once_and_then_taken_from_the_cache(server: str) -> None:
    for _ in range(2):
        path = hub.fetch_url("net", f"{server}/model.bin")
        assert path.read_bytes() == CONTENT
    assert Server.asked == ["/model.bin"]


@pytest.mark.parametrize(
    ("file", "reason"), [("cut.pth", "only 100 of 7000 bytes arrived"), ("none.pth", "404")]
)
def test_a_download_that_fails_leaves_nothing_behind(
    server: str, tmp_path: Path, file: str, reason: str
) -> None:
    with pytest.raises(WeightsError, match=rf"net cannot be fetched .*{reason}.*--backbone.check"):
        hub.fetch_url("net", f"{server}/{file}")
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]


def test_a_server_that_never_answers_is_given_up_within_seconds(swallowing: str) -> None:
    start = time.monotonic()
    with pytest.raises(WeightsError, match=r"no answer within 0\.5 s"):
        hub.fetch_url("net", f"{swallowing}/model.bin")
    with pytest.raises(WeightsError, match=f"weights of {DINO} cannot be fetched") as caught:
        load_weights(DINO, None)
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_a_name_server_that_hangs_is_given_up_within_seconds(
    swallowing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    # No socket's timeout covers this part of a connection.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: done.wait(60))
    start = time.monotonic()
    for name in (DINO, "resnet50.dino"):
        with pytest.raises(WeightsError, match=r"no answer within 0\.5 s"):
            load_weights(name, None)
    done.set()
    assert time.monotonic() - start < 10


def test_an_address_nobody_listens_at_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as reserved:  # bound but not listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        use_hub(monkeypatch, f"http://127.0.0.1:{reserved.getsockname()[1]}", tmp_path)
        start = time.monotonic()
        with pytest.raises(WeightsError, match=r"timm/vit_small_patch16_224\.dino on the hub"):
            load_weights(DINO, None)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "name", [DINO, "vit_small_patch8_224.dino_300ep", "resnet50.dino", "vgg16.tv_in1k"]
)
def test_offline_mode_asks_nobody(server: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert huggingface_hub.is_offline_mode()
    with pytest.raises(WeightsError, match=rf"weights of {name} .*[oO][fF][fF].*--backbone.check"):
        load_weights(name, None)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        hub.fetch_url("net", f"{server}/model.bin")
    assert not Server.asked
