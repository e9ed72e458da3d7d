"""Time several ways of doing one thing side by side, so that only their ratios matter."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def best_seconds(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Each way's fastest run out of ``rounds``; the ways take turns, so that a slow spell of the
    machine falls on all of them.
    """
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=110, highlight=False).print(table)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Keep a benchmark's result beside how it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(f"written to {path}")
