"""Peak memory of the labelling job's driver and actors, over a collection and over ten times it.

    python -m benchmarks.memory --images PHOTOS --name vit_tiny_patch16_224 --checkpoint FILE

Flat means: the ratio is near 1 although the collection grew by 10. Resident memory is read from the
operating system twice a second. Shared memory is left out: it is Ray's object store, whose size is
fixed when Ray starts, and every process that looks at a block would count it once more.
"""

import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import tyro

from benchmarks.timing import print_table, write_json

ROLES = {"LabelBlock": "actor", "LoadBlock": "loading task", "CommitBlock": "commit task"}


@dataclass(frozen=True)
class Settings:
    """What to label."""

    images: Path
    name: str
    checkpoint: Path
    times: int = 10
    output: Path = Path("benchmarks/results/memory.json")


def copies(images: Path, times: int, folder: Path) -> Path:
    """A folder that holds every file of ``images`` ``times`` over."""
    for number in range(times):
        shutil.copytree(images, folder / f"copy-{number}")
    return folder


def peaks(command: list[str]) -> dict[str, float]:
    """The largest private resident memory in MiB of each role while the command runs."""
    largest: dict[str, float] = defaultdict(float)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        for role, mebibytes in _resident(process.pid):
            largest[role] = max(largest[role], mebibytes)
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the job ended with {process.returncode}")
    return dict(largest)


def _resident(driver: int) -> list[tuple[str, float]]:
    found = []
    try:
        family = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    for one in family:
        try:
            title = " ".join(one.cmdline())
            memory = one.memory_info()
        except psutil.Error:
            continue
        role = "driver" if one.pid == driver else _role(title)
        if role:
            found.append((role, (memory.rss - memory.shared) / 2**20))
    return found


def _role(title: str) -> str | None:
    return next((role for word, role in ROLES.items() if word in title), None)


def main(settings: Settings) -> None:
    """Label one and ``times`` copies; print both peaks and their ratio."""
    measured = {}
    for times in (1, settings.times):
        with TemporaryDirectory() as scratch:
            photos = copies(settings.images, times, Path(scratch) / "photos")
            command = [sys.executable, "jobs/label_images.py", "--tracking-uri", "off"]
            command += ["--images", str(photos), "--output", f"{scratch}/labels"]
            command += ["--backbone.name", settings.name]
            command += ["--backbone.checkpoint", str(settings.checkpoint)]
            command += ["--backbone.feature", "value", "--backbone.block", "5"]
            measured[times] = peaks(command)
    small, large = measured[1], measured[settings.times]
    rows = [
        [role, f"{small[role]:.0f}", f"{large[role]:.0f}", f"{large[role] / small[role]:.2f}"]
        for role in sorted(small.keys() & large.keys())
    ]
    title = "Peak private memory in MiB"
    print_table(title, ["process", "1x images", f"{settings.times}x images", "ratio"], rows)
    write_json(settings.output, {"title": title, "1x": small, f"{settings.times}x": large})


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
