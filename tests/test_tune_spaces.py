"""Every sample and every grid point of a search space is a legal configuration of its job."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from pipeline.tuning.proposals import propose
from pipeline.tuning.space import Space, Values, read_space
from pipeline.tuning.tuned_job import settings_of
from tests.conftest import ROOT

SPACES = ["drloc", "localization", "dino", "detection"]

BASES: dict[str, dict[str, Any]] = {
    "drloc": {"data": {"name": "cifar10", "root": "data"}},
    "localization": {"images": "photos", "output": "labels"},
    "dino": {"images": ["photos"], "output": "runs"},
    "detection": {"labels": "labels"},
}


def space_named(name: str) -> Space:
    return read_space(str(ROOT / "tune_spaces" / f"{name}.py"))


@pytest.mark.ray
@pytest.mark.parametrize("name", SPACES)
def test_fifty_different_samples_are_legal_and_tell_apart_by_what_counts(name: str) -> None:
    space = space_named(name)
    before: list[Values] = []
    for _ in range(50):
        values = propose(space, "random", seed=0, before=before, told=[])
        assert values is not None
        assert values not in before
        settings_of(space, BASES[name], values)
        for knob, (above, allowed) in space.conditions.items():
            assert (knob in values) == (values[above] in allowed)
        before.append(values)
    for knob in space.knobs:
        seen = {str(values[knob]) for values in before if knob in values}
        assert len(seen) > 1, f"{knob} never turned"


@pytest.mark.ray
@pytest.mark.parametrize("name", SPACES)
def test_every_point_of_the_papers_grid_is_legal_and_turns_what_it_says(name: str) -> None:
    space = space_named(name)
    points = list(space.grid_points())
    assert points
    for values in points:
        settings = settings_of(space, BASES[name], values).model_dump()
        for knob, value in values.items():
            group, _, field = knob.partition(".")
            assert settings[group][field] == value


@pytest.mark.ray
def test_the_drloc_grid_is_the_papers_tables_2a_and_2b() -> None:
    points = list(space_named("drloc").grid_points())
    assert [one["drloc.num_pairs"] for one in points if "drloc.num_pairs" in one] == [
        32, 64, 128, 256,
    ]  # fmt: skip
    assert [one["drloc.weight"] for one in points if "drloc.weight" in one] == [0.1, 0.5, 1.0]


@pytest.mark.parametrize("name", SPACES)
def test_every_range_has_its_reason_beside_it(name: str) -> None:
    lines = (Path(ROOT) / "tune_spaces" / f"{name}.py").read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if ": tune." in line:
            assert before.strip().startswith("#"), line
