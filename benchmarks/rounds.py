"""Ways that take turns, and the ratio of one to another with its spread over the rounds."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import print_table, write_json


@dataclass(frozen=True)
class Ratio:
    """One number per round; the median is the result, the rest says how far to trust it."""

    name: str
    values: Sequence[float]
    aim: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def row(self) -> list[str]:
        """For `print_ratios`."""
        spread = f"{min(self.values):.3f} to {max(self.values):.3f}"
        return [self.name, f"{self.median:.3f}", spread, str(len(self.values)), self.aim]

    def as_json(self) -> dict[str, Any]:
        return {"median": self.median, "rounds": list(self.values), "aim": self.aim}


def print_ratios(title: str, ratios: Sequence[Ratio]) -> None:
    """A table on stdout."""
    print_table(
        title, ["ratio", "median", "spread", "rounds", "aim"], [ratio.row() for ratio in ratios]
    )


def print_and_keep(
    title: str, ratios: Sequence[Ratio], settings: object, output: Path, device: torch.device
) -> None:
    """The table, and a file with all that was asked (a dataclass's fields) and found."""
    where = hardware(device)
    print_ratios(f"{title}; {where}", ratios)
    asked = {name: str(value) for name, value in vars(settings).items()}
    found = {one.name: one.as_json() for one in ratios}
    write_json(output, {"hardware": where, "settings": asked, "ratios": found})


def take_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that is not counted.

    Every other round goes backwards, so that no way always follows the same other one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        names = list(ways)[:: 1 if number % 2 else -1]
        for name in names:
            _wait_for(device)
            started = time.perf_counter()
            ways[name]()
            _wait_for(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(name: str, above: Sequence[float], below: Sequence[float], aim: str = "") -> Ratio:
    """Round by round, so that a slow spell of the machine falls on both."""
    return Ratio(name, [one / other for one, other in zip(above, below, strict=True)], aim)


def hardware(device: torch.device) -> str:
    """What the numbers were measured on, for a table's title."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    processor = platform.processor() or platform.machine()
    known = Path("/proc/cpuinfo")
    if known.exists():
        names = [line for line in known.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    cores = len(os.sched_getaffinity(0))
    return f"{processor}, {cores} cores, {torch.get_num_threads()} threads, {torch.__version__}"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
