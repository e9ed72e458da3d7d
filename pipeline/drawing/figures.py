"""What all figures share: a palette that readers who see few colours tell apart, axes, PNG.

Drawn with matplotlib's objects alone: no global state is touched, so it may run in any thread.
"""

import io
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, FAINT, PALE = "#1c1e22", "#69707a", "#e6e8eb"
"""Of words that matter, of those beside them, and of lines that must not catch the eye."""

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#59606a"
"""Of what is shown, after Okabe and Ito; give curves dashes too, for print."""

DPI = 150


def new_figure(width: float, height: float, *, dpi: int = DPI) -> Figure:
    """An empty page, in inches; its axes keep clear of each other's words."""
    return Figure((width, height), dpi=dpi, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))


def title(axes: Axes, text: str) -> None:
    """What the axes show, above them on the left."""
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)


def headline(figure: Figure, text: str) -> None:
    """What the whole figure shows, above it on the left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, color=INK)


def quiet(axes: Axes, grid: Literal["x", "y", "both"], *, frame: bool = False) -> None:
    """Small faint numbers, a pale grid behind what is drawn, and a pale frame or none."""
    axes.grid(axis=grid, color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=FAINT, labelsize=8)
    axes.spines[:].set(visible=frame, color=PALE)


def png(figure: Figure) -> bytes:
    """The bytes of the picture."""
    picture = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png")
    return picture.getvalue()
