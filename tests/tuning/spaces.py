"""Search spaces of the tests' own, whose trials do on purpose what trials do by accident."""

from pathlib import Path

from pipeline.tuning.space import Space, space_of

SCORED = """
from ray import tune
METRIC, MODE = "score", "max"
SPACE = {
    "x": tune.uniform(-1.0, 1.0),
    "kind": tune.choice(["round", "square"]),
    "side": tune.randint(1, 5),
    "sides": tune.choice([(1,), (1, 2)]),
}
CONDITIONS = {"side": ("kind", "square"), "sides": ("kind", "square")}
GRID = [{"kind": ["round", "square"], "side": [1, 2]}]
def run(values, report):
    return 1.0 - (values["x"] - 0.3) ** 2 - 0.2 * (values["kind"] == "square")
"""

FAULTY = """
import os, signal
from ray import tune
METRIC, MODE = "score", "max"
SPACE = {"fault": tune.choice(["none", "raise", "nan", "memory", "exit", "kill"])}
GRID = {"fault": ["raise", "nan", "memory", "none"]}
def run(values, report):
    fault = values["fault"]
    report(1, 1.0)
    if fault == "raise":
        raise RuntimeError("broken on purpose")
    if fault == "memory":
        raise MemoryError("no memory on purpose")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return float("nan") if fault == "nan" else 3.0
"""

KILLING = FAULTY.replace(
    '"fault": ["raise", "nan", "memory", "none"]',
    '"fault": ["raise", "nan", "kill", "memory", "none"]',
)

FAILING = FAULTY.replace('["raise", "nan", "memory", "none"]', '["raise", "nan"]')

# From the best down: each later trial is behind all before it.
FALLING = """
from ray import tune
METRIC, MODE = "score", "max"
SPACE = {"x": tune.choice(list(range(8)))}
GRID = {"x": [7, 6, 5, 4, 3, 2, 1, 0]}
def run(values, report):
    for epoch in range(1, 10):
        report(epoch, float(values["x"] * epoch))
    return float(values["x"] * 9)
"""


def write(folder: Path, source: str, name: str = "space") -> Path:
    """The file of a space."""
    path = folder / f"{name}.py"
    path.write_text(source)
    return path


def scored() -> Space:
    """A space with a maximum at x = 0.3, kind = round."""
    return space_of(SCORED, "scored")
