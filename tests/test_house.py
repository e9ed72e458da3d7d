"""The order of the house: rooms, names, and pages that name what is there."""

import ast
import re
from collections import Counter
from pathlib import Path

from tests.conftest import ROOT


def sources(*roots: str) -> list[Path]:
    return [path for root in roots for path in sorted((ROOT / root).rglob("*.py"))]


def test_the_root_of_the_house_holds_what_all_rooms_stand_on_and_no_more() -> None:
    loose = {path.stem for path in (ROOT / "pipeline").glob("*.py")}
    assert loose == {
        "__init__",
        *("errors", "storage", "lease", "command_line", "progress", "boxes"),
    }


def test_no_two_classes_share_a_name() -> None:
    names = Counter(
        node.name
        for path in sources("pipeline")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_every_room_says_what_it_is() -> None:
    for room in (ROOT / "pipeline").glob("*/__init__.py"):
        said = ast.get_docstring(ast.parse(room.read_text()))
        assert said is not None, room
        assert len(said) > 80, room


# Files of other projects, and ones that an example makes up.
FOREIGN = {"train.py", "main.py", "config.py", "nothing.py"}


def test_every_file_that_a_docstring_or_a_page_names_is_there() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "pyproject.toml"]
    pages = [page for page in pages if page.name not in ("log.md", "CHANGELOG.md")]
    there = [f"/{path.relative_to(ROOT)}" for path in ROOT.glob("[!.]*/**/*.py")]
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*pages, *sources("pipeline", "jobs", "tune_spaces", "benchmarks")]
        for name in re.findall(r"(?<![\w/.<-])((?:[\w-]+/)*[a-z_0-9]+\.py)\b", path.read_text())
        if name not in FOREIGN and not any(one.endswith(f"/{name}") for one in there)
    ]
    assert missing == []
