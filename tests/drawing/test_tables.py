"""Tables hold what they were given: read back with other readers, and nothing else happens."""

import csv
import io
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.drawing.tables import csv_table, markdown_table

TEXTS = st.text(alphabet=st.sampled_from("ab |\\\n\r\t=+-@,;'\"1.é"), max_size=12)


def cells_of(line: str) -> list[str]:
    """A row's cells as GitHub's reader has them: a bar ends a cell unless it is escaped."""
    cells = re.findall(r"((?:\\[\\|]|[^|\\])*)\|", line)
    assert "".join(f"{cell}|" for cell in cells) == line
    return [re.sub(r"\\([\\|])", r"\1", cell).strip() for cell in cells[1:]]


def test_markdown_is_what_it_looks_like() -> None:
    rows = [["a|b", 62.5, None], ["two\nlines", 1 / 3, True]]
    assert markdown_table(["row", "ours\n(%)", "state"], rows, right=[1]) == (
        "| row | ours (%) | state |\n"
        "| --- | ---: | --- |\n"
        "| a\\|b | 62.5 |  |\n"
        "| two lines | 0.333333 | True |\n"
    )


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=4))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_no_text_ends_a_markdown_cell_or_row(rows: list[tuple[str, str]]) -> None:
    lines = markdown_table(["x", "y"], rows).split("\n")
    assert lines.pop() == ""
    assert len(lines) == 2 + len(rows)
    for row, line in zip(rows, lines[2:], strict=True):
        assert cells_of(line) == [" ".join(text.splitlines()).strip() for text in row]


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=4))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_csv_reads_back_and_holds_no_formula(rows: list[tuple[str, str]]) -> None:
    text = csv_table(["x", "y"], rows)
    head, *found = list(csv.reader(io.StringIO(text, newline="")))
    assert head == ["x", "y"]
    assert len(found) == len(rows)
    for row, cells in zip(rows, found, strict=True):
        for given_text, cell in zip(row, cells, strict=True):
            unified = given_text.replace("\r\n", "\n").replace("\r", "\n")
            assert cell in (unified, f"'{unified}")
            if cell[:1] in ("=", "+", "-", "@", "\t", "\n", "\r"):
                [float(number) for number in cell.split(" ")]


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=HYPERLINK(A1)", "'=HYPERLINK(A1)"),
        ("+1+1", "'+1+1"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("-", "'-"),
        ("-inf", "'-inf"),
        (-2.5, "-2.5"),
        (-3, "-3"),
        (None, ""),
        (True, "True"),
        ([1, -2], '"[1, -2]"'),
        ("-0.45 0.1 -1e-05", "-0.45 0.1 -1e-05"),
        ("a=b", "a=b"),
        ("it's", "it's"),
    ],
)
def test_csv_marks_texts_that_would_be_formulas_and_no_numbers(cell: Any, written: str) -> None:
    assert csv_table(["x", "n"], [[cell, 1]]) == f"x,n\n{written},1\n"


def test_titles_from_outside_are_no_formulas_either() -> None:
    assert csv_table(["=x"], []) == "'=x\n"
