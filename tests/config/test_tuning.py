"""Settings of a sweep that contradict each other are refused before anything starts."""

from typing import Any

import pytest

from pipeline.command_line import parse
from pipeline.config.tuning import TuneJob
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"labels_for": "photos"}, "--labels-for and --ground-truth belong together"),
        ({"scheduler": "asha", "max_concurrent": 0}, "--scheduler asha compares trials"),
        ({"trial_workers": 2, "max_concurrent": 0}, "--trial-workers above 1 are Ray's"),
        ({"trial_workers": 2, "trial_gpus": 0.5}, "--trial-gpus must be 0 or 1 .* got 0.5"),
        (
            {"scheduler": "pbt"},
            "--scheduler pbt, .* is not offered any more: asha stops",
        ),
        ({"resume": "a", "name": "b"}, "--resume names the sweep"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TuneJob.model_validate({"space": "space.py", **fields})


def test_population_based_training_is_refused_in_one_line_with_code_2() -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(TuneJob, ["--space", "space.py", "--scheduler", "pbt"])
    assert refusal.value.exit_code == 2
    (line,) = str(refusal.value).splitlines()
    assert "asha stops the trials that are behind" in line
