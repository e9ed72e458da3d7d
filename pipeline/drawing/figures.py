"""What the pictures of a run share: colours that readers who see few of them tell apart, and PNG.

Drawn with matplotlib's objects: no global state is touched, so it may run in any thread.
"""

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, FAINT, PALE = "#1c1e22", "#69707a", "#e6e8eb"
DPI = 150


def title(axes: Axes, text: str) -> None:
    """What the axes show, above them on the left."""
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)


def png(figure: Figure) -> bytes:
    """The bytes of the picture."""
    picture = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png")
    return picture.getvalue()
