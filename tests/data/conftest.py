"""A small tree of files, and what a collection of images lists of it."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.data.lake import INPUT_SCHEMA, Collection, Listing


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four images, two of one name, and two other files."""
    names = ("a/cat.jpg", "b/cat.jpg", "b/c/dog.PNG", "top.webp", "b/notes.txt", "b/README")
    return plant(tmp_path / "tree", *names)


def plant(root: Path, *names: str) -> Path:
    """Files whose content is their own name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listed(images: str | Path, num_rows: int = 50_000) -> tuple[list[str], Listing]:
    """URIs and report of a collection, after checks that hold for every one of them."""
    collection = Collection(str(images))
    chunks = list(collection.chunks(num_rows))
    assert all(chunk.schema == INPUT_SCHEMA and chunk.num_rows <= num_rows for chunk in chunks)
    table = pa.concat_tables(chunks)
    ids = table["image_id"].to_pylist()
    assert len(set(ids)) == len(ids) == collection.report.num_images
    return table["uri"].to_pylist(), collection.report


def ids_of(images: str | Path) -> list[str]:
    """The image ids of a collection, in its order."""
    tables = list(Collection(str(images)).chunks())
    ids: list[str] = pa.concat_tables(tables)["image_id"].to_pylist()
    return ids


def below(root: Path, uris: Sequence[str]) -> list[str]:
    """The URIs relative to ``root``."""
    return [uri.removeprefix(f"{root}/") for uri in uris]
