"""A file of knobs becomes bounds, conditions and grid; what is wrong with it is one line."""

import random
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.tuning.space import Choice, Space, Span, read_space, space_of
from tests.tuning import spaces

pytestmark = pytest.mark.ray


def space_with(domain: str) -> Space:
    return space_of(
        "from ray import tune\n"
        f"JOB, METRIC, MODE = 'classifier', 'm', 'max'\nSPACE = {{'a': {domain}}}",
        "s",
    )


@pytest.mark.parametrize(
    ("domain", "knob"),
    [
        ("tune.choice([1, 2])", Choice((1, 2))),
        ("tune.grid_search([1, 2])", Choice((1, 2))),
        ("tune.uniform(0.5, 2)", Span(0.5, 2)),
        ("tune.quniform(0, 1, 0.1)", Span(0, 1, step=0.1)),
        ("tune.loguniform(1e-3, 1)", Span(1e-3, 1, log=True)),
        ("tune.randint(1, 5)", Span(1, 4, integer=True)),
        ("tune.lograndint(1, 65)", Span(1, 64, log=True, integer=True)),
        ("tune.qrandint(0, 12, 4)", Span(0, 12, step=4, integer=True)),
    ],
)
def test_rays_domains_are_read_with_the_ends_that_ray_draws(domain: str, knob: object) -> None:
    assert space_with(domain).knobs["a"] == knob


@pytest.mark.parametrize("domain", ["tune.randint(3, 5)", "tune.qrandint(0, 12, 4)"])
def test_a_span_holds_whatever_ray_itself_draws(domain: str) -> None:
    from ray import tune

    knob = space_with(domain).knobs["a"]
    assert isinstance(knob, Span)
    drawn = {eval(domain, {"tune": tune}).sample() for _ in range(60)}
    ours = {knob.draw(random.Random(number)) for number in range(200)}
    assert drawn <= ours
    assert min(ours) >= knob.low
    assert max(ours) <= knob.high


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("METRIC = 'm'", "JOB must be one of"),
        ("JOB, METRIC, MODE = 'dino', 'm', 'up'", "MODE must be one of max, min, got up"),
        ("JOB, METRIC, MODE, SPACE = 'dino', 'm', 'max', {}", "SPACE with a knob"),
        ("JOB, METRIC, MODE, SPACE = 'dino', 'm', 'max', {'a': 3}", "a must be tune.choice"),
        ("import nowhere_at_all", "ModuleNotFoundError"),
        (
            "from ray import tune\nJOB, METRIC, MODE = 'dino', 'm', 'max'\n"
            "SPACE = {'a': tune.randn()}",
            "a must be tune.choice",
        ),
        (
            "JOB, METRIC, MODE = 'dino', 'm', 'max'\nSPACE = {'a': {'grid_search': [1]}}\n"
            "CONDITIONS = {'a': ('b', 1), 'b': ('a', 1)}",
            "the condition of a is on itself",
        ),
    ],
)
def test_what_is_wrong_with_a_space_is_told_in_one_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as fault:
        space_of(text, "mine")
    assert "\n" not in str(fault.value)


def test_a_space_that_is_not_there_names_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.py cannot be read"):
        read_space(str(tmp_path / "nowhere.py"))


def test_the_grid_drops_what_does_not_count_and_so_has_each_trial_once() -> None:
    assert list(spaces.scored().grid_points()) == [
        {"kind": "round"},
        {"kind": "square", "side": 1},
        {"kind": "square", "side": 2},
    ]
