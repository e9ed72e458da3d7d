"""A Ray to work on: this process's own, that of ``RAY_ADDRESS``, or a local one for one job."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pipeline.errors import ClusterError, one_line


@contextmanager
def ray_session(*, debug: bool = False, dashboard: bool = False) -> Iterator[None]:
    """Join or start Ray, and leave it at the end, whatever happens.

    Where this process has a Ray already, as a notebook may, that one is used and left as it is.
    `ray job submit` sets ``RAY_ADDRESS``; without it a local Ray is started on free ports, so that
    a job never joins by accident the cluster of somebody else on this machine. ``dashboard`` is of
    that local one alone: a cluster has its own.

    Raises:
        ClusterError: the cluster cannot be reached, or a local one cannot be started.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    # Told to Ray before it starts; both can be overridden from outside.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default its workers run at nice 15, and starve beside any other work of this machine: a job
    # is as nice as the shell it was started from.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not debug:
        # Ray's C++ core warns on our stderr about Ray Data's own actors, which is no concern here.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # An exception in the midst of Ray's start can hang it: until it is up, SIGTERM simply kills.
    ours = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with _stderr_without(b"Set ray log level"):
            ray.init(
                address=address,
                logging_level=logging.INFO if debug else logging.ERROR,
                log_to_driver=debug,
                include_dashboard=dashboard if address == "local" else None,
                runtime_env={"worker_process_setup_hook": _name_own_ray} if dashboard else None,
            )
    except (ConnectionError, RuntimeError, ValueError) as fault:
        raise ClusterError(
            f"Ray at {address} cannot be used: {one_line(fault)}. Unset RAY_ADDRESS to work locally"
        ) from fault
    # Ray's start put its own handlers in the place of the job's: they abort the process.
    signal.signal(signal.SIGTERM, ours)
    try:
        yield
    finally:
        ray.shutdown()


def _name_own_ray() -> None:
    """Tell a worker which Ray it is of.

    Whoever asks the dashboard, as Ray Train's clean-up does, looks for the one Ray of this machine
    otherwise, and gives up where there are two.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


@contextmanager
def _stderr_without(noise: bytes) -> Iterator[None]:
    """Hold back what is written to stderr meanwhile, and let through all but lines with ``noise``.

    On the level of the file descriptor, because Ray's core does not write through Python.
    """
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            os.write(2, b"".join(line for line in held if noise not in line))


def count(resource: str) -> float:
    """How much of a resource (``"CPU"``, ``"GPU"``) the cluster has at present."""
    return float(ray.cluster_resources().get(resource, 0.0))
