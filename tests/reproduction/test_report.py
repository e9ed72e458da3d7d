"""The report's tables and picture hold every row, whatever became of it."""

import csv
import io

import numpy as np
from PIL import Image
from rich.console import Console

from pipeline.reproduction.cells import Cell
from pipeline.reproduction.measured import Gain, Line, Measured
from pipeline.reproduction.published_figures import Published
from pipeline.reproduction.report import (
    MOST_LINES,
    Report,
    as_csv,
    as_markdown,
    as_png,
    print_report,
)


def line(name: str, **more: object) -> Line:
    known: dict[str, object] = {
        "cell": Cell(name, f"row {name}", Published(60.0, "Table 9", 0.5), None),
        "measured": None,
        "published_gain": None,
        "gain": None,
        "state": "no data at hand (--data.svhn PATH)",
    }
    return Line(**{**known, **more})  # type: ignore[arg-type]


FULL = line(
    "full",
    measured=Measured(62.5, 1.0, (60.0, 65.0), {0: 61.5, 1: 63.5}),
    published_gain=-0.5,
    gain=Gain(2.0, (-1.0, 5.0), 2, 0.1),
    p_holm=0.2,
    state="ok",
)
PHOTOS = line(
    "photos",
    measured=Measured(50.0, None, (45.0, 55.0), hits_N=np.array([True, False])),
    gain=Gain(1.0, (-2.0, 4.0), 2),
    num_photos=2,
    state="ok",
)
REPORT = Report("Table 9", (FULL, PHOTOS, line("absent")), ("A note.",))


def test_markdown_puts_the_papers_figure_beside_ours() -> None:
    text = as_markdown(REPORT, "table.png")
    assert (
        "| row full | 60.00 sd 0.50 | 62.50 sd 1.00 | +2.50 [+0.00, +5.00] | -0.50 | "
        "+2.00 [-1.00, +5.00] | 0.200 | 2 seeds | ok |"
    ) in text
    assert "| - | no data at hand (--data.svhn PATH) |" in text
    assert "| row photos | 60.00 sd 0.50 | 50.00 [45.00, 55.00] | -10.00 [-15.00, -5.00] |" in text
    assert "2 photos" in text
    assert "- A note." in text
    assert "- Table 9" in text
    assert "1 of 3 rows have no figure of ours" in text


def test_a_long_table_sums_up_what_has_no_figure_on_the_terminal_alone() -> None:
    report = Report("Long", (FULL, *(line(str(number)) for number in range(30))), ())
    text = io.StringIO()
    print_report(report, Console(file=text, width=160))
    assert "row full" in text.getvalue()
    assert "row 7" not in text.getvalue()
    assert "Not shown here, 30 rows: no data at hand (--data.svhn PATH)." in text.getvalue()
    assert "row 7" in as_markdown(report, "table.png")


def test_csv_has_every_number_of_every_row() -> None:
    full, photos, absent = csv.DictReader(io.StringIO(as_csv(REPORT)))
    assert (full["ours"], full["gain_low"], full["by_seed"]) == ("62.5", "-1.0", "61.5000 63.5000")
    assert (photos["num_photos"], photos["p"]) == ("2", "")
    assert (absent["ours"], absent["paper"]) == ("", "60.0")


def test_the_terminals_table_has_all_rows() -> None:
    text = io.StringIO()
    print_report(REPORT, Console(file=text, width=160))
    for word in ("row full", "row photos", "row absent", "A note."):
        assert word in text.getvalue()


def test_a_picture_is_drawn_of_many_rows_and_of_none_with_a_figure() -> None:
    many = Report("Many", (line("absent"),) * (MOST_LINES + 1) + (FULL,), ())
    for report in (REPORT, many, Report("None", (line("absent"),), ())):
        assert Image.open(io.BytesIO(as_png(report))).width > 1000
