"""Populations of small classifiers in this process: what is copied, what acts, what is left."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.cluster.tune import tune
from pipeline.config.tuning import TuneJob
from pipeline.errors import AllTrialsFailed, ConfigError
from pipeline.runs.folder import RunFolder
from pipeline.storage import Location
from pipeline.tuning import sweep as sweep_module
from pipeline.tuning.run_trial import TrialTask, run_trial
from pipeline.tuning.segment import SegmentTask
from pipeline.tuning.tuned_job import base_of
from tests.jobs import training
from tests.tuning import spaces
from tests.tuning.test_sweep import classifier_base

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPACE = """
from ray import tune
JOB, METRIC, MODE, PICK = "classifier", "val/accuracy", "max", "best"
SPACE = {"optim.lr": tune.choice([0.001, 0.003, 1e30]), "drloc.hidden_dim": tune.choice([16])}
MUTABLE = ("optim.lr",)
"""
EPOCHS = 5


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.write_classes(tmp_path_factory.mktemp("data") / "pictures", num_train=16)


def job(folder: Path, pictures: Path, **fields: Any) -> TuneJob:
    given = {"name": "s", "scheduler": "pbt", "perturb_epochs": 2, "num_samples": 3}
    if "resume" in fields:
        given = {}
    return TuneJob.model_validate(
        {
            "space": str(spaces.write(folder, SPACE)),
            "output": str(folder / "sweeps"),
            "set": () if "resume" in fields else (*classifier_base(pictures), f"epochs={EPOCHS}"),
            "max_concurrent": 0,
            "tracking_uri": "off",
            **given,
            **fields,
        }
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "sweeps" / "s" / "trials.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def alike(folder: Path) -> list[dict[str, Any]]:
    """The trials without what two sweeps may differ in."""
    return [
        {name: one[name] for name in ("number", "values", "status", "metric", "segment")}
        for one in lines(folder)
    ]


def state_of(folder: str | Path) -> dict[str, Any]:
    """All of the newest checkpoint of a run, as flat tensors and values."""
    latest = RunFolder(Location.parse(str(folder))).checkpoints.latest()
    assert latest is not None
    return flat(latest.state["loop"])


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key in tree for k, v in flat(tree[key], f"{name}.{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, one in enumerate(tree) for k, v in flat(one, f"{name}.{i}").items()}
    return {name: tree}


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name])
        if isinstance(one[name], torch.Tensor)
        else one[name] == other[name]
        for name in one
    )


def numbers_of(folder: str | Path) -> list[dict[str, float]]:
    """A run's history, without how long it took."""
    timed = ("seconds", "train/images_per_second")
    history = RunFolder(Location.parse(str(folder))).history()
    return [{name: v for name, v in one.items() if name not in timed} for one in history]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A population of three, of which one diverges at once, trained without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert tune(job(folder, pictures)) == 0
    return folder


def test_a_member_that_diverges_goes_on_from_a_copy_of_a_good_one(whole: Path) -> None:
    trials = {one["number"]: one for one in lines(whole)}
    assert [one["segment"]["generation"] for one in trials.values()] == [1] * 3 + [2] * 3 + [3] * 3
    first = [trials[number] for number in (1, 2, 3)]
    (diverged,) = (one for one in first if one["status"] == "failed")
    assert diverged["values"]["optim.lr"] == 1e30
    after = trials[diverged["number"] + 3]
    parent = trials[after["segment"]["parent"]]
    assert parent["metric"] == max(one["metric"] for one in first if one is not diverged)
    history = numbers_of(trials[parent["number"]]["folder"])
    if after["status"] == "part":
        assert numbers_of(after["folder"])[:2] == history
    assert {one["status"] for one in trials.values() if one["segment"]["until"] == EPOCHS} <= {
        "ok",
        "failed",
    }


def test_a_member_that_is_never_replaced_is_the_run_that_was_never_cut_bit_for_bit(
    whole: Path, pictures: Path, tmp_path: Path
) -> None:
    trials = lines(whole)
    kept = [
        member
        for member in (1, 2, 3)
        if all(
            one["segment"]["parent"] in (None, one["number"] - 3) and one["status"] != "failed"
            for one in trials
            if one["segment"]["member"] == member
        )
    ]
    assert kept
    for member in kept:
        segments = [one for one in trials if one["segment"]["member"] == member]
        base = base_of(job(tmp_path, pictures), spaces_of(tmp_path))
        task = TrialTask("space", SPACE, base, str(tmp_path / f"plain-{member}"))
        plain = run_trial(task, segments[0]["values"], lambda epoch, metric: None)
        assert plain.folder is not None
        assert numbers_of(segments[-1]["folder"]) == numbers_of(plain.folder)
        assert same_bits(state_of(segments[-1]["folder"]), state_of(plain.folder))
        # Not the files: they tell when they were made.
        ours, theirs = (
            load_file(Path(place) / "model" / "model.safetensors")
            for place in (segments[-1]["folder"], plain.folder)
        )
        assert same_bits(ours, theirs)
        assert segments[-1]["metric"] == plain.metric
        assert segments[-1]["numbers"] == plain.numbers


def spaces_of(folder: Path) -> Any:
    from pipeline.tuning.space import read_space

    return read_space(str(spaces.write(folder, SPACE)))


def test_the_results_are_those_of_the_last_generation_with_the_way_that_led_there(
    whole: Path,
) -> None:
    sweep = whole / "sweeps" / "s"
    trials = {one["number"]: one for one in lines(whole)}
    best = max(
        (one for one in trials.values() if one["status"] == "ok"),
        key=lambda one: (one["metric"], -one["number"]),
    )
    assert best["segment"]["generation"] == 3
    text = (sweep / "best.yaml").read_text()
    assert "Values after epoch 4; for those before see schedule.md" in text
    assert yaml.safe_load(text)["optim"]["lr"] == best["values"]["optim.lr"]
    spans = json.loads((sweep / "schedule.json").read_text())
    assert (spans[0]["first_epoch"], spans[-1]["last_epoch"]) == (1, EPOCHS)
    walked = [number for span in spans for number in span["trials"]]
    assert walked[-1] == best["number"]
    assert all(
        trials[number]["values"] == span["values"] for span in spans for number in span["trials"]
    )
    for before, number in zip([None, *walked], walked, strict=False):
        assert trials[number]["segment"]["parent"] == before
    assert (sweep / "schedule.md").read_text().startswith("| epochs | trials | optim.lr")
    assert "| trial | generation | member | parent | status |" in (sweep / "table.md").read_text()
    assert not (sweep / "importance.json").exists()
    assert (sweep / "pictures" / "slices.png").exists()


def test_only_the_checkpoints_of_the_last_generation_are_kept_and_all_histories(
    whole: Path,
) -> None:
    for one in lines(whole):
        run = Path(one["folder"]) if one["folder"] else None
        runs = list((whole / "sweeps" / "s" / "runs" / one["id"]).iterdir())
        has = [place for place in runs if (place / "checkpoints").exists()]
        if one["segment"]["generation"] < 3:
            assert has == []
        elif one["status"] == "ok":
            assert has == [run]
        if one["status"] != "failed":
            assert run is not None
            assert len(numbers_of(run)) == one["segment"]["until"]
            assert (run / "config.yaml").exists()


@pytest.mark.parametrize("calls_before", [1, 4, 6])
def test_a_sweep_that_ends_between_a_segments_last_checkpoint_and_its_record_goes_on_exactly(
    whole: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls_before: int,
) -> None:
    calls: list[int] = []

    def interrupted(*args: Any, **named: Any) -> Any:
        outcome = run_trial(*args, **named)
        calls.append(1)
        if len(calls) == calls_before:
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(sweep_module, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(job(tmp_path, pictures))
    assert len(lines_or_none(tmp_path)) == calls_before - 1
    tune(job(tmp_path, pictures, resume="s"))
    assert alike(tmp_path) == alike(whole)
    for ours, theirs in zip(lines(tmp_path)[6:], lines(whole)[6:], strict=True):
        if ours["status"] == "ok":
            assert same_bits(state_of(ours["folder"]), state_of(theirs["folder"]))


def lines_or_none(folder: Path) -> list[dict[str, Any]]:
    return lines(folder) if (folder / "sweeps" / "s" / "trials.jsonl").exists() else []


def test_a_population_that_goes_on_keeps_its_size_and_its_generations(
    whole: Path, pictures: Path
) -> None:
    with pytest.raises(ConfigError, match="--num-samples must stay 3 in a population"):
        tune(job(whole, pictures, resume="s", num_samples=4))
    with pytest.raises(ConfigError, match="--perturb-epochs must stay 2"):
        tune(job(whole, pictures, resume="s", perturb_epochs=3))


def test_a_population_in_which_all_fail_ends_with_the_reason(
    pictures: Path, tmp_path: Path
) -> None:
    settings = (*classifier_base(pictures), f"epochs={EPOCHS}", "drloc.weight=1e30")
    with pytest.raises(AllTrialsFailed, match="not finite"):
        tune(job(tmp_path, pictures, set=settings))
    assert len(lines(tmp_path)) == 3


def test_mlflow_has_a_run_for_each_segment_with_its_place_and_its_own_epochs(
    pictures: Path, tmp_path: Path, mlflow_uri: str
) -> None:
    from pipeline.tracking.tracker import connect

    tune(job(tmp_path, pictures, tracking_uri=mlflow_uri, num_samples=2, perturb_epochs=3))
    client, _ = connect(mlflow_uri)
    (experiment,) = (one for one in client.search_experiments() if one.name == "patchseed")
    runs = client.search_runs([experiment.experiment_id])
    children = {
        int(run.data.tags["patchseed.trial"]): run
        for run in runs
        if run.data.tags["patchseed.kind"] == "trial"
    }
    assert sorted(children) == [1, 2, 3, 4]
    for one in lines(tmp_path):
        tags = children[one["number"]].data.tags
        segment = one["segment"]
        assert tags["patchseed.generation"] == str(segment["generation"])
        assert tags["patchseed.member"] == str(segment["member"])
        assert tags.get("patchseed.parent") == (
            None if segment["parent"] is None else str(segment["parent"])
        )
        if one["status"] != "failed":
            run_id = children[one["number"]].info.run_id
            steps = [m.step for m in client.get_metric_history(run_id, "val/accuracy")]
            assert steps == list(range(segment["after"] + 1, segment["until"] + 1))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> tuple[TrialTask, str]:
    """A run of one epoch of two, and what its children share with it."""
    folder = tmp_path_factory.mktemp("parent")
    base = base_of(job(folder, pictures), spaces_of(folder))
    task = TrialTask("space", SPACE, {**base, "epochs": 3}, str(folder))
    values = {"optim.lr": 0.003}
    first = SegmentTask(str(folder / "first"), 0, 1, None)
    outcome = run_trial(task, values, lambda epoch, metric: None, segment=first)
    assert (outcome.status, outcome.epochs) == ("part", 1)
    assert outcome.folder is not None
    return task, outcome.folder


@pytest.mark.parametrize(
    "changed",
    [
        {"optim.lr": 0.0024},
        {"optim.weight_decay": 0.06},
        {"optim.betas": [0.8, 0.999]},
        {"drloc.weight": 0.6},
        {"drloc.num_pairs": 32},
        {"optim.clip": 0.01},
    ],
)
def test_a_changed_knob_acts_from_the_first_step_after_the_copy(
    parent: tuple[TrialTask, str], tmp_path: Path, changed: dict[str, Any]
) -> None:
    task, folder = parent
    second = SegmentTask("", 1, 2, folder)
    states = {}
    for name, values in (("same", {}), ("changed", changed)):
        segment = replace(second, output=str(tmp_path / name))
        given = {"optim.lr": 0.003, **values}
        outcome = run_trial(task, given, lambda epoch, metric: None, segment=segment)
        assert outcome.status == "part", asdict(outcome)
        states[name] = state_of(str(outcome.folder))
    weights = [name for name in states["same"] if name.startswith(".objective.classifier")]
    moved = [n for n in weights if not torch.equal(states["same"][n], states["changed"][n])]
    assert len(moved) > len(weights) // 2
    if "optim.weight_decay" in changed:
        assert states["changed"][".optimizer.param_groups.0.weight_decay"] == 0.06
