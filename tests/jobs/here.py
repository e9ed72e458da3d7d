"""Jobs that run in the test's own process: the same command line, without a Python's start."""

import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def run_here(job: Path, *args: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run ``python JOB ARGS...`` to its end in this process, as the process it would have been.

    What it writes is caught at its file descriptors, so what Ray's core tells is among it; what it
    turned on its way (signals, logging, the environment, the folder it is in) is turned back. A job
    that uses Ray needs RAY_ADDRESS (the fixture ``ray_address``), or it starts one of its own.

    Returns:
        Exit code, stdout and stderr.
    """
    line = [str(job), *map(str, args)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _all_put_back():
            os.environ.update(environment)
            sys.argv = line
            with _descriptor(1, out), _descriptor(2, err):
                code = _exit_code(job)
        told = [_all_of(file) for file in (out, err)]
    return subprocess.CompletedProcess(line, code, *told)


def _exit_code(job: Path) -> int:
    try:
        runpy.run_path(str(job), run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(stop.code + "\n")
            return 1
        return stop.code or 0
    return 0


@contextmanager
def _all_put_back() -> Iterator[None]:
    """Lend the process to a job: what is the process's own is afterwards what it was."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
    handlers = {number: signal.getsignal(number) for number in numbers}
    environment, argv, folder = dict(os.environ), sys.argv, Path.cwd()
    streams = sys.stdout, sys.stderr
    root = logging.getLogger()
    ours, level = root.handlers[:], root.level
    # With pytest's handlers there, a job's basicConfig would do nothing.
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:], root.level = ours, level
        sys.stdout, sys.stderr = streams
        os.chdir(folder)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _descriptor(number: int, file: IO[bytes]) -> Iterator[None]:
    """Have stdout (1) or stderr (2) written to ``file``, by Python and by all else."""
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    errors = "strict" if number == 1 else "backslashreplace"
    name = "stdout" if number == 1 else "stderr"
    getattr(sys, name).flush()
    real = os.dup(number)
    os.dup2(file.fileno(), number)
    # Never closed: a library may have kept it, as handlers of loggers do.
    stream = open(number, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    setattr(sys, name, stream)
    try:
        yield
    finally:
        stream.flush()
        os.dup2(real, number)
        os.close(real)


def _all_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()
