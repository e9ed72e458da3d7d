"""Earlier trials -> the values of the next one, at random, from the grid, or by Optuna's TPE.

A proposal is a function of the seed, its number and the results known by then. So nothing needs to
be saved of a searcher, and a sweep that goes on searches as one that was never stopped.

To add a search: a function beside ``_random`` and ``_tpe``, a case in ``propose``, and its name in
``Searcher`` of config/tuning.py.
"""

import math
import random
import warnings
from collections.abc import Sequence
from typing import Any

from pipeline.tuning.space import Choice, Knob, Space, Values
from pipeline.tuning.trials import Trial

# A small discrete space runs out of new points: after so many draws nothing is left to be found.
_TRIES = 200
_TPE_TRIES = 5
_STARTUP = 10


def propose(
    space: Space, search: str, *, seed: int, before: Sequence[Values], told: Sequence[Trial]
) -> Values | None:
    """The next values, other than all before; None where the space has nothing new.

    Args:
        space: what may be turned.
        search: random, grid or tpe.
        seed: of all that is random.
        before: all values proposed so far.
        told: the trials that have ended.
    """
    if search == "grid":
        return next((point for point in space.grid_points() if point not in before), None)
    if search == "tpe" and len(told) >= _STARTUP:
        for attempt in range(_TPE_TRIES):
            values = _tpe(space, f"{seed}:{len(before)}:{attempt}", told)
            if values not in before:
                return values
    for attempt in range(_TRIES):
        values = _random(space, f"{seed}:{len(before)}:{attempt}")
        if values not in before:
            return values
    return None


def _random(space: Space, key: str) -> Values:
    rng = random.Random(key)
    return space.values(lambda name, knob: knob.draw(rng))


def _tpe(space: Space, key: str, told: Sequence[Trial]) -> Values:
    """Tree-structured Parzen estimators (Bergstra et al., 2011), as Optuna has them."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=random.Random(key).getrandbits(32), n_startup_trials=_STARTUP
    )
    study = optuna.create_study(direction=direction_of(space), sampler=sampler)
    with warnings.catch_warnings():
        # Knobs that do not count in every trial are what the sampler is told of here.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for trial in told:
            if trial.metric is not None:
                study.add_trial(frozen(space, trial))
        asked = study.ask()
        return space.values(lambda name, knob: _suggested(asked, name, knob))


def direction_of(space: Space) -> Any:
    """The space's mode, as Optuna says it."""
    from optuna.study import StudyDirection

    return StudyDirection.MAXIMIZE if space.mode == "max" else StudyDirection.MINIMIZE


def frozen(space: Space, trial: Trial) -> Any:
    """A trial that has ended with a metric, as Optuna knows it."""
    import optuna

    if trial.metric is None:
        raise ValueError(f"trial {trial.number} has no metric")
    stopped = trial.status == "stopped"
    return optuna.trial.create_trial(
        # A stopped trial is known by what it reached until then.
        state=optuna.trial.TrialState.PRUNED if stopped else optuna.trial.TrialState.COMPLETE,
        value=trial.metric,
        intermediate_values={trial.epochs or 1: trial.metric},
        params={
            name: _as_optuna(space.knobs[name], value)
            for name, value in trial.values.items()
            if name in space.knobs
        },
        distributions={
            name: _distribution(space.knobs[name]) for name in trial.values if name in space.knobs
        },
    )


def _distribution(knob: Knob) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(knob, Choice):
        # By index: values may be lists, which Optuna does not know.
        return CategoricalDistribution(range(len(knob.values)))
    if knob.integer:
        return IntDistribution(int(knob.low), int(knob.high), log=knob.log)
    return FloatDistribution(knob.low, knob.high, log=knob.log)


def _as_optuna(knob: Knob, value: Any) -> Any:
    if not isinstance(knob, Choice):
        return value
    return knob.index(value)


def _suggested(asked: Any, name: str, knob: Knob) -> Any:
    if isinstance(knob, Choice):
        return knob.values[asked.suggest_categorical(name, range(len(knob.values)))]
    suggest = asked.suggest_int if knob.integer else asked.suggest_float
    ends = (int(knob.low), int(knob.high)) if knob.integer else (knob.low, knob.high)
    value = float(suggest(name, *ends, log=knob.log))
    return knob.legal(value) if math.isfinite(value) else knob.low
