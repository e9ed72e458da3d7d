r"""Rows of cells -> a Markdown table for people, or CSV for programs and spreadsheets.

    markdown_table(["row", "ours"], [["a|b", 62.5]], right=[1])  ->  | row | ours |
                                                                     | --- | ---: |
                                                                     | a\|b | 62.5 |

Cells may hold text that came from outside, such as names of files and classes: it can neither end
a cell nor become a formula.
"""

import csv
import io
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

# What a spreadsheet takes for the beginning of a formula (OWASP, CSV injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\n")
_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
_NUMBERS = re.compile(rf"{_NUMBER}( {_NUMBER})*", re.IGNORECASE)


def markdown_table(
    titles: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Collection[int] = ()
) -> str:
    """The lines of the table, each ended; a cell of several lines becomes one.

    Args:
        titles: of the columns.
        rows: a cell for each title; None is an empty cell, floats get six digits.
        right: places of the columns, from 0, that are set against their right edge.
    """
    rule = ["---:" if place in right else "---" for place in range(len(titles))]
    lines = [map(_markdown, titles), rule, *(map(_markdown, row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_table(titles: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """The table with a head; None is an empty cell, and lines end in a line feed alone.

    A text that a spreadsheet would run as a formula gets an apostrophe in front; numbers do not,
    nor does a text of numbers with spaces between.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_harmless(cell) for cell in row] for row in (titles, *rows))
    return text.getvalue()


def _markdown(cell: Any) -> str:
    if cell is None:
        return ""
    text = f"{cell:.6g}" if isinstance(cell, float) else str(cell)
    # A backslash first: before a bar of ours it would set that free again.
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").splitlines())


def _harmless(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    # Python's writer leaves a lone carriage return without quotes: its cell would end a row.
    text = cell.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBERS.fullmatch(text) else text
