"""The clustering job: its exit codes, and that nobody waits for --help."""

from pathlib import Path

from tests.clustering.coloured import (
    assert_labels_are_the_colours,
    flags_for,
    write_coloured_table,
)
from tests.conftest import ROOT
from tests.jobs.conftest import help_without_libraries
from tests.jobs.here import run_here

JOB = ROOT / "jobs" / "cluster_boxes.py"


def test_a_table_becomes_a_table_of_clusters(tmp_path: Path, tiny_weights: Path) -> None:
    table, out = write_coloured_table(tmp_path), tmp_path / "classes"
    args = ("--labels", table, "--output", out, *flags_for(tiny_weights))
    result = run_here(JOB, *args)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "cluster: boxes   1: 8  2: 8  3: 8" in result.stdout
    assert_labels_are_the_colours(out, {1, 2, 3})
    assert (tmp_path / "classes_clusters.png").is_file()
    again = run_here(JOB, *args)
    assert (again.returncode, again.stdout) == (5, "")
    assert again.stderr.startswith(f"StorageError: {out} already holds a table")
    assert again.stderr.count("\n") == 1


def test_help_needs_no_torch() -> None:
    assert "--num-clusters" in help_without_libraries(JOB)
