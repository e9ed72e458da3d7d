"""What is tried next: repeatable, new each time, and with TPE where good trials were."""

import warnings

import pytest

from pipeline.tuning.proposals import propose
from pipeline.tuning.space import Space, Values
from pipeline.tuning.trials import Trial, proposal
from tests.tuning import spaces

pytestmark = pytest.mark.ray


def swept(space: Space, search: str, count: int, seed: int = 0) -> list[Trial]:
    """A sweep without anything around it."""
    told: list[Trial] = []
    while len(told) < count:
        before = [one.values for one in told]
        values = propose(space, search, seed=seed, before=before, told=told)
        if values is None:
            break
        assert space.run is not None
        one = proposal(len(told) + 1, values)
        metric = space.run(values, None)
        told.append(Trial(one.number, one.id, one.values, "ok", metric, 0.0))
    return told


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_the_same_seed_proposes_the_same_and_another_seed_others(search: str) -> None:
    one, same, other = (swept(spaces.scored(), search, 14, seed) for seed in (1, 1, 2))
    assert [t.values for t in one] == [t.values for t in same]
    assert [t.values for t in one] != [t.values for t in other]


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_a_sweep_cut_short_goes_on_as_if_it_had_not_been(search: str) -> None:
    space = spaces.scored()
    whole = swept(space, search, 13)
    # All that a resume has: the values before, and the trials that have ended.
    values = propose(
        space, search, seed=0, before=[one.values for one in whole[:12]], told=whole[:12]
    )
    assert values is not None
    assert proposal(13, values).values == whole[12].values


@pytest.mark.parametrize("search", ["random", "tpe", "grid"])
def test_no_values_come_twice_and_an_exhausted_space_ends(search: str) -> None:
    source = (
        "METRIC, MODE = 'm', 'max'\n"
        "SPACE = {'a': {'grid_search': [1, 2, 3, 4]}, 'b': {'grid_search': [1, 2, 3, 4]}}\n"
        "GRID = {'a': [1, 2, 3, 4], 'b': [1, 2, 3, 4]}\n"
        "def run(values, report): return values['a'] * values['b']"
    )
    from pipeline.tuning.space import space_of

    told = swept(space_of(source, "small"), search, 50)
    seen: list[Values] = [one.values for one in told]
    assert len(seen) == 16
    assert all(seen.count(one) == 1 for one in seen)


def test_tpe_looks_where_good_trials_were() -> None:
    space = spaces.scored()
    by_tpe, at_random = (swept(space, search, 50) for search in ("tpe", "random"))
    mean = {
        name: sum(one.metric or 0.0 for one in told[20:]) / 30
        for name, told in (("tpe", by_tpe), ("random", at_random))
    }
    assert mean["tpe"] > mean["random"] + 0.1


def test_tpe_takes_stopped_and_failed_trials_without_a_warning() -> None:
    space = spaces.scored()
    told = swept(space, "random", 12)
    told[3] = Trial(4, "t", told[3].values, "stopped", 0.1, 0.0, epochs=2)
    told[4] = Trial(5, "t", told[4].values, "failed", None, 0.0, reason="broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert propose(space, "tpe", seed=0, before=[], told=told)
