"""What every test may ask for.

Heavy libraries are imported where they are used: every test run loads this file.
"""

import os
import secrets
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.training.two_workers import TwoWorkers

ReadGolden: TypeAlias = "Callable[[str], dict[str, NDArray[Any]]]"

ROOT = Path(__file__).parent.parent


def pytest_configure() -> None:
    """One token for every Ray of the tests and all who join one: each process reads it once."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs first, as they take longest: no process is then left alone with one at the end."""
    items.sort(key=lambda item: "jobs" not in item.path.parts)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden outputs, real photos and weights beside the repository; users do not have them."""
    folder = Path(os.environ.get("PATCHSEED_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(
            f"{folder} is absent: golden data and real photos are not part of the repository"
        )
    return folder


@pytest.fixture(scope="session")
def read_golden(shared: Path) -> "ReadGolden":
    """The arrays of a file of golden outputs, by its name."""
    import numpy as np

    def read(name: str) -> "dict[str, NDArray[Any]]":
        with np.load(shared / "golden" / name, allow_pickle=False) as file:
            return dict(file)

    return read


@pytest.fixture(scope="session")
def vit_tiny_weights(shared: Path) -> Path:
    """Real (supervised) ViT-Ti/16 weights."""
    return shared / "weights" / "vit_tiny_patch16_224_in1k_supervised.safetensors"


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT-Ti/16 as it is before any training, in timm's names."""
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    path = tmp_path_factory.mktemp("weights") / "vit_tiny.safetensors"
    save_file(network.state_dict(), path)
    return path


RAY_HEAD = """
import os, sys
from ray.cluster_utils import Cluster
# Unlike ray.init, it lets one choose the port of the agent that runs jobs: 0 is any that is free,
# as there may be several Rays on a machine.
args = {"num_cpus": os.cpu_count(), "dashboard_agent_listen_port": 0, "include_dashboard": False}
if sys.argv[1] == "True":
    args |= {"include_dashboard": True, "dashboard_port": 0}
cluster = Cluster(initialize_head=True, head_node_args=args)
print(cluster.address, cluster.head_node.webui_url, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def ray_head(*, dashboard: bool) -> Iterator[tuple[str, str]]:
    """A Ray of this machine, in a process of its own: its address, and its dashboard's."""
    # As a job's own local Ray has them: workers inherit them.
    told = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    told |= {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    process = subprocess.Popen(
        [sys.executable, "-c", RAY_HEAD, str(dashboard)],
        cwd=ROOT,
        env={**os.environ, **told, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    address, _, page = process.stdout.readline().strip().partition(" ")
    assert address, "Ray did not start"
    try:
        yield address, page
    finally:
        process.stdin.close()
        process.wait(timeout=60)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray that lasts as long as the tests; jobs join it by ``RAY_ADDRESS``.

    A job that joins it also leaves it, and its actors end, so that the next one finds all cores
    free.
    """
    with ray_head(dashboard=False) as (address, _):
        yield address


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[TwoWorkers]":
    """Two real processes of one gloo group."""
    from tests.training.two_workers import two_workers

    with two_workers(tmp_path_factory.mktemp("gloo")) as both:
        yield both


@pytest.fixture(scope="module")
def s3_bucket() -> Iterator[str]:
    """An empty bucket of an S3 server in this process, whose address is in the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    # What moto holds belongs to the process, not to the server: other tests may have left some.
    for method, path in (("POST", "moto-api/reset"), ("PUT", "lake")):
        request = urllib.request.Request(f"{endpoint}/{path}", method=method)
        urllib.request.urlopen(request, timeout=10).close()
    with pytest.MonkeyPatch.context() as patch:
        point_s3_at(endpoint, patch)
        yield "s3://lake"
    server.stop()


def point_s3_at(endpoint: str, patch: pytest.MonkeyPatch) -> None:
    """Have S3 clients speak to a server of this machine, with keys that open nothing."""
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "canary-id")
    # A test looks for this in what a job tells.
    patch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    patch.setenv("AWS_REGION", "us-east-1")


@pytest.fixture(scope="session")
def empty_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, made by a tracker; copying it saves each test 1.5 s."""
    from pipeline.tracking.tracker import start_tracker

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    start_tracker(uri, experiment="first").close()
    return folder / "mlflow.db"


@pytest.fixture
def mlflow_uri(empty_mlflow_database: Path, tmp_path: Path) -> str:
    """An MLflow store of the test's own, in ``tmp_path``."""
    shutil.copy(empty_mlflow_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


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
