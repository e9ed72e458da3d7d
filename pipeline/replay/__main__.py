"""From a kept step's file to a screen of lines, by ``python -m pipeline.replay FILE``.

The exit code is 0 where all is finite this time, 8 where it is not, else as errors.py lists.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from pipeline.errors import ConfigError, PatchseedError, TrainingDiverged
from pipeline.replay.kept_step import load_step
from pipeline.replay.replaying import replay
from pipeline.storage import Location, without_secrets
from pipeline.training.loop import AUTOCAST


def main(args: Sequence[str] | None = None) -> int:
    """Replay from the command line; the exit code is 0 where all is finite, 8 where it is not."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.replay",
        description="Compute a step that diverged again, and tell where it stops being finite.",
    )
    parser.add_argument("path", help="the file that the run's last message named")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--precision", choices=AUTOCAST, help="default: as it was trained")
    given = parser.parse_args(args)
    try:
        device = _device(given.device)
        step = load_step(Location.parse(given.path))
        lines, is_finite = replay(step, device, given.precision or step.job.precision)
    except PatchseedError as fault:
        sys.stderr.write(f"{type(fault).__name__}: {without_secrets(str(fault))}\n")
        return fault.exit_code
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if is_finite else TrainingDiverged.exit_code


def _device(name: str) -> torch.device:
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, got {name}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch finds no GPU here; use --device cpu")
    return torch.device(name)


if __name__ == "__main__":
    sys.exit(main())
