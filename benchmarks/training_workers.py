"""Training in other processes: two workers pinned to a core each, and jobs with or without Ray.

What is compared is the loop's own images per second, without any start-up.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from benchmarks.rounds import Ratio, ratio
from benchmarks.training_ways import LoopTraining, Network, OurTraining, RepeatedBatch
from pipeline.data.loader import Batch
from pipeline.training.workers import Workers, current_workers

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Load:
    """What each worker computes in a round."""

    network: Network
    local_batch: int
    steps: int

    def training(self, workers: Workers) -> OurTraining:
        """That of one of ``workers``."""
        images_B3HW, targets_B = self.network.noise(self.local_batch)
        first = workers.rank * self.local_batch
        batch = Batch(images_B3HW, targets_B, self.local_batch * workers.size, 0, first)
        loader = RepeatedBatch(batch, self.steps).as_loader()
        return OurTraining(self.network, loader, drloc=True, workers=workers)


TrainingOf = Callable[[Workers], LoopTraining]
"""What each process trains, on the CPU, alone or in a group; must pickle."""


class PinnedWorkers:
    """Two processes with one thread and one core each; they train alone or as one gloo group."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes

    def speeds(self, way: str, ranks: Sequence[int]) -> list[float]:
        """Images per second that the loop of each of ``ranks`` tells, all at work at once.

        In way ``together`` each tells those of both.
        """
        for rank in ranks:
            self._pipes[rank].send(way)
        return [float(self._pipes[rank].recv()) for rank in ranks]

    def rounds(self, num: int) -> dict[str, list[float]]:
        """Images per second of one worker, of two that do not know each other, and of a group."""
        found: dict[str, list[float]] = {"one": [], "apart": [], "together": []}
        for number in range(num + 1):
            # The lone one changes sides: cores may differ.
            told = {
                "one": self.speeds("alone", [number % 2])[0],
                "apart": sum(self.speeds("alone", [0, 1])),
                "together": self.speeds("together", [0, 1])[0],
            }
            for name, speed in told.items() if number else ():
                found[name].append(speed)
        return found


@contextmanager
def pinned_workers(training_of: TrainingOf) -> Iterator[PinnedWorkers]:
    """The two, on the first two cores this process may use.

    Raises:
        RuntimeError: there is one core only.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise RuntimeError("part d needs two cores, one is allowed here")
    context = get_context("spawn")
    with TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank, core in enumerate(cores):
            ours, theirs = context.Pipe()
            where = (rank, core, f"{folder}/meeting")
            process = context.Process(target=_serve, args=(where, training_of, theirs), daemon=True)
            process.start()
            # Only the child's end may stay open, or its death would not be noticed.
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            yield PinnedWorkers(pipes)
        finally:
            # All at once: a group ends together.
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join(timeout=10)
                process.kill()


def _serve(where: tuple[int, int, str], training_of: TrainingOf, pipe: Connection) -> None:
    rank, core, meeting = where
    # Before the first thread starts: threads are pinned as the one that starts them.
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    ways = {
        "alone": training_of(Workers(0, 1, torch.device("cpu"))),
        "together": training_of(current_workers(torch.device("cpu"))),
    }
    try:
        while True:
            way = ways[pipe.recv()]
            way()
            pipe.send(way.numbers["train/images_per_second"])
    except EOFError:
        dist.destroy_process_group()


def two_against_one(training_of: TrainingOf, rounds: int) -> list[Ratio]:
    """Efficiency of the two, and that of two which exchange nothing."""
    with pinned_workers(training_of) as workers:
        speeds = workers.rounds(rounds)
    both = [2 * speed for speed in speeds["one"]]
    return [
        ratio("d: images/s of 2 workers / twice those of 1", speeds["together"], both, ">= 0.95"),
        ratio("d: the same of 2 that exchange nothing", speeds["apart"], both),
    ]


@dataclass(frozen=True)
class Job:
    """A small training job, the same with Ray and without but for who starts the loop."""

    script: str
    """In ``jobs/``."""

    flags: Mapping[str, object]
    """Its own; what every job is told is added."""

    batch_size: int
    threads: int
    use_gpu: bool

    def speeds(self, *, num_workers: int) -> list[float]:
        """Images per second of each epoch but the first; 0 workers: without Ray.

        Raises:
            RuntimeError: the job failed.
        """
        with TemporaryDirectory() as output:
            done = subprocess.run(
                [sys.executable, f"jobs/{self.script}", *self._flags(output, num_workers)],
                cwd=_ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": str(_ROOT),
                    # The plain loop's threads; a Ray worker is given as many cores.
                    "OMP_NUM_THREADS": str(self.threads),
                },
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{self.script} failed: {done.stdout}{done.stderr}")
            (history,) = Path(output).glob("*/history.jsonl")
            epochs = [json.loads(line) for line in history.read_text().splitlines()]
        return [float(epoch["train/images_per_second"]) for epoch in epochs[1:]]

    def _flags(self, output: str, num_workers: int) -> list[str]:
        flags = {
            **self.flags,
            "output": output,
            "batch-size": self.batch_size,
            "num-workers": num_workers,
            "cpus-per-worker": self.threads,
            "tracking-uri": "off",
        }
        told = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        return [*told, *(["--use-gpu"] if self.use_gpu else [])]


def ray_against_plain(job: Job, rounds: int) -> list[Ratio]:
    """Images per second in a Ray Train worker over those without Ray, epoch by epoch."""
    plain: list[float] = []
    with_ray: list[float] = []
    for _ in range(rounds):
        plain += job.speeds(num_workers=0)
        with_ray += job.speeds(num_workers=1)
    return [ratio("c: images/s with TorchTrainer / plain", with_ray, plain, ">= 0.97")]
