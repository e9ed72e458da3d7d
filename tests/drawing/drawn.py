"""What a picture shows, read from the figure behind it and from its bytes."""

import io
from collections.abc import Callable
from types import ModuleType

import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.drawing import figures


def last_figure(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Callable[[], Figure]:
    """What gives the figure of the last picture that ``module`` drew, as matplotlib has it."""
    seen: list[Figure] = []
    as_png = figures.png

    def keep(figure: Figure) -> bytes:
        seen.append(figure)
        return as_png(figure)

    monkeypatch.setattr(module, "png", keep)
    return lambda: seen[-1]


def titles(figure: Figure) -> list[str]:
    """Of its axes, where they have one."""
    return [title for axes in figure.axes if (title := axes.get_title(loc="left"))]


def texts(figure: Figure) -> str:
    """All that stands in its axes, a line each."""
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG that is not blank."""
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors() or ()) > 1, "the picture is blank"
        return picture.size
