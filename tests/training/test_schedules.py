"""Schedules equal the released code's, and timm's."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from pipeline.training.schedules import (
    cosine,
    drloc_weight,
    ramp,
    ramp_decay,
    teacher_temperature,
    warmup_cosine,
    warmup_cosine_one_late,
    warmup_then_cosine,
)
from tests.conftest import ReadGolden

# 48 steps per epoch at batch 1024: 20 epochs of warm-up in 300.
RELEASED: dict[str, Any] = {
    "peak": 1e-3,
    "total_steps": 300 * 48,
    "warmup_steps": 20 * 48,
    "warmup_start": 1e-6,
    "floor": 1e-5,
}


@pytest.fixture(scope="module")
def golden(read_golden: ReadGolden) -> dict[str, Any]:
    return read_golden("drloc.npz")


def test_learning_rates_equal_the_released_ones_of_all_updates(golden: dict[str, Any]) -> None:
    expected = golden["lr/cifar_bs1024_peak1e-3_per_step_first101epochs"]
    assert len(expected) == 4848
    late = [warmup_cosine_one_late(step, **RELEASED) for step in range(4848)]
    np.testing.assert_allclose(late, expected, rtol=1e-12)
    rates = [warmup_cosine(step, **RELEASED) for step in range(4847)]
    np.testing.assert_allclose(rates, expected[1:], rtol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    total=st.integers(1, 50),
    warmup=st.integers(0, 60),
    peak=st.floats(1e-4, 1),
    floor=st.floats(0, 1e-4),
)
def test_learning_rates_equal_timms_through_cool_down(
    total: int, warmup: int, peak: float, floor: float
) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    timms = CosineLRScheduler(
        optimizer,
        t_initial=total,
        lr_min=floor,
        warmup_t=warmup,
        warmup_lr_init=1e-7,
        t_in_epochs=False,
    )
    for step in range(70):
        timms.step_update(step)
        ours = warmup_cosine(
            step,
            peak=peak,
            total_steps=total,
            warmup_steps=warmup,
            warmup_start=1e-7,
            floor=floor,
        )
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_without_warm_up_the_first_update_has_the_peak() -> None:
    assert warmup_cosine(0, peak=0.5, total_steps=10) == 0.5


def test_cool_down_holds_the_floor() -> None:
    late = [warmup_cosine(step, peak=1, total_steps=10, floor=0.1) for step in (10, 11, 500)]
    assert late == [0.1] * 3


@pytest.mark.parametrize(
    "wrong", [{"total_steps": 0}, {"step": -1}, {"warmup_steps": -1, "total_steps": 1}]
)
def test_impossible_steps_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="total_steps must be at least 1, step and warmup_steps"):
        warmup_cosine(**({"step": 0, "total_steps": 1, "peak": 1.0} | wrong))


@pytest.mark.parametrize(
    ("warmup", "total"), [(0, 9), (1, 9), (2, 9), (10, 100), (8, 9), (9, 9), (1, 1), (0, 1)]
)
@pytest.mark.parametrize(("peak", "floor"), [(5e-4, 1e-6), (1.0, 0.0), (0.1, 0.1)])
def test_dinos_learning_rate_is_a_line_and_then_a_cosine_from_the_peak(
    warmup: int, total: int, peak: float, floor: float
) -> None:
    """As the released code writes it: numpy's line, then a cosine over what is left."""
    line = np.linspace(0, peak, warmup)
    left = np.arange(total - warmup)
    falling = floor + 0.5 * (peak - floor) * (1 + np.cos(np.pi * left / max(len(left), 1)))
    expected = [*line, *falling, floor, floor]
    found = [
        warmup_then_cosine(step, peak=peak, floor=floor, warmup_steps=warmup, total_steps=total)
        for step in range(total + 2)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=0)
    if 1 < warmup < total:
        assert (found[0], found[warmup - 1], found[warmup]) == (0, peak, peak)


@pytest.mark.parametrize(
    "wrong", [{"warmup_steps": 3}, {"warmup_steps": -1}, {"step": -1}, {"total_steps": -1}]
)
def test_impossible_steps_of_dinos_learning_rate_are_refused(wrong: dict[str, int]) -> None:
    steps = {"step": 0, "warmup_steps": 0, "total_steps": 2} | wrong
    with pytest.raises(ValueError, match=r"warmup_steps must be in \[0, total_steps\] and step at"):
        warmup_then_cosine(**steps, peak=1.0, floor=0.0)


@pytest.mark.parametrize(("weight", "total"), [(0.5, 300), (0.1, 300), (0.5, 100)])
def test_loss_weights_equal_the_released_ones(
    golden: dict[str, Any], weight: float, total: int
) -> None:
    expected = golden[f"lambda/lam{weight}_wu20_tot{total}"]
    found = [
        drloc_weight(
            epoch, weight=weight, schedule="ramp_decay", ramp_epochs=20, total_epochs=total
        )
        for epoch in range(total + 1)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_a_ramp_of_no_epochs_starts_at_the_full_weight() -> None:
    # The released code divides by zero here.
    assert ramp(0, weight=0.5, ramp_epochs=0) == 0.5
    decayed = [ramp_decay(e, weight=0.5, ramp_epochs=0, total_epochs=10) for e in (0, 5, 10, 11)]
    assert decayed == [0.5, 0.25, 0.0, 0.0]


def test_a_ramp_stays_up_and_constant_is_constant() -> None:
    rest: dict[str, Any] = {"weight": 0.5, "ramp_epochs": 4, "total_epochs": 10}
    ramped = [drloc_weight(epoch, schedule="ramp", **rest) for epoch in (0, 1, 2, 4, 9, 50)]
    assert ramped == [0.0, 0.125, 0.25, 0.5, 0.5, 0.5]
    assert {drloc_weight(epoch, schedule="constant", **rest) for epoch in range(50)} == {0.5}


@pytest.mark.parametrize(("ramp_epochs", "total"), [(20, 6), (6, 6), (0, 0), (3, 4)])
def test_no_length_of_run_breaks_the_decay(ramp_epochs: int, total: int) -> None:
    for epoch in range(30):
        weight = ramp_decay(epoch, weight=0.5, ramp_epochs=ramp_epochs, total_epochs=total)
        assert 0 <= weight <= 0.5


def test_an_unknown_schedule_is_refused() -> None:
    unknown: Any = "cosine"
    with pytest.raises(ValueError, match="schedule must be constant, ramp or ramp_decay, got 'cos"):
        drloc_weight(0, weight=1, schedule=unknown, ramp_epochs=1, total_epochs=2)


@pytest.mark.parametrize(("start", "end"), [(0.04, 0.4), (0.996, 1.0), (1.0, 0.2)])
@pytest.mark.parametrize("total", [1, 7, 1000])
def test_a_cosine_goes_from_its_start_to_its_end_and_stays(
    start: float, end: float, total: int
) -> None:
    found = [cosine(step, start=start, end=end, total_steps=total) for step in range(total + 3)]
    steps = np.arange(total)
    expected = end + (start - end) * (1 + np.cos(np.pi * steps / total)) / 2
    np.testing.assert_allclose(found, [*expected, end, end, end], rtol=1e-13)
    assert found[0] == pytest.approx(start, rel=1e-15)
    assert sorted(found, reverse=start > end) == found


def test_a_cosine_is_half_way_half_way() -> None:
    assert cosine(50, start=0.04, end=0.4, total_steps=100) == pytest.approx(0.22)
    assert cosine(25, start=0, end=1, total_steps=100) == pytest.approx(0.5 - math.sqrt(2) / 4)


@pytest.mark.parametrize("wrong", [{"total_steps": 0}, {"step": -1}])
def test_impossible_steps_of_a_cosine_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="total_steps must be at least 1 and step at least 0"):
        cosine(**({"step": 0, "total_steps": 1, "start": 0.0, "end": 1.0} | wrong))


def test_the_teachers_temperature_rises_in_a_line_and_stays() -> None:
    found = [
        teacher_temperature(epoch, start=0.04, end=0.07, warmup_epochs=30)
        for epoch in (0, 10, 15, 29, 30, 31, 300)
    ]
    assert found == pytest.approx([0.04, 0.05, 0.055, 0.069, 0.07, 0.07, 0.07], rel=1e-12)


def test_without_warm_up_the_teacher_has_its_last_temperature_from_the_start() -> None:
    assert teacher_temperature(0, start=0.02, end=0.07) == 0.07
    assert {teacher_temperature(epoch) for epoch in range(5)} == {0.04}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epoch": -1}, "epoch and warmup_epochs must be at least 0, got -1 and 0"),
        ({"warmup_epochs": -1}, "epoch and warmup_epochs must be at least 0, got 0 and -1"),
        ({"start": 0.0}, "temperatures must be above 0, got 0.0 and 0.04"),
        ({"end": math.nan}, "temperatures must be above 0, got 0.04 and nan"),
    ],
)
def test_impossible_temperatures_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher_temperature(**({"epoch": 0} | wrong))
