"""Sweeps in this process, from the job's settings to its files: faults, results, MLflow."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster.tune import tune
from pipeline.command_line import parse
from pipeline.config import LabelJob, TrainClassifierJob
from pipeline.config.tuning import TuneJob
from pipeline.errors import AllTrialsFailed, ConfigError
from pipeline.scenes.scenes import write_collection
from pipeline.tuning import sweep as sweep_module
from pipeline.tuning.results import importance, shown_metric
from pipeline.tuning.run_trial import TrialTask, run_trial
from pipeline.tuning.trials import Trial
from pipeline.tuning.tuned_job import base_of
from tests.conftest import ROOT
from tests.jobs import training
from tests.tuning import spaces

pytestmark = pytest.mark.ray


def job(folder: Path, source: str, **fields: Any) -> TuneJob:
    return TuneJob.model_validate(
        {
            "space": str(spaces.write(folder, source)),
            "output": str(folder / "sweeps"),
            "name": None if "resume" in fields else "s",
            "max_concurrent": 0,
            "tracking_uri": "off",
            **fields,
        }
    )


def lines(folder: Path, name: str = "trials.jsonl") -> list[dict[str, Any]]:
    text = (folder / "sweeps" / "s" / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_trials_that_raise_or_run_out_of_memory_or_give_nan_are_noted_and_the_sweep_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(job(tmp_path, spaces.FAULTY, search="grid")) == 0
    found = {one["values"]["fault"]: (one["status"], one["reason"]) for one in lines(tmp_path)}
    assert found == {
        "raise": ("failed", "RuntimeError: broken on purpose"),
        "nan": ("failed", "score is not finite: nan"),
        "memory": ("failed", "MemoryError: no memory on purpose"),
        "none": ("ok", None),
    }
    out = capsys.readouterr().out
    assert "trial 1 (1/4) failed score 1: RuntimeError: broken on purpose" in out
    assert "failed: 3 of 4 trials" in out
    table = (tmp_path / "sweeps" / "s" / "table.md").read_text()
    assert "MemoryError: no memory on purpose" in table


def test_a_sweep_in_which_all_fail_says_so_with_a_code_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(AllTrialsFailed, match=r"none of 2 trials .* broken on purpose") as fault:
        tune(job(tmp_path, spaces.FAILING, search="grid"))
    assert fault.value.exit_code == 9
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_an_interrupted_sweep_ends_in_the_trials_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str
) -> None:
    (tmp_path / "whole").mkdir()
    tune(job(tmp_path / "whole", spaces.SCORED, search=search, num_samples=14))
    calls: list[int] = []

    def interrupted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return run_trial(*args, **named)

    monkeypatch.setattr(sweep_module, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(job(tmp_path, spaces.SCORED, search=search, num_samples=14))
    assert (len(lines(tmp_path)), len(lines(tmp_path, "proposals.jsonl"))) == (11, 12)
    tune(job(tmp_path, spaces.SCORED, resume="s"))
    assert len(calls) == 15

    def told(folder: Path) -> list[Any]:
        return [(one["number"], one["values"], one["metric"]) for one in lines(folder)]

    assert told(tmp_path) == told(tmp_path / "whole")
    # Nothing is left to do: the results are told again.
    tune(job(tmp_path, spaces.SCORED, resume="s"))
    assert len(calls) == 15


def test_the_best_settings_are_what_the_labelling_job_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = write_collection(tmp_path / "scenes", num_scenes=6, seed=1)
    monkeypatch.chdir(tmp_path)
    flags = job(
        tmp_path,
        "",
        space=str(ROOT / "tune_spaces" / "localization.py"),
        labels_for="scenes/images",
        ground_truth=str(truth),
        num_samples=3,
        set=("backbone.name=vit_nano_patch8.dino", "decode.max-side=128"),
    )
    assert tune(flags) == 0
    folder = tmp_path / "sweeps" / "s"
    best = max(lines(tmp_path), key=lambda one: one["metric"])
    args = ["--config", str(folder / "best.yaml"), "--output", "labels"]
    label: LabelJob = parse(LabelJob, args)
    assert label.images == str(tmp_path / "scenes" / "images")
    assert label.decode.max_side == 128
    assert label.localization.rule == best["values"]["localization.rule"]
    assert label.backbone.block == best["values"]["backbone.block"]
    assert not (folder / "features").exists()
    assert (folder / "pictures" / "slices.png").read_bytes().startswith(b"\x89PNG")


CLASSIFIER = """
from ray import tune
JOB, METRIC, MODE, PICK = "classifier", "val/accuracy", "max", "best"
SPACE = {
    "optim.lr": tune.choice([0.003, 1e30]),
    "drloc.num_pairs": tune.choice([8, 16]),
}
GRID = [{"optim.lr": [0.003], "drloc.num_pairs": [8, 16]}, {"optim.lr": [1e30]}]
"""


def classifier_base(pictures: Path) -> tuple[str, ...]:
    return (
        *("data.name=folder", f"data.root={pictures}", "data.loader_workers=0", "epochs=2"),
        *("batch_size=16", "optim.warmup_epochs=1", "optim.lr_batch=null", "optim.clip=0"),
        *("model.image_size=32", "model.patch_size=4", "drloc.hidden_dim=16"),
        f"model.options='{training.NARROW}'",
    )


@pytest.mark.slow
def test_a_sweep_of_classifiers_trains_each_in_a_folder_and_records_them_below_one_run(
    tmp_path: Path, mlflow_uri: str
) -> None:
    from pipeline.tracking.tracker import connect

    pictures = training.write_classes(tmp_path / "pictures", num_train=16)
    fields = {"search": "grid", "set": classifier_base(pictures), "tracking_uri": mlflow_uri}
    tune(job(tmp_path, CLASSIFIER, **fields))
    first, second, diverged = lines(tmp_path)
    assert (first["status"], second["status"]) == ("ok", "ok")
    assert first["metric"] == first["numbers"]["val/accuracy_best"]
    assert first["folder"] != second["folder"]
    assert diverged["status"] == "failed"
    assert "not finite" in diverged["reason"]
    best = yaml.safe_load((tmp_path / "sweeps" / "s" / "best.yaml").read_text())
    classifier: TrainClassifierJob = parse(
        TrainClassifierJob, ["--config", str(tmp_path / "sweeps" / "s" / "best.yaml")]
    )
    assert classifier.optim.lr == best["optim"]["lr"] == 0.003
    # Told again, as after a kill: no run more.
    for _ in range(2):
        client, _ = connect(mlflow_uri)
        (experiment,) = (one for one in client.search_experiments() if one.name == "patchseed")
        runs = client.search_runs([experiment.experiment_id])
        kinds = [run.data.tags["patchseed.kind"] for run in runs]
        assert sorted(kinds) == ["sweep", "trial", "trial", "trial"]
        (sweep,) = (run for run in runs if run.data.tags["patchseed.kind"] == "sweep")
        below = [run for run in runs if run is not sweep]
        parents = {run.data.tags["mlflow.parentRunId"] for run in below}
        assert parents == {sweep.info.run_id}
        assert sorted(run.info.status for run in below) == ["FAILED", "FINISHED", "FINISHED"]
        history = client.get_metric_history(
            next(run.info.run_id for run in below if run.info.run_name == first["id"]),
            "val/accuracy",
        )
        assert [one.step for one in history] == [1, 2]
        tune(job(tmp_path, CLASSIFIER, resume="s", tracking_uri=mlflow_uri))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"set": ("epochs=0",)}, "epochs: Input should be greater than or equal to 1, got 0"),
        ({"set": ("drloc.pears=3",)}, "drloc.pears: Extra inputs are not permitted"),
        ({"set": ("epochs",)}, "--set must be NAME=VALUE"),
        ({"base_preset": "nowhere"}, "--base-preset nowhere is unknown"),
        ({"labels_for": "a", "ground_truth": "b"}, "takes no --labels-for"),
        ({"base": "nowhere.yaml"}, "--base nowhere.yaml cannot be read"),
    ],
)
def test_a_base_that_is_wrong_is_refused_before_anything_is_tried(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    given = {"set": ("data.name=cifar10", "data.root=data"), **fields}
    given["set"] = ("data.name=cifar10", "data.root=data", *given["set"])
    with pytest.raises(ConfigError, match=told):
        tune(job(tmp_path, CLASSIFIER, **given))
    assert not (tmp_path / "sweeps" / "s").exists()


def test_a_metric_of_a_probe_needs_the_photos_it_is_measured_on(tmp_path: Path) -> None:
    from pipeline.tuning.space import read_space

    flags = job(tmp_path, "", space=str(ROOT / "tune_spaces" / "dino.py"), set=("images=[a]",))
    with pytest.raises(ConfigError, match=r"probe/corloc is measured on photos .* --set"):
        base_of(flags, read_space(flags.space))


def test_importance_names_the_knob_that_decides() -> None:
    space = spaces.scored()
    trials = []
    for number in range(1, 41):
        values = {"x": (number * 0.37) % 2 - 1, "kind": ["round", "square"][number % 2]}
        task = TrialTask("scored", spaces.SCORED, {}, "nowhere")
        outcome = run_trial(task, values, lambda epoch, metric: None)
        trials.append(Trial(number, str(number), values, "ok", outcome.metric, 0.0))
    weights = importance(space, trials)
    assert list(weights) == ["x", "kind"]
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["x"] > 0.6
    assert importance(space, trials[:7]) == {}


def test_rates_are_shown_in_percent() -> None:
    assert shown_metric("val/accuracy", 0.514) == "51.4%"
    assert shown_metric("loss", 0.514) == "0.514"
    assert shown_metric("loss", None) == "-"
