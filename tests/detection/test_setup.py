"""What the settings and presets of a detector's job come to: its options, rate and steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import TrainDetectorJob
from pipeline.config.detection import presets
from pipeline.detection.options import DetectorOptions, default_options
from pipeline.detection.setup import build, options_of, read_start, set_up
from pipeline.errors import ConfigError, WeightsError
from tests.detection.runs import ALONE, a_job, write_material


def preset(name: str, **changes: Any) -> TrainDetectorJob:
    return TrainDetectorJob.model_validate({"labels": "t", **presets()[name], **changes})


def options(job: TrainDetectorJob, *, from_scratch: bool = False) -> DetectorOptions:
    return options_of(job, from_scratch=from_scratch, num_classes=1)


def num_steps(job: TrainDetectorJob) -> int:
    return job.num_epochs * job.steps_per_epoch


@pytest.mark.parametrize("name", presets())
def test_every_preset_describes_a_detector(name: str) -> None:
    job = preset(name)
    from_scratch = job.detector.init == "none"
    assert options(job, from_scratch=from_scratch) == default_options(
        job.detector.kind, norm=job.detector.norm
    )


def test_lost_is_what_lost_trains() -> None:
    job = preset("lost")
    assert (job.lr, job.batch_size, num_steps(job)) == (0.02, 16, 24_000)
    assert (job.optim.momentum, job.optim.weight_decay) == (0.9, 1e-4)
    assert (job.optim.warmup_steps, job.optim.milestones) == (100, (0.75, 11 / 12))
    schedule = rates(job)
    assert schedule[[0, 99, 100, 17_999]] == pytest.approx([2e-5, 0.0198, 0.02, 0.02], rel=0.02)
    assert schedule[[18_000, 21_999, 22_000, 23_999]] == pytest.approx([2e-3, 2e-3, 2e-4, 2e-4])
    assert job.precise_bn == 200
    assert job.data.short_sides == tuple(range(480, 801, 32))
    assert (job.data.max_side, job.data.test_short_side) == (1333, 800)
    chosen = options(job)
    assert (chosen.kind, chosen.backbone, chosen.norm) == ("c4", "resnet50", "pooled")
    assert (chosen.freeze_at, chosen.extra_norm, chosen.num_classes) == (2, True, 1)
    assert (chosen.score_threshold, chosen.nms, chosen.roi_batch) == (0.01, 0.4, 512)


def test_solost_keeps_the_rate_of_16_images_at_2() -> None:
    job = preset("solost-repro")
    assert (job.lr, job.batch_size, num_steps(job)) == (0.02, 2, 10_000)
    assert rates(job)[[100, 9_999]] == pytest.approx([0.02, 0.02])
    assert options(job).norm == "batch"


def test_sane_scales_rate_and_steps_to_the_batch() -> None:
    whole, two = preset("sane"), preset("sane", batch_size=2)
    assert (whole.lr, num_steps(whole)) == (0.02, 24_000)
    assert (two.lr, num_steps(two)) == (0.0025, 8 * 24_000)
    # The rate falls after the same share of the images.
    assert rates(two)[[143_999, 144_000]] == pytest.approx([2.5e-3, 2.5e-4])


def rates(job: TrainDetectorJob) -> Any:
    """The learning rate of every step, as the loop asks for it."""
    from pipeline.detection.setup import _loop_settings

    rate = _loop_settings(job).learning_rate
    return torch.tensor([rate(step) for step in range(num_steps(job))], dtype=torch.float64).numpy()


def test_settings_win_over_what_the_kind_would_have() -> None:
    job = preset("nano", detector={"kind": "nano", "roi_batch": 8, "droploss": 0.01, "nms": 0.3})
    chosen = options(job)
    assert (chosen.roi_batch, chosen.droploss, chosen.nms) == (8, 0.01, 0.3)
    assert chosen.rpn_batch == default_options("nano").rpn_batch


def test_nothing_is_frozen_from_scratch_unless_it_is_said() -> None:
    job = preset("lost")
    assert options(job, from_scratch=True).freeze_at == 0
    frozen = preset("lost", detector={"freeze_at": 1})
    assert options(frozen, from_scratch=True).freeze_at == 1


def test_another_detectors_weights_are_refused_with_what_was_asked_for(tmp_path: Path) -> None:
    job = preset("nano")
    start = read_start("none")
    detector = build(job, start, num_classes=3)
    stored = type(start)("its folder", None, detector=detector)
    with pytest.raises(WeightsError, match=r"its folder holds another detector than .* nano"):
        build(job, stored, num_classes=1)
    with pytest.raises(
        WeightsError, match=r"must be dino, imagenet, timm, none, a file .* got absent"
    ):
        read_start("absent")


def test_more_workers_than_images_of_a_batch_are_refused() -> None:
    with pytest.raises(
        ValueError, match="--batch-size must be at least 4, 1 for each of 4 workers, got 2"
    ):
        preset("nano", batch_size=2, num_workers=4)
    with pytest.raises(ConfigError, match="anchor_sizes must be 5"):
        options(preset("fast-fpn", detector={"kind": "fpn", "anchor_sizes": [8.0]}))


def test_norms_do_not_decay_and_the_measured_images_are_not_those_of_the_steps(
    tmp_path: Path,
) -> None:
    setup = set_up(a_job(write_material(tmp_path), tmp_path / "runs"), ALONE)
    decays = {
        id(weight): group["weight_decay"]
        for group in setup.state.optimizer.param_groups
        for weight in group["params"]
    }
    named = dict(setup.task.objective.named_parameters())
    norms = {n: one for n, one in named.items() if ".bn" in n or "norm" in n or "downsample.1" in n}
    assert norms
    for name, weight in named.items():
        assert decays[id(weight)] == (0 if name in norms else 1e-4), name
    assert setup.measured is not None
    first = next(iter(setup.task.begin_epoch(0)))
    again, other = next(setup.batches_to_measure()), next(setup.batches_to_measure())
    assert [one["key"] for one in again[1]] == [one["key"] for one in other[1]]
    keys = {int(one["key"]) for one in again[1]}
    assert keys.isdisjoint(sample.key for sample in first.samples)
