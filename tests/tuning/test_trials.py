"""What a sweep leaves on the disk is enough to go on with it, and nothing comes twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.tuning import TuneJob
from pipeline.errors import ConfigError, StorageError
from pipeline.storage import Location
from pipeline.tuning.space import Space, space_of
from pipeline.tuning.trials import SweepFolder, Trial, best_of, proposal, sweep_name
from tests.tuning import spaces

pytestmark = pytest.mark.ray


def job(**fields: Any) -> TuneJob:
    return TuneJob.model_validate({"space": "scored.py", "tracking_uri": "off", **fields})


def begun(place: Path, space: Space, wanted: TuneJob) -> SweepFolder:
    folder = SweepFolder(Location.parse(str(place)))
    with folder.held():
        settled, _ = folder.settled(wanted, space)
        folder.begin(settled, space, {"epochs": 3, "stages": (1, 2)})
    return folder


def ended(number: int, metric: float | None = 0.5, status: Any = "ok") -> Trial:
    one = proposal(number, {"x": 0.1 * number})
    return Trial(one.number, one.id, one.values, status, metric, 1.0)


def test_a_folder_read_again_holds_the_same_proposals_and_trials(tmp_path: Path) -> None:
    space = spaces.scored()
    folder = begun(tmp_path / "s", space, job(seed=4, num_samples=7))
    for number in (1, 2, 3):
        folder.add_proposal(proposal(number, {"x": 0.1 * number, "sides": (1, 2)}))
    folder.add_trial(ended(2))
    again = SweepFolder(Location.parse(str(tmp_path / "s")))
    settled, base = again.settled(job(resume="s"), space)
    assert again.proposals == folder.proposals
    assert again.trials == folder.trials
    assert [one.number for one in again.unfinished] == [1, 3]
    assert (settled.seed, settled.num_samples) == (4, 7)
    assert base == {"epochs": 3, "stages": [1, 2]}


def test_a_trial_ends_once(tmp_path: Path) -> None:
    folder = begun(tmp_path / "s", spaces.scored(), job())
    folder.add_trial(ended(1))
    with pytest.raises(ValueError, match="trial 1 has ended already"):
        folder.add_trial(ended(1))
    assert len((tmp_path / "s" / "trials.jsonl").read_text().splitlines()) == 1


def test_a_second_sweep_of_a_name_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    space = spaces.scored()
    begun(tmp_path / "s", space, job(seed=4))
    before = (tmp_path / "s" / "sweep.yaml").read_text()
    with pytest.raises(StorageError, match="--resume s goes on with it"):
        begun(tmp_path / "s", space, job(seed=5))
    assert (tmp_path / "s" / "sweep.yaml").read_text() == before


def test_two_processes_cannot_hold_one_sweep(tmp_path: Path) -> None:
    folder = SweepFolder(Location.parse(str(tmp_path / "s")))
    rival = SweepFolder(Location.parse(str(tmp_path / "s")))
    with folder.held(), pytest.raises(StorageError, match="in use by process"), rival.held():
        pass


def test_a_sweep_refused_before_it_began_leaves_nothing(tmp_path: Path) -> None:
    folder = SweepFolder(Location.parse(str(tmp_path / "s")))
    with pytest.raises(ConfigError), folder.held():
        raise ConfigError("wrong")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"search": "tpe"}, "--search must stay random in a sweep that goes on, got tpe"),
        ({"seed": 9}, "--seed must stay 4"),
        ({"set": ("epochs=3",)}, "--set must stay"),
    ],
)
def test_a_resume_with_other_settings_is_refused(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    space = spaces.scored()
    begun(tmp_path / "s", space, job(seed=4))
    folder = SweepFolder(Location.parse(str(tmp_path / "s")))
    with pytest.raises(ConfigError, match=told):
        folder.settled(job(resume="s", **fields), space)


def test_a_resume_may_ask_for_more_trials_but_not_for_another_space(tmp_path: Path) -> None:
    space = spaces.scored()
    begun(tmp_path / "s", space, job(num_samples=3))
    folder = SweepFolder(Location.parse(str(tmp_path / "s")))
    settled, _ = folder.settled(job(resume="s", num_samples=5), space)
    assert settled.num_samples == 5
    other = space_of(spaces.SCORED.replace("-1.0", "-2.0"), "scored")
    with pytest.raises(ConfigError, match="not the file that this sweep began with"):
        folder.settled(job(resume="s"), other)


def kept_by_an_earlier_version(place: Path, **settings: Any) -> SweepFolder:
    """A sweep of two trials, one of which has ended, as versions with populations left it."""
    folder = begun(place, spaces.scored(), job(seed=4, num_samples=7))
    for number in (1, 2):
        folder.add_proposal(proposal(number, {"x": 0.1 * number}))
    folder.add_trial(ended(1))
    for name in ("proposals.jsonl", "trials.jsonl"):
        lines = [json.loads(line) for line in (place / name).read_text().splitlines()]
        told = [json.dumps({**line, "segment": None}) + "\n" for line in lines]
        (place / name).write_text("".join(told))
    kept = yaml.safe_load((place / "sweep.yaml").read_text())
    (place / "sweep.yaml").write_text(yaml.safe_dump({**kept, "perturb_epochs": 5, **settings}))
    return SweepFolder(Location.parse(str(place)))


def test_a_sweep_that_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    folder = kept_by_an_earlier_version(tmp_path / "s")
    settled, base = folder.settled(job(resume="s"), spaces.scored())
    assert (settled.seed, settled.num_samples) == (4, 7)
    assert base == {"epochs": 3, "stages": [1, 2]}
    assert folder.trials == (ended(1),)
    assert [one.number for one in folder.unfinished] == [2]


def test_a_population_that_an_earlier_version_began_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = kept_by_an_earlier_version(tmp_path / "s", scheduler="pbt")
    before = {file: file.read_bytes() for file in (tmp_path / "s").iterdir()}
    with pytest.raises(ConfigError, match=r"--resume s: population based .* asha") as refusal:
        folder.settled(job(resume="s"), spaces.scored())
    assert "\n" not in str(refusal.value)
    assert {file: file.read_bytes() for file in (tmp_path / "s").iterdir()} == before


def test_to_resume_what_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = SweepFolder(Location.parse(str(tmp_path / "s")))
    with pytest.raises(ConfigError, match="there is no sweep"):
        folder.settled(job(resume="s"), spaces.scored())


def test_a_sweeps_name_follows_what_decides_its_trials() -> None:
    space = spaces.scored()
    one = sweep_name(job(), space)
    assert one == sweep_name(job(num_samples=3, max_concurrent=2, experiment="other"), space)
    assert one != sweep_name(job(seed=1), space)
    assert sweep_name(job(name="mine"), space) == "mine"
    with pytest.raises(ConfigError, match="--name must be the name of a folder"):
        sweep_name(job(name="../mine"), space)


def test_the_best_trial_came_to_its_end_and_is_the_earlier_of_equals() -> None:
    trials = (
        ended(3, 0.7),
        ended(1, 0.9, "stopped"),
        ended(2, 0.7),
        ended(4, None, "failed"),
        ended(5, 0.1),
    )
    best = best_of(spaces.scored(), trials)
    assert best is not None
    assert best.number == 2
    lowest = space_of(spaces.SCORED.replace('"max"', '"min"'), "s")
    least = best_of(lowest, trials)
    assert least is not None
    assert least.number == 5
