"""Settings of a sweep that contradict each other are refused before anything starts."""

from typing import Any

import pytest

from pipeline.config.tuning import TuneJob


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"labels_for": "photos"}, "--labels-for and --ground-truth belong together"),
        ({"scheduler": "asha", "max_concurrent": 0}, "--scheduler asha compares trials"),
        ({"trial_workers": 2, "max_concurrent": 0}, "--trial-workers above 1 are Ray's"),
        ({"trial_workers": 2, "trial_gpus": 0.5}, "--trial-gpus must be 0 or 1 .* got 0.5"),
        ({"resume": "a", "name": "b"}, "--resume names the sweep"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TuneJob.model_validate({"space": "space.py", **fields})
