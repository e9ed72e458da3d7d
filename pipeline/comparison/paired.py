"""Does DRLoc help? Runs that differ in nothing but DRLoc, compared seed by seed.

Runs with one ``pair_key`` share everything but the ``drloc`` group and the seed. Within them the
baseline is ``drloc.weight`` 0, and each other setting of the group is an arm. A seed fixes data
order, augmentation and the network's first weights, so the difference of two runs of one seed has
less noise than either; its interval is Student's over the seeds.

To judge by another test: its number in ``Difference`` and in ``difference_of``, its use in
``verdict_of``.

A configuration is a mapping of dotted names to texts. Reading runs is recorded_runs.py, showing
their comparison report.py. To compare something else than DRLoc: ``LOSS`` and ``WEIGHT`` name its
knobs. To have a setting named in every group's label: a line in ``group_label``.

Shape letters:  S seeds present on both sides
"""

import difflib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.errors import DataError

Config = Mapping[str, str]
Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "no difference shown", "too few seeds"]

LOSS, SEED, WEIGHT = "drloc.", "seed", "drloc.weight"

MOST_SEEDS_FLIPPED = 14
"""Up to here all sign flips are gone through; with more seeds Student's interval says enough."""

# Differences nearer to each other than this are one: accuracies are multiples of 1 / images.
_SAME = 1e-12
# More than these in a label, and nobody reads it.
_MOST_NAMED = 4
_MOST_LISTED = 20
_NOTHING = "unset"
# Where a run is written and how fast it is, not what it is: no reason why two do not pair.
_PLACES = ("experiment", "run_name", "tracking_uri", "output", "export", "debug", "data.root")


def group_labels(groups: Mapping[str, Sequence[Config]]) -> dict[str, str]:
    """A label for each group: data, model, epochs, and what differs between the groups only.

    A setting that varies within a group, as paths may, tells no groups apart.
    """
    shown = _telling({key: list(configs) for key, configs in groups.items()})
    return {key: _group_label(configs[0], shown) for key, configs in groups.items()}


def _group_label(config: Config, shown: Sequence[str]) -> str:
    parts = [config[name] for name in ("data.name", "model.name") if name in config]
    if "epochs" in config:
        parts.append(f"{config['epochs']} epochs")
    if config.get("data.select_on_test", "False") == "True":
        parts.append("epoch chosen on the test set")
    parts += [f"{name} {config.get(name, _NOTHING)}" for name in shown[:_MOST_NAMED]]
    if len(shown) > _MOST_NAMED:
        parts.append(f"and {len(shown) - _MOST_NAMED} more settings")
    return ", ".join(parts) or "all runs"


def _telling(groups: Mapping[str, Sequence[Config]]) -> list[str]:
    """Names that have one value within each group, and not the same one in all."""
    named = {"data.name", "model.name", "epochs", "data.select_on_test", SEED, *_PLACES}
    names = {name for configs in groups.values() for config in configs for name in config}
    telling = []
    for name in sorted(names - named):
        values = [{config.get(name) for config in configs} for configs in groups.values()]
        constant = all(len(one) == 1 for one in values)
        if constant and len(set.union(*values)) > 1 and not name.startswith(LOSS):
            telling.append(name)
    return telling


def setting_label(drloc: Config, others: Iterable[Config]) -> str:
    """One setting of DRLoc: its weight, and whatever else tells it from the ``others``."""
    others = list(others)
    parts = [f"weight {drloc.get(WEIGHT, _NOTHING)}"]
    for name in sorted(set(drloc).union(*others) - {WEIGHT}):
        if any(one.get(name) != drloc.get(name) for one in others):
            parts.append(f"{name.removeprefix(LOSS)} {drloc.get(name, _NOTHING)}")
    return ", ".join(parts)


def nearest_settings(treated: Sequence[Config], baseline: Sequence[Config]) -> str:
    """In which settings the two runs differ that come nearest to a pair; empty for none.

    Raises:
        ValueError: one of the sides is empty.
    """
    if not treated or not baseline:
        raise ValueError("both sides need a run for a nearest pair")
    nearest = min((_unlike(one, other) for one in treated for other in baseline), key=len)
    more = f" and {len(nearest) - _MOST_NAMED} more" if len(nearest) > _MOST_NAMED else ""
    return ", ".join(nearest[:_MOST_NAMED]) + more


def _unlike(treated: Config, baseline: Config) -> list[str]:
    names = sorted(set(treated) | set(baseline))
    return [
        f"{name} ({treated.get(name, _NOTHING)} with DRLoc, {baseline.get(name, _NOTHING)} without)"
        for name in names
        if name not in _PLACES
        and not name.startswith(LOSS)
        and treated.get(name) != baseline.get(name)
    ]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known ones, and all of them."""
    if not known:
        return ": there is none"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f", did you mean {' or '.join(close)}?" if close else ""
    more = f" and {len(known) - _MOST_LISTED} more" if len(known) > _MOST_LISTED else ""
    return f"{hint} (there are: {', '.join(known[:_MOST_LISTED])}{more})"


@dataclass(frozen=True)
class Difference:
    """Arm minus baseline over the paired seeds, in the metric's own unit.

    Attributes:
        mean: NaN without a seed.
        sd: with n - 1; None with fewer than two seeds.
        interval: Student's, n - 1 degrees of freedom; None where no spread can be told: fewer than
            two seeds, or differences that are all the same and not 0.
        p_student: two-sided, of the paired t-test; None as the interval.
        p_sign_flip: two-sided and exact, at least 2 / 2 ** n; None with fewer than two seeds or
            more than ``MOST_SEEDS_FLIPPED``.
    """

    mean: float
    sd: float | None = None
    interval: tuple[float, float] | None = None
    p_student: float | None = None
    p_sign_flip: float | None = None


def difference_of(baseline_S: Floats, treated_S: Floats, confidence: float) -> Difference:
    """The paired difference with what can be said about it from so many seeds."""
    difference_S = treated_S - baseline_S
    mean = float(difference_S.mean()) if difference_S.size else math.nan
    if difference_S.size < 2:
        return Difference(mean)
    flips = sign_flip_p(difference_S)
    if np.ptp(difference_S) <= _SAME:
        if abs(mean) <= _SAME:
            return Difference(0.0, 0.0, (0.0, 0.0), 1.0, flips)
        return Difference(mean, 0.0, None, None, flips)
    test = stats.ttest_rel(treated_S, baseline_S)
    low, high = test.confidence_interval(confidence)
    sd = float(difference_S.std(ddof=1))
    return Difference(mean, sd, (float(low), float(high)), float(test.pvalue), flips)


def sign_flip_p(difference_S: Floats) -> float | None:
    """Share of all ``2 ** S`` sign patterns whose sum is at least as far from 0 as the real one.

    None for fewer than two seeds or more than ``MOST_SEEDS_FLIPPED``.
    """
    if not 2 <= difference_S.size <= MOST_SEEDS_FLIPPED:
        return None
    # As many resamples as there can be patterns, and SciPy takes each pattern once.
    test = stats.permutation_test(
        (difference_S,),
        np.sum,
        permutation_type="samples",
        n_resamples=2**MOST_SEEDS_FLIPPED,
        vectorized=True,
    )
    # Not SciPy's own p-value: where the sum should be 0 but for rounding, it misses equal ones.
    return float(np.mean(np.abs(test.null_distribution) >= abs(test.statistic) - _SAME))


def verdict_of(interval: tuple[float, float] | None, lower_is_better: bool) -> Verdict:
    """What may be said: nothing without an interval, and no difference where it holds 0."""
    if interval is None:
        return "too few seeds"
    if interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    return "better" if (interval[0] > 0) is not lower_is_better else "worse"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: each holds for all tests together."""
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


# ``()`` stands for the baseline: with weight 0 the other knobs of the loss decide nothing.
_Setting = tuple[tuple[str, str], ...]
_BASELINE: _Setting = ()


@dataclass(frozen=True)
class RecordedRun:
    """One training run as it was recorded.

    Attributes:
        name: as it is shown.
        config: the resolved configuration, dotted names and values as texts.
        metrics: the last value of each.
        pair_key: hash of the configuration without its drloc group and its seed.
        config_hash: hash of all that decides the numbers.
        seed: of everything random in the run.
        drloc_weight: 0 where DRLoc is off.
        finished: whether the run came to its planned end.
        where: run folder, or MLflow's id.
        images: hash of the images and how they were divided; empty where it was not recorded.
    """

    name: str
    config: Mapping[str, str]
    metrics: Mapping[str, float]
    pair_key: str
    config_hash: str
    seed: int
    drloc_weight: float
    finished: bool
    where: str
    images: str = ""


@dataclass(frozen=True)
class Arm:
    """One setting of DRLoc against its baseline.

    Attributes:
        group: what baseline and arm share, in words.
        pair_key: the same, as a hash.
        setting: the arm's DRLoc, in words.
        drloc: the same, as the values of all its knobs by their full names.
        seeds: present on both sides, ascending; ``baseline`` and ``treated`` follow their order.
        baseline: the metric with weight 0.
        treated: the metric with DRLoc.
        only_baseline: seeds without a run of the arm.
        only_treated: seeds without a baseline.
        difference: arm minus baseline.
        verdict: by the interval of this arm alone.
        p_holm: ``p_student`` adjusted for the number of arms compared.
        verdict_holm: by ``p_holm``.
    """

    group: str
    pair_key: str
    setting: str
    drloc: Mapping[str, str]
    seeds: tuple[int, ...]
    baseline: tuple[float, ...]
    treated: tuple[float, ...]
    only_baseline: tuple[int, ...]
    only_treated: tuple[int, ...]
    difference: Difference
    verdict: Verdict
    p_holm: float | None = None
    verdict_holm: Verdict = "too few seeds"


@dataclass(frozen=True)
class Comparison:
    """All arms, and what was left out.

    Attributes:
        metric: name of the number compared.
        confidence: of the intervals, in (0, 1).
        arms: group by group, each by ascending weight.
        num_runs: read, of every kind below.
        num_unfinished: left out.
        num_without_metric: finished, but without a finite value of the metric; left out.
        num_repeated: finished again with the same settings and seed; only the last one counts.
        largest_repeat_gap: by how much a repeated run's metric is off the one that counts.
        lone_groups: groups (in words) with a baseline only, or with DRLoc only.
    """

    metric: str
    confidence: float
    arms: tuple[Arm, ...]
    num_runs: int
    num_unfinished: int
    num_without_metric: int
    num_repeated: int
    largest_repeat_gap: float
    lone_groups: tuple[str, ...]


def compare(records: Sequence[RecordedRun], metric: str, confidence: float = 0.95) -> Comparison:
    """Every arm that the runs have, against its baseline.

    Args:
        records: in the order they were recorded: of equal runs the last finished one counts.
        metric: its name; those with ``accuracy`` in it must be fractions.
        confidence: of the intervals, in (0, 1).

    Raises:
        DataError: no finished run has the metric, no two runs pair up, two that do were trained or
            measured on different images, or an accuracy is above 1.
    """
    finished = [record for record in records if record.finished]
    measured = [one for one in finished if math.isfinite(one.metrics.get(metric, math.nan))]
    _check_metric(finished, measured, metric)
    kept, gap = _last_of_each(measured, metric)
    groups: dict[str, list[RecordedRun]] = defaultdict(list)
    for record in kept:
        groups[record.pair_key].append(record)
    labels = group_labels({key: [run.config for run in runs] for key, runs in groups.items()})
    order = sorted(groups, key=lambda key: (labels[key], key))
    arms = [arm for key in order for arm in _arms(groups[key], labels[key], metric, confidence)]
    if not any(arm.seeds for arm in arms):
        raise DataError(_why_nothing_pairs(kept))
    return Comparison(
        metric=metric,
        confidence=confidence,
        arms=_judged_together(arms, 1 - confidence),
        num_runs=len(records),
        num_unfinished=len(records) - len(finished),
        num_without_metric=len(finished) - len(measured),
        num_repeated=len(measured) - len(kept),
        largest_repeat_gap=gap,
        lone_groups=tuple(
            f"{labels[key]}: {told}" for key in order if (told := _lone(groups[key]))
        ),
    )


def is_fraction(metric: str) -> bool:
    """Whether the metric is a fraction in [0, 1], to be shown in per cent."""
    return "accuracy" in metric


def is_lower_better(metric: str) -> bool:
    """Whether less of the metric is better."""
    return any(word in metric for word in ("loss", "error"))


def _check_metric(
    finished: Sequence[RecordedRun], measured: Sequence[RecordedRun], metric: str
) -> None:
    if not finished:
        raise DataError("none of the runs is finished: compare them when they are")
    if not measured:
        known = sorted({name for record in finished for name in record.metrics})
        raise DataError(f"no finished run has the metric {metric!r}{did_you_mean(metric, known)}")
    for record in measured:
        value = record.metrics[metric]
        if is_fraction(metric) and not 0 <= value <= 1:
            raise DataError(
                f"{metric} must be a fraction in [0, 1], got {value:g} in {record.where}"
            )


def _last_of_each(records: Sequence[RecordedRun], metric: str) -> tuple[list[RecordedRun], float]:
    """The last run of each group, setting and seed; how far the metric of another one is off it."""
    runs: dict[tuple[str, _Setting, int], list[RecordedRun]] = defaultdict(list)
    for record in records:
        runs[record.pair_key, _setting(record), record.seed].append(record)
    gaps = [
        abs(one.metrics[metric] - same[-1].metrics[metric])
        for same in runs.values()
        for one in same
    ]
    return [same[-1] for same in runs.values()], max(gaps)


def _setting(record: RecordedRun) -> _Setting:
    """The drloc group of a run; with weight 0 its other knobs decide nothing."""
    if record.drloc_weight == 0:
        return _BASELINE
    drloc = {name: value for name, value in record.config.items() if name.startswith(LOSS)}
    return tuple(sorted({WEIGHT: f"{record.drloc_weight:g}", **drloc}.items()))


def _arms(runs: Sequence[RecordedRun], group: str, metric: str, confidence: float) -> list[Arm]:
    """The arms of one group by weight; none where it has no baseline."""
    by_setting: dict[_Setting, dict[int, RecordedRun]] = defaultdict(dict)
    for run in runs:
        by_setting[_setting(run)][run.seed] = run
    baseline = by_setting.pop(_BASELINE, {})
    if not baseline:
        return []
    settings = sorted(
        by_setting, key=lambda one: (next(iter(by_setting[one].values())).drloc_weight, one)
    )
    arms = []
    for setting in settings:
        treated = by_setting[setting]
        seeds = sorted(baseline.keys() & treated.keys())
        for seed in seeds:
            _require_same_images(baseline[seed], treated[seed])
        sides = [[side[seed].metrics[metric] for seed in seeds] for side in (baseline, treated)]
        difference = difference_of(np.array(sides[0]), np.array(sides[1]), confidence)
        arms.append(
            Arm(
                group=group,
                pair_key=runs[0].pair_key,
                setting=setting_label(dict(setting), [dict(one) for one in settings]),
                drloc=dict(setting),
                seeds=tuple(seeds),
                baseline=tuple(sides[0]),
                treated=tuple(sides[1]),
                only_baseline=tuple(sorted(baseline.keys() - treated.keys())),
                only_treated=tuple(sorted(treated.keys() - baseline.keys())),
                difference=difference,
                verdict=verdict_of(difference.interval, is_lower_better(metric)),
            )
        )
    return arms


def _require_same_images(baseline: RecordedRun, treated: RecordedRun) -> None:
    """The settings name a folder; what lies in it may have changed between two runs."""
    if baseline.images and treated.images and baseline.images != treated.images:
        raise DataError(
            f"{treated.where} and its baseline {baseline.where} did not see the same images: the "
            "data changed between them; run both again with --overwrite"
        )


def _judged_together(arms: Sequence[Arm], level: float) -> tuple[Arm, ...]:
    """The arms with the p-values and verdicts that hold for all of them at once."""
    tested = {i: p for i, arm in enumerate(arms) if (p := arm.difference.p_student) is not None}
    judged = list(arms)
    for index, p_holm in zip(tested, holm(list(tested.values())), strict=True):
        verdict: Verdict = arms[index].verdict if p_holm < level else "no difference shown"
        judged[index] = replace(arms[index], p_holm=p_holm, verdict_holm=verdict)
    return tuple(judged)


def _lone(runs: Sequence[RecordedRun]) -> str:
    """What a group lacks, and how to make it; empty where it has both sides."""
    with_loss = sum(run.drloc_weight > 0 for run in runs)
    if 0 < with_loss < len(runs):
        return ""
    if with_loss:
        return f"{with_loss} runs with DRLoc and no baseline (--drloc.weight 0)"
    return f"{len(runs)} baselines and no run with DRLoc (--drloc.weight 0.5)"


def _why_nothing_pairs(runs: Sequence[RecordedRun]) -> str:
    """One line: what there is, what it lacks, and the command that mends it."""
    treated = [run for run in runs if run.drloc_weight > 0]
    baseline = [run for run in runs if run.drloc_weight == 0]
    if not baseline:
        return (
            f"the {len(treated)} finished runs have no baseline: run the same commands again with "
            "--drloc.weight 0"
        )
    if not treated:
        return (
            f"the {len(baseline)} finished runs are all baselines (--drloc.weight 0): run the same "
            "commands again with --drloc.weight 0.5"
        )
    configs = [run.config for run in treated], [run.config for run in baseline]
    nearest = nearest_settings(*configs) or "settings that were not recorded"
    return (
        f"{len(treated)} runs with DRLoc and {len(baseline)} without do not pair: the nearest "
        f"differ in {nearest}; run the same command again with --drloc.weight 0"
    )
