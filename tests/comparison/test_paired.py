"""Paired runs: statistics against textbook and slow loops, pairing by hand-made cases."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.comparison.paired import (
    MOST_SEEDS_FLIPPED,
    Comparison,
    RecordedRun,
    compare,
    difference_of,
    holm,
    sign_flip_p,
    verdict_of,
)
from pipeline.errors import DataError

METRIC = "test/accuracy_selected"
ACCURACIES = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), min_size=2, max_size=8
)


def run(
    value: float | None,
    *,
    weight: float = 0.0,
    seed: int = 0,
    key: str = "k",
    metric: str = METRIC,
    finished: bool = True,
    **config: Any,
) -> RecordedRun:
    """A run of group ``key``; ``config`` names settings with ``__`` for a dot."""
    settings = {name.replace("__", "."): str(setting) for name, setting in config.items()}
    texts = {"drloc.weight": str(weight), "seed": str(seed), **settings}
    metrics = {} if value is None else {metric: value}
    name = f"{key}-{weight}-{seed}-{sorted(settings.items())}"
    return RecordedRun(name, texts, metrics, key, name, seed, weight, finished, f"runs/{name}")


def pairs(baseline: Sequence[float], treated: Sequence[float], **config: Any) -> list[RecordedRun]:
    """Runs of the seeds 0, 1, ... with weight 0 and with weight 0.5."""
    runs = [run(value, seed=seed, **config) for seed, value in enumerate(baseline)]
    return runs + [
        run(value, weight=0.5, seed=seed, **config) for seed, value in enumerate(treated)
    ]


def compared(records: Sequence[RecordedRun], **how: Any) -> Comparison:
    return compare(records, METRIC, **how)


def slow_sign_flip_p(differences: Sequence[int]) -> float:
    """Every pattern of signs, one at a time, in whole numbers."""
    extreme = 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        total = sum(sign * one for sign, one in zip(signs, differences, strict=True))
        extreme += abs(total) >= abs(sum(differences))
    return float(extreme / 2 ** len(differences))


def textbook_t(difference: Any, confidence: float) -> tuple[float, float, float]:
    """Ends of the paired interval and the two-sided p, from Student's distribution itself."""
    mean, error = difference.mean(), difference.std(ddof=1) / math.sqrt(len(difference))
    reach = error * stats.t.ppf((1 + confidence) / 2, len(difference) - 1)
    return mean - reach, mean + reach, 2 * stats.t.sf(abs(mean) / error, len(difference) - 1)


@given(ACCURACIES, st.sampled_from([0.8, 0.95, 0.99]))
@settings(derandomize=True, max_examples=150, deadline=None)
def test_interval_and_p_are_those_of_the_textbooks_paired_t_test(
    counts: list[tuple[int, int]], confidence: float
) -> None:
    baseline, treated = np.array(counts).T / 10_000
    found = difference_of(baseline, treated, confidence)
    if len({after - before for before, after in counts}) == 1:
        same = counts[0][0] == counts[0][1]
        assert (found.interval, found.p_student) == (((0, 0), 1) if same else (None, None))
        return
    assert found.interval is not None
    assert found.p_student is not None
    expected = textbook_t(treated - baseline, confidence)
    assert (*found.interval, found.p_student) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert found.mean == pytest.approx(np.mean(treated - baseline))
    assert found.sd == pytest.approx(np.std(treated - baseline, ddof=1))


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=8))
@settings(derandomize=True, max_examples=150, deadline=None)
def test_sign_flip_p_counts_every_pattern(counts: list[int]) -> None:
    # Hundredths are not exact as floats: sums that are equal must still count as equal.
    assert sign_flip_p(np.array(counts) / 100) == slow_sign_flip_p(counts)


@pytest.mark.parametrize("num_seeds", [0, 1])
def test_without_two_seeds_there_is_a_mean_at_most(num_seeds: int) -> None:
    found = difference_of(np.full(num_seeds, 0.5), np.full(num_seeds, 0.75), 0.95)
    assert found.mean == 0.25 if num_seeds else math.isnan(found.mean)
    assert (found.sd, found.interval, found.p_student, found.p_sign_flip) == (None,) * 4
    assert sign_flip_p(np.full(num_seeds, 0.25)) is None


def test_sign_flip_p_of_many_seeds_is_left_to_student() -> None:
    difference = np.linspace(0.1, 0.2, MOST_SEEDS_FLIPPED + 1)
    assert sign_flip_p(difference[:-1]) == 2 / 2**MOST_SEEDS_FLIPPED
    assert sign_flip_p(difference) is None
    assert difference_of(difference * 0, difference, 0.95).interval is not None


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_interval_covers_the_true_difference_as_often_as_it_says(num_seeds: int) -> None:
    rng, truth, trials = np.random.default_rng(5), 0.013, 2000
    covered = 0
    for _ in range(trials):
        baseline = rng.normal(0.8, 0.05, num_seeds)
        treated = baseline + rng.normal(truth, 0.01, num_seeds)
        interval = difference_of(baseline, treated, 0.9).interval
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    # Five standard errors; the normal's 1.645 in Student's place would cover 64 to 82 %.
    assert abs(covered / trials - 0.9) < 5 * math.sqrt(0.9 * 0.1 / trials)


@pytest.mark.parametrize(
    ("interval", "more", "less"),
    [
        ((0.1, 0.3), "better", "worse"),
        ((-0.3, -0.1), "worse", "better"),
        ((-0.1, 0.3), "no difference shown", "no difference shown"),
        ((0.0, 0.3), "no difference shown", "no difference shown"),
        (None, "too few seeds", "too few seeds"),
    ],
)
def test_verdict_is_no_stronger_than_the_interval(
    interval: tuple[float, float] | None, more: str, less: str
) -> None:
    assert verdict_of(interval, lower_is_better=False) == more
    assert verdict_of(interval, lower_is_better=True) == less


def test_holm_adjusts_as_worked_by_hand() -> None:
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 and, never below the one before, 0.04 x 1.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_seeds_are_paired_by_number_and_not_by_order() -> None:
    runs = [*pairs([0.5, 0.6, 0.7], [0.52, 0.61, 0.73])]
    (arm,) = compared(runs[::-1]).arms
    assert arm.seeds == (0, 1, 2)
    assert (arm.baseline, arm.treated) == ((0.5, 0.6, 0.7), (0.52, 0.61, 0.73))
    assert arm.difference.mean == pytest.approx(0.02)
    # t for two degrees of freedom: 4.3027; sd 0.01 over the root of 3.
    reach = 4.302653 * 0.01 / math.sqrt(3)
    assert arm.difference.interval == pytest.approx((0.02 - reach, 0.02 + reach))
    assert (arm.verdict, arm.difference.p_sign_flip) == ("no difference shown", 0.25)


def test_paired_noise_cancels_that_would_hide_an_unpaired_difference() -> None:
    baseline = [0.50, 0.70, 0.60]
    (arm,) = compared(pairs(baseline, [value + 0.02 + value / 1000 for value in baseline])).arms
    assert arm.verdict == "better"
    assert stats.ttest_ind(arm.treated, arm.baseline).pvalue > 0.5


def test_one_seed_has_no_interval_and_unpaired_seeds_are_listed() -> None:
    runs = [run(0.5, seed=1), run(0.6, seed=2), run(0.7, seed=2, weight=0.5)]
    (arm,) = compared([*runs, run(0.7, seed=9, weight=0.5)]).arms
    assert (arm.seeds, arm.only_baseline, arm.only_treated) == ((2,), (1,), (9,))
    assert arm.difference.mean == pytest.approx(0.1)
    assert (arm.difference.interval, arm.difference.p_student) == (None, None)
    assert (arm.verdict, arm.verdict_holm) == ("too few seeds", "too few seeds")


def test_equal_differences_say_nothing_of_their_spread() -> None:
    (arm,) = compared(pairs([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])).arms
    assert arm.difference.interval is None
    assert arm.verdict == "too few seeds"
    (none,) = compared(pairs([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])).arms
    assert none.difference.interval == pytest.approx((0, 0))
    assert none.verdict == "no difference shown"


def test_groups_never_mix_and_every_setting_of_the_loss_is_an_arm() -> None:
    low = pairs([0.1, 0.2], [0.11, 0.23], key="low", data__name="cifar10", drloc__mode="l1")
    high = pairs([0.8, 0.9], [0.7, 0.9], key="high", data__name="svhn", drloc__mode="l1")
    more = [
        run(0.3, key="low", weight=0.5, seed=1, data__name="cifar10", drloc__mode="ce"),
        run(0.4, key="low", weight=0.1, seed=0, data__name="cifar10", drloc__mode="l1"),
    ]
    arms = compared(low + high + more).arms
    assert [(arm.group, arm.setting, arm.seeds) for arm in arms] == [
        ("cifar10", "weight 0.1, mode l1", (0,)),
        ("cifar10", "weight 0.5, mode ce", (1,)),
        ("cifar10", "weight 0.5, mode l1", (0, 1)),
        ("svhn", "weight 0.5", (0, 1)),
    ]
    assert arms[1].baseline == (0.2,)
    assert arms[1].drloc == {"drloc.weight": "0.5", "drloc.mode": "ce"}


def test_baseline_is_weight_zero_whatever_the_other_knobs_of_the_loss_are() -> None:
    runs = [
        run(0.5, seed=0, drloc__num_pairs=32),
        run(0.6, seed=1, drloc__num_pairs=64),
        *(run(0.7, seed=seed, weight=0.5, drloc__num_pairs=64) for seed in (0, 1)),
    ]
    (arm,) = compared(runs).arms
    assert (arm.seeds, arm.baseline) == ((0, 1), (0.5, 0.6))


def test_groups_are_told_apart_by_what_differs_between_them_only() -> None:
    def both(key: str, **config: Any) -> list[RecordedRun]:
        known = {"data__name": "cifar10", "epochs": 9, "optim__betas": (0.9, 0.999)}
        return pairs([0.1, 0.2], [0.1, 0.3], key=key, **known, **config)

    slow, fast = both("a", optim__lr=0.1, output="x"), both("b", optim__lr=0.2, output="y")
    fast[0] = run(0.1, key="b", data__name="cifar10", epochs=9, optim__lr=0.2, threads=8)
    groups = [arm.group for arm in compared(slow + fast).arms]
    assert groups == ["cifar10, 9 epochs, optim.lr 0.1", "cifar10, 9 epochs, optim.lr 0.2"]
    many = [both(key, **{f"x{i}": key for i in range(6)}) for key in "ab"]
    label = compared(many[0] + many[1]).arms[0].group
    assert label == "cifar10, 9 epochs, x0 a, x1 a, x2 a, x3 a, and 2 more settings"
    (arm,) = compared(both("a", data__select_on_test=True)).arms
    assert arm.group == "cifar10, 9 epochs, epoch chosen on the test set"


def test_what_is_left_out_is_counted() -> None:
    runs = [
        *pairs([0.5, 0.6], [0.6, 0.6]),
        run(0.1, seed=0, finished=False),
        run(0.9, seed=3, weight=0.5, finished=False),
        run(None, seed=4),
        run(math.nan, seed=4, weight=0.5),
        run(0.4, key="alone", weight=0.5),
        run(0.4, key="base"),
    ]
    found = compared(runs)
    assert (found.num_runs, found.num_unfinished, found.num_without_metric) == (10, 2, 2)
    (arm,) = found.arms
    assert (arm.baseline, arm.only_baseline, arm.only_treated) == ((0.5, 0.6), (), ())
    assert len(found.lone_groups) == 2
    assert any("no baseline (--drloc.weight 0)" in group for group in found.lone_groups)


def test_last_finished_of_repeated_runs_counts_and_the_gap_is_told() -> None:
    first = pairs([0.5, 0.6], [0.7, 0.8])
    again = [run(0.55, seed=0), run(0.71, seed=0, weight=0.5), run(0.1, seed=1, finished=False)]
    found = compared(first + again)
    (arm,) = found.arms
    assert (arm.baseline, arm.treated) == ((0.55, 0.6), (0.71, 0.8))
    assert found.num_repeated == 2
    assert found.largest_repeat_gap == pytest.approx(0.05)


def test_verdicts_for_several_arms_allow_for_their_number() -> None:
    baseline = [0.50, 0.51, 0.52, 0.53]
    gains = {0.1: [0.01, 0.02, 0.03, 0.034], 0.5: [0.1, 0.101, 0.102, 0.103]}
    runs = [run(value, seed=seed) for seed, value in enumerate(baseline)]
    for weight, added in gains.items():
        runs += [
            run(value + gain, seed=seed, weight=weight)
            for seed, (value, gain) in enumerate(zip(baseline, added, strict=True))
        ]
    # Noise in plenty: with many arms the weak gain of 0.1 no longer holds.
    for weight in (1.0, 2.0, 3.0):
        runs += [
            run(value + (-1) ** seed * 0.05, seed=seed, weight=weight)
            for seed, value in enumerate(baseline)
        ]
    weak, strong, *noise = compared(runs).arms
    assert (weak.verdict, weak.verdict_holm) == ("better", "no difference shown")
    assert (strong.verdict, strong.verdict_holm) == ("better", "better")
    assert {arm.verdict_holm for arm in noise} == {"no difference shown"}
    assert weak.p_holm == pytest.approx(4 * (weak.difference.p_student or 0))


def test_lower_is_better_for_a_loss() -> None:
    runs = pairs([2.0, 2.1, 2.2], [1.0, 1.11, 1.2], metric="test/loss")
    (arm,) = compare(runs, "test/loss").arms
    assert arm.verdict == "better"
    assert arm.difference.mean < 0


def test_without_a_baseline_the_message_names_the_command_that_makes_one() -> None:
    with pytest.raises(DataError, match=r"2 finished runs have no baseline.*--drloc\.weight 0$"):
        compared([run(0.5, weight=0.5), run(0.5, weight=0.1)])
    with pytest.raises(DataError, match=r"all baselines.*--drloc\.weight 0\.5"):
        compared([run(0.5), run(0.6, seed=1)])


def test_runs_that_nearly_pair_are_told_in_what_they_differ() -> None:
    runs = [
        run(0.5, key="a", seed=1, optim__lr=0.1, epochs=5, output="x"),
        run(0.5, key="b", seed=1, weight=0.5, optim__lr=0.2, epochs=5, output="y"),
        run(0.5, key="c", seed=3, weight=0.5, optim__lr=0.3, epochs=6),
    ]
    with pytest.raises(DataError) as caught:
        compared(runs)
    assert "differ in optim.lr (0.2 with DRLoc, 0.1 without); run the same" in str(caught.value)
    with pytest.raises(DataError, match=r"differ in seed \(2 with DRLoc, 1 without\)"):
        compared([run(0.5, seed=1), run(0.5, seed=2, weight=0.5)])


def test_unknown_metric_and_unfinished_runs_are_told_apart() -> None:
    with pytest.raises(DataError, match=r"did you mean test/accuracy_selected\?"):
        compare(pairs([0.5], [0.6]), "test/accuracy_select")
    with pytest.raises(DataError, match="none of the runs is finished"):
        compared([run(0.5, finished=False)])


def test_accuracy_that_is_no_fraction_is_refused() -> None:
    with pytest.raises(DataError, match=r"must be a fraction in \[0, 1\], got 71"):
        compared(pairs([0.5], [71.0]))


def test_runs_that_did_not_see_the_same_images_do_not_pair() -> None:
    baseline, treated = pairs([0.5], [0.6])
    with pytest.raises(DataError, match="did not see the same images"):
        compared([replace(baseline, images="one"), replace(treated, images="other")])
    # Runs of other seeds see others; what was not recorded is no difference.
    compared([replace(baseline, images="one"), treated])
    both = [replace(run, images=str(run.seed)) for run in pairs([0.5, 0.4], [0.6, 0.4])]
    assert compared(both).arms[0].seeds == (0, 1)
