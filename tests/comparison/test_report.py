"""The comparison as people and programs see it: terminal, Markdown, CSV, JSON and the picture."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from pipeline.comparison.paired import Comparison, RecordedRun, compare
from pipeline.comparison.report import (
    MOST_ARMS,
    as_csv,
    as_json,
    as_markdown,
    as_png,
    print_report,
    remarks,
)

METRIC = "test/accuracy_selected"


def runs(key: str, weight: float, values: list[float], metric: str = METRIC) -> list[RecordedRun]:
    """One run for each seed 0, 1, ... of data set ``key``."""
    return [
        RecordedRun(
            name=f"{key}-{seed}",
            config={"data.name": key, "epochs": "9", "drloc.weight": str(weight)},
            metrics={metric: value},
            pair_key=key,
            config_hash=f"{key}-{weight}-{seed}",
            seed=seed,
            drloc_weight=weight,
            finished=True,
            where="",
        )
        for seed, value in enumerate(values)
    ]


@pytest.fixture
def one_arm() -> Comparison:
    """Differences of 2, 1 and 3 points."""
    return compare(
        runs("cifar10", 0, [0.5, 0.6, 0.7]) + runs("cifar10", 0.5, [0.52, 0.61, 0.73]), METRIC
    )


@pytest.fixture
def three_arms() -> Comparison:
    """A clear gain, a single seed, and a group without a baseline; 100 stands for a seed alone."""
    base = runs("cifar10", 0, [0.5, 0.6, 0.7])
    good = runs("cifar10", 0.5, [0.6, 0.7001, 0.8002])
    single = runs("cifar10", 1.0, [0.55])
    other = runs("a[b]|c", 0, [0.2, 0.3]) + runs("a[b]|c", 0.5, [0.1, 0.35])
    return compare([*base, *good, *single, *other, *runs("lonely", 0.5, [0.4])], METRIC)


def printed(comparison: Comparison, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(comparison, console)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def test_terminal_shows_every_number_of_a_hand_made_case(one_arm: Comparison) -> None:
    text = printed(one_arm)
    for part in ("cifar10, 9 epochs", "weight 0.5", "60.00", "62.00", "sd 10.00", "sd 10.54"):
        assert part in text
    assert "+2.00" in text
    assert "[-0.48, +4.48]" in text
    assert "no difference" in text
    assert "0.250" in text, "the sign-flip p of three seeds"
    assert "cannot fall below 0.25." in text


def test_terminal_fits_80_columns_but_for_its_remarks(three_arms: Comparison) -> None:
    lines = printed(three_arms).splitlines()
    # A remark is one line, so that a log can be searched for it.
    assert max(len(line) for line in lines if not line.startswith("  ")) <= 80
    assert "a[b]|c, 9 epochs" in lines, "brackets are not markup"


def test_settings_with_brackets_are_shown_as_they_are() -> None:
    def staged(stages: str) -> list[RecordedRun]:
        arm = runs("a", 0.5, [0.6, 0.701])
        return [replace(one, config={**one.config, "drloc.stages": stages}) for one in arm]

    base = runs("a", 0, [0.5, 0.6])
    text = printed(compare([*base, *staged("[all]"), *staged("[last]")], METRIC))
    assert "[all]" in text
    assert "[last]" in text


def test_gain_that_the_number_of_arms_explains_is_told_so() -> None:
    base = runs("a", 0, [0.50, 0.51, 0.52, 0.53])
    weak = runs("a", 0.5, [0.51, 0.53, 0.55, 0.564])
    noise = runs("a", 1.0, [0.55, 0.46, 0.57, 0.48]) + runs("a", 2.0, [0.55, 0.46, 0.57, 0.48])
    assert "better alone, not by Holm" in as_markdown(compare([*base, *weak, *noise], METRIC))


def test_narrow_terminal_loses_no_digit(one_arm: Comparison) -> None:
    letters = "".join(printed(one_arm, width=30).split())
    assert "…" not in letters
    assert {"6", "2", "."} <= set(letters)


def test_remarks_say_what_was_left_out(three_arms: Comparison) -> None:
    told = "\n".join(remarks(three_arms))
    assert "3 arms were compared" in told
    assert "weight 1.0: a single paired seed (0) has no interval." in told
    assert "weight 1.0: seeds without a DRLoc run are left out: 1, 2." in told
    assert "Not compared: lonely, 9 epochs: 1 runs with DRLoc and no baseline" in told


def test_repeats_unfinished_and_metricless_runs_are_told() -> None:
    base, treated = runs("a", 0, [0.5, 0.6]), runs("a", 0.5, [0.5, 0.7])
    again = runs("a", 0, [0.53])
    unfinished = RecordedRun("u", {}, {}, "a", "", 7, 0.0, False, "")
    blank = RecordedRun("b", {}, {}, "a", "", 8, 0.0, True, "")
    told = "\n".join(remarks(compare([*base, *treated, *again, unfinished, blank], METRIC)))
    assert "1 unfinished runs are left out." in told
    assert "1 finished runs have no finite test/accuracy_selected" in told
    assert "1 runs were recorded again; the last one counts, the others are up to 3.00 off" in told


def test_single_seed_everywhere_is_told_to_run_more() -> None:
    told = next(remarks(compare(runs("a", 0, [0.5]) + runs("a", 0.5, [0.6]), METRIC)))
    assert told.endswith("One seed has no interval: run more with --seed.")


def test_loss_is_shown_in_its_own_unit() -> None:
    found = compare(
        runs("a", 0, [2.0, 2.1], "test/loss") + runs("a", 0.5, [1.5, 1.7], "test/loss"), "test/loss"
    )
    text = printed(found)
    assert "-0.4500" in text
    assert "%)" not in text
    assert as_json(found)["unit"] == ""
    assert as_json(found)["arms"][0]["difference_mean"] == -0.45


def test_markdown_is_one_table_a_group_with_its_cells_escaped(three_arms: Comparison) -> None:
    text = as_markdown(three_arms, "comparison.png")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 * 2 + 3
    assert {line.replace("\\|", "").count("|") for line in tables} == {9}
    assert "| +10.01 [+9.99, +10.03] |" in text
    assert text.endswith("(comparison.png)\n")


def test_csv_and_json_agree(three_arms: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(three_arms))))
    arms = as_json(three_arms)["arms"]
    assert len(rows) == len(arms) == 3
    for row, arm in zip(rows, arms, strict=True):
        assert row["verdict"] == arm["verdict"]
        assert float(row["difference_mean"]) == arm["difference_mean"]
        assert row["interval_low"] == (
            "" if arm["interval_low"] is None else str(arm["interval_low"])
        )
        assert [float(one) for one in row["baseline"].split()] == arm["baseline"]


def test_json_has_null_and_never_nan(three_arms: Comparison) -> None:
    def refuse(text: str) -> Any:
        raise AssertionError(text)

    found = json.loads(json.dumps(as_json(three_arms)), parse_constant=refuse)
    single = next(arm for arm in found["arms"] if arm["setting"] == "weight 1.0")
    assert (single["difference_mean"], single["interval_low"], single["p_holm"]) == (
        5.0,
        None,
        None,
    )
    assert found["arms"][0]["drloc"] == {"drloc.weight": "0.5"}
    assert (found["num_arms"], found["num_runs"], found["unit"]) == (3, 12, "%")


def test_arm_without_a_common_seed_is_shown_as_such() -> None:
    lone = runs("a", 1.0, [0.1, 0.2, 0.3])[2:]
    found = compare([*runs("a", 0, [0.5]), *runs("a", 0.5, [0.6]), *lone], METRIC)
    assert "n/a" in printed(found)
    assert as_json(found)["arms"][1]["difference_mean"] is None
    assert as_png(found).startswith(b"\x89PNG")


def colours(png: bytes) -> set[object]:
    """The RGB triples of a picture."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    return {colour for _, colour in picture.getcolors(picture.width * picture.height) or []}


def test_picture_wears_the_colour_of_its_verdict() -> None:
    base = runs("a", 0, [0.5, 0.6, 0.7])
    blue, vermilion, grey = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x59, 0x60, 0x6A)
    for values, colour in (
        ([0.6, 0.701, 0.8], blue),
        ([0.4, 0.501, 0.6], vermilion),
        ([0.6, 0.5, 0.7], grey),
    ):
        seen = colours(as_png(compare([*base, *runs("a", 0.5, values)], METRIC)))
        assert seen & {blue, vermilion, grey} == {colour}


def test_picture_grows_with_the_arms_and_stops_at_what_can_be_read() -> None:
    def height(num_arms: int) -> int:
        base = runs("a", 0, [0.5, 0.6])
        arms = [one for w in range(num_arms) for one in runs("a", w + 1.0, [0.6, 0.65])]
        png = as_png(compare([*base, *arms], METRIC), dpi=20)
        return Image.open(io.BytesIO(png)).height

    assert height(1) < height(5) < height(MOST_ARMS) == height(MOST_ARMS + 5)


def test_picture_leaves_no_global_state_behind(one_arm: Comparison) -> None:
    import sys

    before = "matplotlib.pyplot" in sys.modules
    assert as_png(one_arm) == as_png(one_arm)
    assert ("matplotlib.pyplot" in sys.modules) == before
