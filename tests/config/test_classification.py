"""Settings of a classifier that make no sense are refused with flag, range, value and remedy."""

from typing import Any

import pytest

from pipeline.command_line import parse
from pipeline.config import CompareJob, TrainClassifierJob, flatten
from pipeline.errors import ConfigError

NEEDED = ["--data.name", "cifar10", "--data.root", "data"]


def job(**changes: Any) -> TrainClassifierJob:
    """The default job; a change's name is dotted with two underscores: ``drloc__weight=0``."""
    values: dict[str, Any] = {"data": {"name": "cifar10", "root": "data"}}
    for name, value in changes.items():
        *groups, last = name.split("__")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return TrainClassifierJob.model_validate(values)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch-size", "33"], ["--batch-size must be even", "33", "mixup or cutmix"]),
        (
            ["--batch-size", "4", "--num-workers", "4"],
            ["--batch-size must be at least 8, 2 for each of 4 workers", "got 4; raise it"],
        ),
        (
            ["--batch-size", "6", "--num-workers", "2", "--optim.accumulate", "2"],
            ["--batch-size must be at least 8, 4 for each of 2 workers", "pairs", "parts"],
        ),
        (
            ["--model.pretrained", "--model.checkpoint", "weights.pth"],
            ["--model.pretrained and --model.checkpoint", "give one"],
        ),
        (
            ["--num-workers", "2", "--min-workers", "3"],
            ["--min-workers must be at most --num-workers, 2", "got 3"],
        ),
        (["--drloc.reduction", "paper", "--drloc.mode", "ce"], ["--drloc.reduction paper", "l1"]),
        (["--drloc.normalize", "side", "--drloc.mode", "cbr"], ["--drloc.normalize must be none"]),
        (["--epochs", "8"], ["--epochs", "8", "--optim.warmup-epochs 10"]),
        (["--epochs", "12", "--optim.cooldown-epochs", "3"], ["12", "--optim.cooldown-epochs 3"]),
        (["--data.validation-fraction", "0"], ["must be above 0", "--data.select-on-test"]),
        (["--data.validation-fraction", "1"], ["--data.validation-fraction: ", "less than 1"]),
        (["--data.train-per-class", "0"], ["--data.train-per-class: ", "equal to 1, got 0"]),
        (["--model.options", "[1, 2]"], ["--model.options", "'{embed_dim: 48}'", "'[1, 2]'"]),
        (["--model.options", "{a: [1}"], ["--model.options", "must be YAML"]),
        (["--model.image-size", "7"], ["--model.image-size: ", "equal to 8, got 7"]),
        (["--drloc.weight", "-0.1"], ["--drloc.weight: ", "equal to 0, got -0.1"]),
        (["--drloc.weight", "inf"], ["--drloc.weight: ", "finite", "inf"]),
        (["--drloc.num-pairs", "0"], ["--drloc.num-pairs: ", "equal to 1, got 0"]),
        (["--optim.lr", "0"], ["--optim.lr: ", "greater than 0, got 0.0"]),
        (["--optim.betas", "0.9", "1"], ["--optim.betas: ", "less than 1, got 1.0"]),
        (["--optim.layer-decay", "1.5"], ["--optim.layer-decay: ", "equal to 1, got 1.5"]),
        (["--augment.label-smoothing", "1"], ["--augment.label-smoothing: ", "less than 1"]),
        (["--timeout-s", "1"], ["--timeout-s: ", "equal to 10, got 1.0"]),
        (["--seed", "-1"], ["--seed: ", "equal to 0, got -1"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(flags: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as fault:
        parse(TrainClassifierJob, [*NEEDED, *flags])
    message = str(fault.value)
    assert [part for part in told if part not in message] == []
    assert "\n" not in message


def test_a_run_may_be_cut_within_its_warm_up_but_not_end_in_it() -> None:
    assert parse(TrainClassifierJob, [*NEEDED, "--stop-after", "5"]).num_epochs == 5
    with pytest.raises(ConfigError, match=r"--epochs 5 are fewer than --optim\.warmup-epochs 10"):
        parse(TrainClassifierJob, [*NEEDED, "--epochs", "5"])


def test_an_odd_batch_is_fine_where_nothing_is_mixed() -> None:
    none = ["--augment.mixup", "0", "--augment.cutmix", "0"]
    assert parse(TrainClassifierJob, [*NEEDED, "--batch-size", "33", *none]).batch_size == 33


def test_a_run_stops_at_the_first_of_its_ends() -> None:
    assert job(epochs=300, stop_after=101).num_epochs == 101
    assert job(epochs=50, stop_after=101).num_epochs == 50
    assert job(epochs=50).num_epochs == 50


def test_options_of_the_architecture_are_read_as_yaml() -> None:
    options = "{embed_dim: 48, depths: [2, 2, 2]}"
    parsed = parse(TrainClassifierJob, [*NEEDED, "--model.options", options])
    assert parsed.model.option_values() == {"embed_dim": 48, "depths": [2, 2, 2]}
    assert job().model.option_values() == {}


def test_what_a_run_is_named_by_leaves_out_what_changes_no_method() -> None:
    same = [
        job(num_workers=8, min_workers=2, use_gpu=True, cpus_per_worker=4, wait=True),
        job(tracking_uri="off", experiment="other", run_name="other", debug=True),
        job(output="s3://bucket/runs", overwrite=True, export="out", onnx=False),
        job(data__root="elsewhere", data__download=True, data__loader_workers=0),
        job(data__cache_mib=0, data__max_bad_fraction=0.5),
        job(max_failures=0, timeout_s=60, progress_seconds=1, gradient_norm_steps=0),
        job(channels_last=True, compile=True),
    ]
    assert [one.what_decides_the_weights() == job().what_decides_the_weights() for one in same] == (
        [True] * len(same)
    )


def test_a_cut_behind_the_end_makes_no_other_run() -> None:
    plain = job(epochs=50).what_decides_the_weights()
    assert job(epochs=50, stop_after=50).what_decides_the_weights() == plain
    assert job(epochs=50, stop_after=49).what_decides_the_weights() != plain


OTHER: dict[str, Any] = {
    "data__name": "cifar100",
    "data__train_per_class": 40,
    "data__validation_fraction": 0.2,
    "data__select_on_test": True,
    "epochs": 200,
    "stop_after": 50,
    "batch_size": 128,
    "precision": "bf16",
    "model__name": "resnet50",
    "model__image_size": 64,
    "model__patch_size": 2,
    "model__options": "{embed_dim: 48}",
    "model__drop_path": 0.2,
    "model__pretrained": True,
    "model__checkpoint": "weights.pth",
    "optim__kind": "sgd",
    "optim__lr": 1e-3,
    "optim__clip": 0.0,
    "optim__ema_decay": 0.999,
    "augment__crop": "pad",
    "augment__mixup": 0.0,
    "augment__normalize": "half",
    "augment__label_smoothing": 0.0,
}


@pytest.mark.parametrize("name", OTHER)
def test_whatever_else_changes_makes_another_run_and_another_pair(name: str) -> None:
    changed = job(**{name: OTHER[name]})
    assert changed.what_decides_the_weights() != job().what_decides_the_weights()
    assert changed.what_pairs() != job().what_pairs()


def test_a_run_is_paired_with_its_baseline_and_its_other_seeds() -> None:
    drloc = job(drloc__weight=0.5, drloc__num_pairs=32, drloc__mode="ce", drloc__schedule="ramp")
    baseline, other_seed = job(drloc__weight=0), job(drloc__weight=0.5, seed=7)
    assert drloc.what_pairs() == baseline.what_pairs() == other_seed.what_pairs()
    named = [one.what_decides_the_weights() for one in (drloc, baseline, other_seed)]
    assert named[0] != named[1] != named[2] != named[0]


def test_only_folders_and_tables_are_named_by_where_they_lie() -> None:
    for name in ("folder", "parquet"):
        first, second = (job(data__name=name, data__root=root) for root in ("a", "b"))
        assert first.what_pairs() != second.what_pairs()


def test_what_names_a_run_is_flat_json() -> None:
    values = job().what_decides_the_weights()
    assert values == flatten(values)
    assert values["optim.betas"] == [0.9, 0.999]


@pytest.mark.parametrize("flags", [[], ["--experiment", "a", "--runs", "b"]])
def test_a_comparison_reads_one_source(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="give --experiment NAME or --runs FOLDER, one of them"):
        parse(CompareJob, flags)


@pytest.mark.parametrize("confidence", ["0.5", "1", "95"])
def test_a_confidence_is_a_fraction_above_a_half(confidence: str) -> None:
    with pytest.raises(ConfigError, match="--confidence: "):
        parse(CompareJob, ["--runs", "runs", "--confidence", confidence])
