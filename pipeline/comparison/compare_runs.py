"""Runs of one experiment, or of one folder -> the paired table, and its files.

The door of ``jobs/compare_runs.py``: reading is comparison/recorded_runs.py, the statistics
comparison/paired.py, the tables and the picture comparison/report.py and
comparison/report.py. To write one more file: a line in ``_files``.
"""

import json
import sys
from typing import Any

from rich.console import Console

from pipeline.comparison.paired import Comparison, compare
from pipeline.comparison.recorded_runs import read_experiment, read_folders
from pipeline.comparison.report import as_csv, as_json, as_markdown, as_png, print_report
from pipeline.errors import ConfigError
from pipeline.storage import Location

PICTURE = "comparison.png"


def compare_runs(
    *,
    experiment: str | None,
    runs: str | None,
    tracking_uri: str | None,
    metric: str,
    confidence: float,
    output: str | None,
) -> dict[str, Any]:
    """Print the paired table, write its files, and give every number as JSON values.

    Args:
        experiment: of MLflow, to read the runs from.
        runs: the folder of run folders to read instead.
        tracking_uri: None is ``$MLFLOW_TRACKING_URI``, else sqlite in ``./mlflow.db``.
        metric: what is compared.
        confidence: of the intervals, in (0, 1).
        output: folder (or URI) for table.md, table.csv, comparison.json and comparison.png, which
            are replaced; None writes nothing.

    Raises:
        ConfigError: not exactly one of ``experiment`` and ``runs``, or a URI that is not read.
        DataError: there are no such runs, or none of them pair up.
        StorageError: the runs cannot be read, or the files not written.
    """
    if experiment is not None and runs is None:
        records = read_experiment(experiment, tracking_uri)
    elif runs is not None and experiment is None:
        records = read_folders(runs)
    else:
        raise ConfigError("give --experiment NAME or --runs FOLDER, one of them")
    comparison = compare(records, metric, confidence)
    console = Console(file=sys.stdout)
    # Written first: what is printed last is then the result, whole or not at all.
    folder = None if output is None else Location.parse(output)
    if folder is not None:
        for name, data in _files(comparison).items():
            folder.child(name).write_bytes(data)
    print_report(comparison, console)
    if folder is not None:
        console.print(f"  Written to {folder}\n", highlight=False, markup=False, soft_wrap=True)
    return as_json(comparison)


def _files(comparison: Comparison) -> dict[str, bytes]:
    return {
        "table.md": as_markdown(comparison, PICTURE).encode(),
        "table.csv": as_csv(comparison).encode(),
        "comparison.json": (json.dumps(as_json(comparison), indent=2) + "\n").encode(),
        PICTURE: as_png(comparison),
    }
