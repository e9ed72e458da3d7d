"""Every sample of a search space is a legal configuration."""

import random
from typing import Any

import pytest

from pipeline.config import LabelJob


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        group, _, field = name.partition(".")
        tree.setdefault(group, {})[field] = value
    return tree


@pytest.mark.ray
def test_every_sample_of_the_localization_space_is_legal() -> None:
    from tune_spaces.localization import SPACE

    random.seed(0)
    seen = set()
    for _ in range(50):
        sample = {name: domain.sample() for name, domain in SPACE.items()}
        job = LabelJob.model_validate({"images": "a", "output": "b", **nested(sample)})
        seen.add(job.localization.rule)
    assert seen == {"lost", "solost"}
