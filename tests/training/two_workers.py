"""Two real processes of one gloo group, that run what a test sends them."""

import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.training.workers import current_workers

_ANSWER_WITHIN_S = 120


class TwoWorkers:
    """The two; a fault in one of them fails the test."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``work(workers, *args)`` gives on rank 0 and on rank 1."""
        for pipe in self._pipes:
            # Not pipe.send: that would hand tensors over as memory of a process that may end.
            pipe.send_bytes(pickle.dumps((work, args)))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(_ANSWER_WITHIN_S), f"worker {rank} hangs"
            answers.append(pickle.loads(pipe.recv_bytes()))
        for rank, (_, fault) in enumerate(answers):
            assert fault is None, f"worker {rank}: {fault}"
        return [result for result, _ in answers]


@contextmanager
def two_workers(folder: Path) -> Iterator[TwoWorkers]:
    """The two processes, which meet in ``folder`` and end with the block."""
    context = get_context("spawn")
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, folder / "meeting", theirs))
        process.start()
        # Only the child's end may stay open, or its death would not be noticed.
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        yield TwoWorkers(pipes)
    finally:
        # All at once: a group ends together.
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=10)
            process.kill()


def _serve(rank: int, meeting: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=_ANSWER_WITHIN_S / 2),
    )
    while True:
        try:
            work, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        answer: tuple[Any, str | None]
        try:
            answer = (work(current_workers(), *args), None)
        except BaseException:  # failures of pytest are no Exceptions
            answer = (None, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
