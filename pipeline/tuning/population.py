"""Population based training (Jaderberg et al., 2017): who copies whom, and with which changes.

Every member of a population trains for a generation of some epochs. When all have ended, those of
the lowest quarter (and all that failed) go on from the checkpoints of members of the highest one,
with some of that member's knobs changed; the others go on as they are. A segment, one generation of
one member, is a trial of the sweep. Only knobs that the space calls ``MUTABLE`` are changed: the
others are drawn once for each member, and go along with the weights.

Generations do not overlap. So what comes next is a function of the seed and of the results of the
generation before: it does not depend on who was fastest, and a sweep that was killed goes on as
one that never was. Ray's own PBT is asynchronous, and cannot be restored once its driver is killed.

To change how losers and winners are told apart: ``_source``. How a knob is changed: ``_changed``.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.config.tuning import TuneJob
from pipeline.errors import ConfigError
from pipeline.runs.kinds import KINDS
from pipeline.tuning.proposals import propose
from pipeline.tuning.space import Choice, Knob, Space, Span, Values
from pipeline.tuning.trials import DEFAULT_SAMPLES, Proposal, Segment, Trial, proposal
from pipeline.tuning.tuned_job import Tree, num_epochs, settings_of

QUANTILE = 0.25
"""Part of a population that is replaced at the end of a generation; Jaderberg et al. had 20 %."""

_FACTORS = (0.8, 1.2)
_FRESH = 0.25


@dataclass(frozen=True)
class Population:
    """How many members train for how long, and what all that is random depends on."""

    space: Space
    size: int
    epochs: int
    perturb_epochs: int
    seed: int

    @property
    def generations(self) -> int:
        """How many there are; the last one may be shorter."""
        return math.ceil(self.epochs / self.perturb_epochs)

    @property
    def num_segments(self) -> int:
        """Trials of the sweep."""
        return self.size * self.generations

    @cached_property
    def first_values(self) -> tuple[Values, ...]:
        """Values of the first generation, all different.

        Raises:
            ConfigError: the space has not so many.
        """
        found: list[Values] = []
        for _ in range(self.size):
            values = propose(self.space, "random", seed=self.seed, before=found, told=())
            if values is None:
                raise ConfigError(
                    f"--num-samples must be in [2, {len(found)}] with --scheduler pbt, for --space "
                    f"{self.space.name} has no more different values, got {self.size}"
                )
            found.append(values)
        return tuple(found)


def population_of(job: TuneJob, space: Space, base: Tree) -> Population | None:
    """The population that a sweep trains; None where it trains none.

    Raises:
        ConfigError: the space cannot be searched so, or the settings do not fit the base.
    """
    if job.scheduler != "pbt":
        return None
    epochs = num_epochs(space, base)
    if space.job not in KINDS or epochs is None:
        raise ConfigError(
            f"--scheduler pbt copies the checkpoints of training runs ({', '.join(KINDS)}), and "
            f"--space {space.name} is of the job {space.job}; leave it out"
        )
    if not space.mutable:
        raise ConfigError(
            f"--scheduler pbt changes knobs while runs train, and --space {space.name} does not "
            "say which may change: name them in it, MUTABLE = ('optim.lr', ...)"
        )
    if job.perturb_epochs >= epochs:
        raise ConfigError(
            f"--perturb-epochs must be in [1, {epochs - 1}] for a base of {epochs} epochs, got "
            f"{job.perturb_epochs}"
        )
    settings: Any = settings_of(space, base, {})
    if space.metric.startswith("probe/") and settings.probe.every > job.perturb_epochs:
        raise ConfigError(
            f"{space.metric} must be measured in every generation: probe.every must be in "
            f"[1, {job.perturb_epochs}], got {settings.probe.every}; give --set probe.every="
            f"{job.perturb_epochs}"
        )
    population = Population(
        space, job.num_samples or DEFAULT_SAMPLES, epochs, job.perturb_epochs, job.seed
    )
    # Drawn now: a space that has not so many is refused before work begins.
    _ = population.first_values
    return population


def next_segment(
    population: Population, num_proposed: int, ended: Sequence[Trial]
) -> Proposal | None:
    """The segment after so many; None where there is none, or none yet.

    Args:
        population: whose members are trained.
        num_proposed: segments that were proposed before.
        ended: all that have ended, in any order.
    """
    before, place = divmod(num_proposed, population.size)
    if before >= population.generations:
        return None
    if before == 0:
        values, parent = population.first_values[place], None
    else:
        of_before = [one for one in ended if generation_of(one) == before]
        survivors = [one for one in of_before if one.status != "failed"]
        if len(of_before) < population.size or not survivors:
            return None
        rng = random.Random(f"{population.seed}:{before + 1}:{place + 1}")
        source, changes = _source(population, of_before, place, rng)
        parent, values = source.number, source.values
        if changes:
            values = perturbed(population.space, values, rng)
    segment = Segment(
        member=place + 1,
        generation=before + 1,
        parent=parent,
        after=before * population.perturb_epochs,
        until=min((before + 1) * population.perturb_epochs, population.epochs),
    )
    return proposal(num_proposed + 1, values, segment)


def perturbed(space: Space, values: Values, rng: random.Random) -> Values:
    """The values with each mutable knob changed, and held within what the space allows."""

    def choose(name: str, knob: Knob) -> Any:
        if name not in values:
            # It counts only now, because of a change to what it depends on.
            return knob.draw(rng)
        return _changed(knob, values[name], rng) if name in space.mutable else values[name]

    return space.values(choose)


def lineage(trials: Sequence[Trial], last: Trial) -> list[Trial]:
    """The segments whose checkpoints led to ``last``, from the first generation to itself."""
    by_number = {one.number: one for one in trials}
    chain = [last]
    while (segment := chain[-1].segment) is not None and segment.parent is not None:
        chain.append(by_number[segment.parent])
    return chain[::-1]


def generation_of(trial: Proposal) -> int | None:
    """Which generation a trial belongs to; None where it is of no population."""
    return None if trial.segment is None else trial.segment.generation


def _source(
    population: Population, ended: Sequence[Trial], place: int, rng: random.Random
) -> tuple[Trial, bool]:
    """The segment that a member of the next generation goes on from, and whether its knobs change.

    Members that failed are behind all others; all of them are replaced, however many they are.
    """
    sign = -1 if population.space.mode == "max" else 1
    ranked = sorted(
        ended,
        key=lambda one: (one.status == "failed", sign * (one.metric or 0.0), one.number),
    )
    survivors = [one for one in ranked if one.status != "failed"]
    count = max(1, int(population.size * QUANTILE))
    losers = ranked[min(len(survivors), population.size - count) :]
    own = sorted(ended, key=lambda one: one.number)[place]
    return (rng.choice(survivors[:count]), True) if own in losers else (own, False)


def _changed(knob: Knob, value: Any, rng: random.Random) -> Any:
    """A value near the given one, or now and then any; never outside the knob."""
    if rng.random() < _FRESH:
        return knob.draw(rng)
    if isinstance(knob, Choice):
        index = knob.index(value)
        neighbours = [one for one in (index - 1, index + 1) if 0 <= one < len(knob.values)]
        return knob.values[rng.choice(neighbours or [index])]
    factor = rng.choice(_FACTORS)
    scaled = knob.legal(value * factor)
    # In steps, a fifth of a small number is none.
    return _one_step(knob, value, up=factor > 1) if scaled == value else scaled


def _one_step(knob: Span, value: float, *, up: bool) -> float:
    step = knob.step or (1 if knob.integer else 0)
    return knob.legal(value + step if up else value - step)
