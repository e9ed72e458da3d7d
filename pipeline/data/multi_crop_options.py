"""How often and how far the views of an image may differ: the numbers of DINO's augmentation.

To add one: a field here with its range in ``__post_init__``; who draws with it is ``draw_views`` in
``pipeline/data/multi_crop.py``.
"""

import math
from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MultiCropOptions:
    """How views are drawn; defaults of DINO.

    Raises:
        ConfigError: a value outside its legal range.
    """

    num_local: int = 8
    """Local views beside the two global ones."""

    global_size: int = 224
    """Side in pixels of a global view."""

    local_size: int = 96
    """Side in pixels of a local view."""

    global_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the image's area that a global view shows."""

    local_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a local view shows."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width divided by height of what a view shows."""

    hflip: float = 0.5
    """Probability of a mirrored view."""

    jitter_prob: float = 0.8
    """Probability that the four adjustments below are made, in random order."""

    brightness: float = 0.4
    """Factors lie in [1 - brightness, 1 + brightness]; contrast and saturation likewise."""

    contrast: float = 0.4
    saturation: float = 0.2

    hue: float = 0.1
    """Hues turn by up to this share of the colour circle either way."""

    gray_prob: float = 0.2
    """Probability of a view without colours."""

    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Of the first global view, the second, and each local one; ``solarize_prob`` likewise."""

    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view."""

    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0)

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        """Check every number; ranges that follow from another one are checked with it."""
        for name in ("global_size", "local_size"):
            _check(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        _check("num_local", self.num_local >= 0, "at least 0", self.num_local)
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            _check(name, 0 < low <= high <= 1, "an ascending pair in (0, 1]", (low, high))
        for name in ("ratio", "blur_sigma"):
            low, high = getattr(self, name)
            _check(name, 0 < low <= high < math.inf, "an ascending positive pair", (low, high))
        for name in ("hflip", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
            value = getattr(self, name)
            chances = value if isinstance(value, tuple) else (value,)
            _check(name, all(0 <= chance <= 1 for chance in chances), "in [0, 1]", value)
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _check(name, 0 <= value < math.inf, "at least 0", value)
        _check("hue", 0 <= self.hue <= 0.5, "in [0, 0.5]", self.hue)
        _check("std", all(value > 0 for value in self.std), "positive", self.std)


def _check(name: str, legal: bool, expected: str, found: object) -> None:
    if not legal:
        raise ConfigError(f"{name} must be {expected}, got {found}: change it")
