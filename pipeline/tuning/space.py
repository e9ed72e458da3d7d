"""A file of tune_spaces/ -> what may be turned, within which bounds, and under which condition.

A space is Python: ``JOB`` (classifier, localization, dino, detector), or instead of it a function
``run(values, report) -> float``; ``METRIC`` and ``MODE`` (max, min); ``SPACE`` from dotted settings
to Ray Tune's domains; perhaps ``GRID`` (settings to lists; several such grids in a list),
``CONDITIONS`` (a setting to another one and the values of it under which it counts) and ``PICK``
(``best`` or ``last``: which epoch a trial is judged by).

Ray's domains are read by what they hold, so Ray is not imported here. To support another kind of
domain: a case in ``_knob``.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pipeline.errors import ConfigError, one_line
from pipeline.runs.kinds import KINDS

Values = dict[str, Any]
"""Settings by dotted name."""

LOCALIZATION = "localization"
JOBS = (*KINDS, LOCALIZATION)
"""What a space may be of."""

OWN = "function"
"""The job of a space that brings its own ``run``."""


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    def draw(self, rng: random.Random) -> Any:
        """One value, each as likely."""
        return rng.choice(self.values)

    def index(self, value: Any) -> int:
        """Which one it is, also after a way through JSON, which knows no tuples.

        Raises:
            ValueError: it is none of them.
        """
        for index, one in enumerate(self.values):
            if _same(one, value):
                return index
        raise ValueError(f"{value!r} is none of {self.values}")


@dataclass(frozen=True)
class Span:
    """A number from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False

    def draw(self, rng: random.Random) -> float:
        """One number, uniform or log-uniform, on a multiple of the step."""
        if self.integer and not self.log and self.step is None:
            return rng.randint(int(self.low), int(self.high))
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = rng.uniform(*ends)
        return self.legal(math.exp(value) if self.log else value)

    def legal(self, value: float) -> float:
        """The nearest number that the span allows."""
        if self.step is not None:
            value = round(value / self.step) * self.step
        value = min(max(value, self.low), self.high)
        return round(value) if self.integer else value


Knob = Choice | Span


@dataclass(frozen=True)
class Space:
    """What a sweep turns."""

    name: str
    source: str
    job: str
    metric: str
    mode: Literal["max", "min"]
    pick: Literal["best", "last"]
    knobs: Mapping[str, Knob]
    grids: Sequence[Mapping[str, Sequence[Any]]]
    conditions: Mapping[str, tuple[str, tuple[Any, ...]]]
    run: Callable[..., Any] | None

    def values(self, choose: Callable[[str, Knob], Any]) -> Values:
        """One value for each knob that counts; those that others depend on are chosen first."""
        chosen: Values = {}
        for name in self._parents_first():
            if self._counts(name, chosen):
                chosen[name] = choose(name, self.knobs[name])
        return {name: chosen[name] for name in self.knobs if name in chosen}

    def grid_points(self) -> Iterator[Values]:
        """The points of all grids in their order, each once, without what does not count."""
        seen: list[Values] = []
        for grid in self.grids:
            for point in itertools.product(*grid.values()):
                values = self.active(dict(zip(grid, point, strict=True)))
                if values not in seen:
                    seen.append(values)
                    yield values

    def active(self, values: Values) -> Values:
        """The values that count: equal trials are then equal."""
        return {name: value for name, value in values.items() if self._counts(name, values)}

    def better(self, one: float, other: float) -> bool:
        """Whether the first metric beats the second."""
        return one > other if self.mode == "max" else one < other

    def _counts(self, name: str, values: Values) -> bool:
        if name not in self.conditions:
            return True
        parent, allowed = self.conditions[name]
        if parent not in values:
            # Not turned, so the base says it; or turned, but without effect itself.
            return parent not in self.knobs
        return values[parent] in allowed and self._counts(parent, values)

    def _parents_first(self) -> list[str]:
        order: list[str] = []
        for name in self.knobs:
            chain = [name]
            while (above := self.conditions.get(chain[-1])) and above[0] in self.knobs:
                chain.append(above[0])
            order += [one for one in reversed(chain) if one not in order]
        return order


def read_space(path: str) -> Space:
    """The space in a file of the user's, which is run.

    Raises:
        ConfigError: it cannot be read or run, or something in it is missing or wrong.
    """
    file = Path(path).expanduser()
    try:
        source = file.read_text()
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"--space {path} cannot be read: {one_line(fault)}") from fault
    return space_of(source, file.stem)


def space_of(source: str, name: str) -> Space:
    """The space that the text of a file describes; workers have no such file, but its text.

    Raises:
        ConfigError: as ``read_space``.
    """
    module = ModuleType(name)
    try:
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    except Exception as fault:  # a user's file may raise whatever it likes
        raise ConfigError(f"--space {name}: {type(fault).__name__}: {one_line(fault)}") from fault
    found = module.__dict__
    run = found.get("run")
    job = found.get("JOB", OWN if callable(run) else None)
    _require(name, "JOB", job, (*JOBS, OWN) if callable(run) else JOBS)
    _require(name, "MODE", found.get("MODE"), ("max", "min"))
    _require(name, "PICK", found.get("PICK", "last"), ("best", "last"))
    if not isinstance(found.get("METRIC"), str) or not found.get("SPACE"):
        raise ConfigError(f"--space {name} must give METRIC, a name, and SPACE with a knob or more")
    grid = found.get("GRID", [])
    space = Space(
        name=name,
        source=source,
        job=str(job),
        metric=found["METRIC"],
        mode=found["MODE"],
        pick=found.get("PICK", "last"),
        knobs={knob: _knob(name, knob, domain) for knob, domain in found["SPACE"].items()},
        grids=[grid] if isinstance(grid, Mapping) else list(grid),
        conditions={
            knob: (above, allowed if isinstance(allowed, tuple) else (allowed,))
            for knob, (above, allowed) in found.get("CONDITIONS", {}).items()
        },
        run=run,
    )
    _refuse_circles(space)
    return space


def _require(space: str, name: str, value: Any, legal: Sequence[str]) -> None:
    if value not in legal:
        raise ConfigError(f"--space {space}: {name} must be one of {', '.join(legal)}, got {value}")


def _refuse_circles(space: Space) -> None:
    for start in space.conditions:
        name, steps = start, 0
        while name in space.conditions:
            name, steps = space.conditions[name][0], steps + 1
            if steps > len(space.conditions):
                raise ConfigError(f"--space {space.name}: the condition of {start} is on itself")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return list(one) == list(other)
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _knob(space: str, name: str, domain: Any) -> Knob:
    """What one of Ray's domains allows."""
    if hasattr(domain, "categories"):
        return Choice(tuple(domain.categories))
    if isinstance(domain, Mapping) and "grid_search" in domain:
        return Choice(tuple(domain["grid_search"]))
    sampler: Any = domain.get_sampler() if hasattr(domain, "get_sampler") else None
    step = getattr(sampler, "q", None)
    inner = sampler.get_sampler() if step is not None else sampler
    kind = type(inner).__name__.lstrip("_")
    if kind not in ("Uniform", "LogUniform") or not hasattr(domain, "lower"):
        raise ConfigError(
            f"--space {space}: {name} must be tune.choice, uniform, loguniform, randint, "
            f"lograndint or one of these in steps, got {domain!r}"
        )
    integer = type(domain).__name__ == "Integer"
    if not math.isfinite(domain.lower) or not math.isfinite(domain.upper):
        raise ConfigError(f"--space {space}: {name} must have two finite ends, got {domain!r}")
    # Ray's integers exclude their upper end, but not where they go in steps.
    high = domain.upper - 1 if integer and step in (None, 1) else domain.upper
    return Span(
        low=domain.lower,
        high=high,
        log=kind == "LogUniform",
        step=None if integer and step == 1 else step,
        integer=integer,
    )
