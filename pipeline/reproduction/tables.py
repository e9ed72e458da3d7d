"""The tables by name: ``drloc-2a``, ``lost-1`` and so on.

To add a table: a function from a size to a ``Table`` beside those in classifier_tables.py or
box_tables.py, its figures in reproduction/published_figures.py, a line here, its name in config/reproduction.py.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from pipeline.errors import ConfigError
from pipeline.reproduction import box_tables, classifier_tables
from pipeline.reproduction.cells import Cell, Table
from pipeline.reproduction.classifier_tables import Size

TABLES: dict[str, Callable[[Size], Table]] = {
    "drloc-2a": classifier_tables.table_2a,
    "drloc-2b": classifier_tables.table_2b,
    "drloc-3": classifier_tables.table_3,
    "drloc-4": classifier_tables.table_4,
    "drloc-5": classifier_tables.table_5,
    "lost-1": box_tables.lost_1,
    "lost-3": box_tables.lost_3,
    "solost-4": box_tables.solost_4,
    "cad-5": box_tables.cad_5,
}


def chosen_cells(table: Table, rows: Sequence[str]) -> tuple[Cell, ...]:
    """The cells that ``rows`` (names, or patterns with * and ?) choose, and what they are held to.

    Args:
        table: all there are.
        rows: empty chooses all.

    Raises:
        ConfigError: a row fits no cell.
    """
    names = [cell.name for cell in table.cells]
    chosen = set(names) if not rows else set()
    for row in rows:
        fitting = {name for name in names if fnmatchcase(name, row)}
        if not fitting:
            raise ConfigError(f"--rows {row} is none of the table's: {', '.join(names)}")
        chosen |= fitting
    chosen |= {cell.base for cell in table.cells if cell.name in chosen and cell.base}
    return tuple(cell for cell in table.cells if cell.name in chosen)
