"""A table whose boxes cluster by colour, and what to look for in the table made of it."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipeline.data.pseudo_labels import read_labels
from pipeline.storage import Location
from tests.tables import Row, label_row, write_table

COLOURS = {"red": (220, 30, 20), "green": (20, 200, 60), "blue": (30, 40, 210)}
MADE_WITH = {"backbone.name": "vit_small_patch16_224.dino", "decode.max_side": 512}


def write_photos(folder: Path) -> list[Row]:
    """Two patches of one colour, striped or not, in each of 12 grey pictures; and their rows."""
    folder.mkdir()
    rows: list[Row] = []
    for number in range(12):
        generator = np.random.default_rng(number)
        noise = generator.integers(90, 160, (90, 140, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        draw = ImageDraw.Draw(picture)
        colour = list(COLOURS.values())[number % 3]
        boxes = [(8, 10, 58, 70), (70, 20, 130, 60 + number)]
        for x0, y0, x1, y1 in boxes:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
        path = folder / f"{number:02d}.png"
        picture.save(path)
        rows.append(
            label_row(
                path.name,
                uri=str(path),
                width=140,
                height=90,
                boxes=[[float(edge) for edge in box] for box in boxes],
                scores=[0.9, 0.4],
                labels=[1, 1],
            )
        )
    empty: dict[str, Any] = {"boxes": [], "scores": [], "labels": []}
    rows.append(label_row("none.png", status="no_object", error="nothing", **empty))
    rows.append(label_row("gone.png", status="error_read", error="not found"))
    return rows


def write_coloured_table(folder: Path) -> Path:
    """A finished table of two files, beside its photos."""
    rows = write_photos(folder / "photos")
    job = {"images": "photos", "backbone": {"checkpoint": "elsewhere.pth"}}
    write_table(folder / "labels", rows[:5], rows[5:], config=MADE_WITH, job=job)
    return folder / "labels"


def flags_for(weights: Path) -> list[str]:
    """A small network, small crops, as many clusters as there are colours."""
    return [
        *("--backbone.name", "vit_tiny_patch16_224", "--backbone.checkpoint", str(weights)),
        *("--crop-size", "48", "--num-clusters", "3"),
    ]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_labels(Location.parse(str(folder))).to_pylist()
    return rows


def assert_labels_are_the_colours(folder: Path, labels: set[int]) -> None:
    by_colour: dict[int, set[int]] = {}
    for row in rows_of(folder):
        if row["status"] == "ok":
            by_colour.setdefault(int(row["image_id"][:2]) % 3, set()).update(row["labels"])
    assert [len(found) for found in by_colour.values()] == [1, 1, 1], by_colour
    assert set.union(*by_colour.values()) == labels
