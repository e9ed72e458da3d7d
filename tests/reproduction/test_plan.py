"""Which runs a table is, which of them are shared, and what is missing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.reproduction.inputs import AtHand
from pipeline.reproduction.plan import Choices, Plan, expected_seconds, plan_cells
from pipeline.reproduction.tables import TABLES, TableSize
from pipeline.storage import Location


def planned(
    table: str, folder: Path, *data: str, size: TableSize | None = None, **more: Any
) -> Plan:
    """A table with some data at hand."""
    places = {name: str(folder) for name in data}
    at_hand = more.pop("at_hand", AtHand(places))
    choices = Choices(
        output=Location.parse(str(folder / "out")),
        at_hand=at_hand,
        num_seeds=more.pop("num_seeds", 3),
        training={"num_workers": 0},
        **more,
    )
    return plan_cells(TABLES[table](size or TableSize("small")).cells, choices)


def missing(plan: Plan) -> dict[str, str]:
    return {one.cell.name: one.missing for one in plan.cells if one.missing}


def names_of(runs: Iterable[Any]) -> list[str]:
    return [run.name for run in runs]


def test_a_baseline_is_run_once_for_all_rows_and_with_their_seeds(tmp_path: Path) -> None:
    plan = planned("drloc-2a", tmp_path, "cifar10")
    assert len(plan.runs) == len(set(names_of(plan.runs))) == 5 * 3
    for one in plan.cells:
        assert [run.values["seed"] for run in one.runs] == [0, 1, 2]
    assert not missing(plan)


def test_tables_share_runs_that_are_the_same(tmp_path: Path) -> None:
    pairs = planned("drloc-2a", tmp_path, "cifar10")
    lambdas = planned("drloc-2b", tmp_path, "cifar10")
    shared = {run.result.path for run in pairs.runs} & {run.result.path for run in lambdas.runs}
    # m = 0 is Swin's lambda 0, and m = 64 its lambda 0.5.
    assert len(shared) == 2 * 3


def test_more_seeds_keep_the_runs_there_are(tmp_path: Path) -> None:
    few = planned("drloc-2a", tmp_path, "cifar10", num_seeds=1)
    many = planned("drloc-2a", tmp_path, "cifar10", num_seeds=4)
    assert set(names_of(few.runs)) < set(names_of(many.runs))


def test_runs_cut_short_are_other_runs_and_valid(tmp_path: Path) -> None:
    whole = planned("drloc-2a", tmp_path, "cifar10")
    for epochs in (1, 3):
        cut = planned("drloc-2a", tmp_path, "cifar10", epochs=epochs)
        assert not set(names_of(whole.runs)) & set(names_of(cut.runs))
        assert {run.values["epochs"] for run in cut.runs} == {epochs}
    paper = planned("drloc-2a", tmp_path, "cifar100", size=TableSize("paper"), epochs=2)
    assert {run.values["stop_after"] for run in paper.runs} == {None}


def test_rows_without_data_say_which_flag_gives_it(tmp_path: Path) -> None:
    plan = planned("drloc-4", tmp_path, "cifar10")
    lacking = missing(plan)
    assert lacking["svhn-swin-drloc"] == "no data at hand (--data.svhn PATH)"
    assert lacking["domainnet-real-cvt-base"] == "no data at hand (--data.domainnet PATH)"
    assert "cifar10-swin-drloc" not in lacking
    assert len(plan.runs) == 4 * 2 * 3


def test_rows_without_weights_say_which_flag_gives_them(tmp_path: Path) -> None:
    lacking = missing(planned("drloc-5", tmp_path, "cifar10"))
    assert lacking["cifar10-t2t-base"] == "no weights at hand (--weights t2t=FILE)"
    file = tmp_path / "swin.safetensors"
    file.touch()
    at_hand = AtHand({"cifar10": str(tmp_path)}, {"swin": str(file)})
    plan = planned("drloc-5", tmp_path, at_hand=at_hand, num_seeds=1)
    assert len(plan.runs) == 2
    assert plan.runs[0].values["model"]["checkpoint"] == str(file)


def test_published_weights_are_fetched_only_where_that_was_allowed(tmp_path: Path) -> None:
    given = {"cifar10": str(tmp_path)}
    paper = TableSize("paper")
    refused = planned("drloc-5", tmp_path, at_hand=AtHand(given), size=paper, num_seeds=1)
    assert not refused.runs
    allowed = AtHand(given, fetch=True)
    plan = planned("drloc-5", tmp_path, at_hand=allowed, size=paper, num_seeds=1)
    assert len(plan.runs) == 3 * 2
    assert all(run.values["model"]["pretrained"] for run in plan.runs)
    # Of narrowed networks nobody publishes any.
    assert not planned("drloc-5", tmp_path, at_hand=allowed, num_seeds=1).runs


def test_a_place_that_is_not_there_is_refused(tmp_path: Path) -> None:
    at_hand = AtHand({"cifar10": str(tmp_path / "nowhere")})
    with pytest.raises(DataError, match=r"--data\.cifar10: there is no "):
        planned("drloc-2a", tmp_path, at_hand=at_hand)


def test_hours_are_told_of_training_runs_whose_other_seeds_were_measured(tmp_path: Path) -> None:
    plan = planned("drloc-2a", tmp_path, "cifar10")
    assert expected_seconds(plan.runs) == {}
    row = plan.cells[1]
    for run, seconds in zip(row.runs[:2], (10.0, 20.0), strict=True):
        history = run.folder.child("history.jsonl")
        epochs = [{"epoch": 1, "seconds": seconds}, {"epoch": 2, "seconds": 3.0}]
        history.write_bytes("".join(json.dumps(one) + "\n" for one in epochs).encode())
        assert expected_seconds(plan.runs).keys() <= {row.runs[2].name, row.runs[1].name}
        run.result.write_bytes(b"{}")
    assert expected_seconds(plan.runs) == {row.runs[2].name: 18.0}
