"""The kinds of object, as outlines: balls, birds, creatures, houses and more.

To add a kind: write a function beside ``_ball`` that returns parts in painter's order (any unit, y
downwards, the feet lowest) and name it in ``KINDS``.

Shape letters:  P points of an outline
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.scenes.backdrops import Points, Rng


@dataclass(frozen=True)
class PaintedPart:
    """One painted outline of an object."""

    outline_P2: Points
    paint: str = "coat"
    """"coat" or its darker "far" (patterned), or a plain colour of ``_PAINTS``."""
    printed: bool = False
    """Lies flat on the parts beneath and takes their shading; others are rounded by their own."""


def extent(parts: Sequence[PaintedPart]) -> tuple[float, float, float, float]:
    """The box around all parts, ``x0 y0 x1 y1``."""
    points = np.concatenate([part.outline_P2 for part in parts])
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    return x0, y0, x1, y1


def moved(
    thing: list[PaintedPart], scale: tuple[float, float], shift: tuple[float, float] = (0, 0)
) -> list[PaintedPart]:
    """The same parts, scaled about the origin and then shifted, (x, y) each."""
    return [replace(part, outline_P2=part.outline_P2 * scale + shift) for part in thing]


def _oval(x: float, y: float, radius_x: float, radius_y: float, tilt: float = 0) -> Points:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    across, down = radius_x * np.cos(turn), radius_y * np.sin(turn)
    level = x + across * np.cos(tilt) - down * np.sin(tilt)
    return np.stack([level, y + across * np.sin(tilt) + down * np.cos(tilt)], axis=1)


def _limb(
    start: tuple[float, float], end: tuple[float, float], wide: float, narrow: float
) -> Points:
    """A tapering capsule: a leg, a neck, a trunk."""
    turn = np.arctan2(end[1] - start[1], end[0] - start[0]) + np.linspace(-np.pi / 2, np.pi / 2, 9)
    cap = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return np.concatenate([np.array(end) + narrow * cap, np.array(start) - wide * cap])


def _outline(*corners: tuple[float, float], rounds: int = 0) -> Points:
    """The polygon, its corners cut ``rounds`` times (Chaikin): 3 make it smooth."""
    points = np.array(corners, dtype=np.float64)
    for _ in range(rounds):
        after = np.roll(points, -1, axis=0)
        cut = [0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after]
        points = np.stack(cut, axis=1).reshape(-1, 2)
    return points


def _round_body(radius_P: Points, stretch: tuple[float, float]) -> Points:
    """The outline at these distances from the middle, clockwise from the right."""
    turn = np.linspace(0, 2 * np.pi, len(radius_P), endpoint=False)
    return np.stack([radius_P * np.cos(turn), radius_P * np.sin(turn)], axis=1) * stretch


def _blob(rng: Rng) -> list[PaintedPart]:
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    radius = np.ones(96)
    for order in range(2, 6):
        radius += rng.normal(0, 0.22 / order) * np.cos(order * turn + rng.uniform(0, 7))
    return [PaintedPart(_round_body(radius, (rng.uniform(0.8, 1.5), 1)))]


def _ball(rng: Rng) -> list[PaintedPart]:
    panel, turn = rng.uniform(0.2, 0.34), rng.uniform(0, 7)
    skin = str(rng.choice(["coat", "cream"]))
    middle = _oval(0.1 * np.cos(turn), 0.1 * np.sin(turn), panel, panel)
    rim = [
        _oval(0.76 * np.cos(angle), 0.76 * np.sin(angle), panel * 0.55, panel * 0.9, angle)
        for angle in turn + np.arange(5) * 0.4 * np.pi
    ]
    return [
        PaintedPart(_oval(0, 0, 1, 1), skin),
        *(PaintedPart(spot, "far", True) for spot in (middle, *rim)),
    ]


def _beetle(rng: Rng) -> list[PaintedPart]:
    broad, head = rng.uniform(0.65, 0.85), rng.uniform(0.25, 0.35)
    legs = [
        PaintedPart(_limb((x * 0.5, y * 0.5), (x, y), 0.07, 0.04), "dark")
        for x in (-0.55, 0.05, 0.6)
        for y in (-broad - 0.25, broad + 0.25)
    ]
    feelers = [PaintedPart(_limb((1, y / 3), (1.5, y), 0.04, 0.03), "dark") for y in (-0.4, 0.4)]
    body = [
        PaintedPart(_oval(0.95, 0, head, head * 1.5), "dark"),
        PaintedPart(_oval(0, 0, 1, broad)),
    ]
    seam = PaintedPart(_limb((-0.98, 0), (0.8, 0), 0.025, 0.025), "dark", True)
    corners = np.array([(x, y) for x in (-1, 0.2, 1) for y in (-broad, broad)])
    places = rng.uniform(0.2, 0.6, (6, 2)) * corners
    spots = [PaintedPart(_oval(x, y, 0.15, 0.13), "dark", True) for x, y in places]
    return [*legs, *feelers, *body, seam, *spots]


def _house(rng: Rng) -> list[PaintedPart]:
    wide, tall, roof, deep = rng.uniform((0.9, 0.8, 0.5, 0.4), (1.5, 1.3, 1.0, 1.2)).tolist()
    middle, top, eaves, back = wide / 2, -tall - roof, 0.05 - tall, wide + deep
    front = _outline((0, 0), (wide, 0), (wide, -tall), (middle, top + 0.05), (0, -tall))
    side = _outline((wide, 0), (back, -0.12), (back, -tall), (wide, -tall))
    over = 0.08 * wide
    slope = _outline(
        (middle, top), (middle + deep, top), (back + over, eaves), (wide + over, eaves)
    )
    gable = _outline((-over, eaves), (middle, top), (middle, top + 0.16), (0, eaves + 0.07))
    pane = _outline((0, 0), (0.24 * wide, 0), (0.24 * wide, -0.26 * tall), (0, -0.26 * tall))
    windows = [np.add(pane, (x * wide, y * tall)) for x, y in ((0.58, -0.4), (0.38, -0.92))]
    windows.append(pane * (deep / wide, 1) + (wide + 0.35 * deep, -0.45 * tall))
    return [
        PaintedPart(side, "far", True),
        PaintedPart(front, "coat", True),
        PaintedPart(slope, "brick"),
        PaintedPart(gable, "brick", True),
        PaintedPart(pane * (1.1, 2.1) + (0.12 * wide, 0), "wood", True),
        *(PaintedPart(window, "glass", True) for window in windows),
    ]


def _flower(rng: Rng) -> list[PaintedPart]:
    count, broad, heart = int(rng.integers(6, 14)), rng.uniform(0.16, 0.3), rng.uniform(0.22, 0.4)
    stem, bend = rng.uniform(1.3, 2.2), rng.uniform(-0.3, 0.3)
    parts = [PaintedPart(_limb((0, 0), (bend, stem), 0.06, 0.08), "fern")]
    for side in (-1, 1):
        leaf = _oval(bend * 0.7 + side * 0.4, stem * rng.uniform(0.6, 0.8), 0.42, 0.13, -0.5 * side)
        parts.append(PaintedPart(leaf, "leaf"))
    for turn in rng.permutation(count) * 2 * np.pi / count:
        parts.append(PaintedPart(_oval(0.6 * np.cos(turn), 0.6 * np.sin(turn), 0.42, broad, turn)))
    return [
        *parts,
        PaintedPart(_oval(0, 0, heart, heart), str(rng.choice(["beak", "dark", "wood"]))),
    ]


def _fruit(rng: Rng) -> list[PaintedPart]:
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    # A dent below the stalk, as apples have, and the narrow shoulders of a pear.
    dent = 1 - rng.uniform(0, 0.25) * np.exp(-(((turn - 1.5 * np.pi) / 0.5) ** 2))
    shoulders = 1 + rng.uniform(-0.1, 0.4) * np.sin(turn)
    body = _round_body(dent, (1, rng.uniform(0.85, 1.25)))
    body[:, 0] *= shoulders
    top, lean = float(body[72, 1]), rng.uniform(-0.3, 0.3)
    leaf = [(0, top - 0.1), (0.3, top - 0.45), (0.8, top - 0.4), (0.5, top - 0.1)]
    stalk = _limb((0, top + 0.1), (lean, top - 0.4), 0.06, 0.05)
    return [
        PaintedPart(stalk, "wood"),
        PaintedPart(body),
        PaintedPart(_outline(*leaf, rounds=3), "leaf"),
    ]


def _mushroom(rng: Rng) -> list[PaintedPart]:
    cap, lean, tall = rng.uniform(0.6, 1.1), rng.uniform(-0.1, 0.1), rng.uniform(0.9, 1.5)
    brim = [(cap, -0.3), (cap, 0.3), (0, 0.15), (-cap, 0.3), (-cap, -0.3)]
    dome = _outline(*brim, (-cap / 2, -cap), (cap / 2, -cap), rounds=3)
    places = np.array([(-0.6, -0.1), (-0.2, -0.5), (0.1, -0.1), (0.35, -0.6), (0.7, -0.2)])
    places = cap * (places + rng.normal(0, 0.06, (5, 2))) - (0, 0.1 * cap)
    spots = [PaintedPart(_oval(x, y, cap * 0.13, cap * 0.1), "cream", True) for x, y in places]
    return [
        PaintedPart(_limb((0, 0.2), (lean, tall), cap * 0.3, cap * 0.38), "cream"),
        PaintedPart(dome),
        *spots,
    ]


def _plant(rng: Rng) -> list[PaintedPart]:
    fan = np.linspace(-1.2, 1.2, int(rng.integers(5, 10))) + rng.normal(0, 0.1)
    leaves = []
    for turn in rng.permutation(fan):
        reach, broad = rng.uniform(0.9, 1.7) / 2, rng.uniform(0.12, 0.25)
        leaf = _oval(reach * np.sin(turn), -reach * np.cos(turn), reach, broad, turn - np.pi / 2)
        leaves.append(PaintedPart(leaf, str(rng.choice(["leaf", "fern"]))))
    rim = rng.uniform(0.45, 0.7)
    pot = _outline((-rim, -0.1), (rim, -0.1), (rim * 0.7, 0.9), (-rim * 0.7, 0.9), rounds=1)
    return [*leaves, PaintedPart(pot)]


def _creature(rng: Rng) -> list[PaintedPart]:
    long, deep, leg = rng.uniform(0.6, 1.1), rng.uniform(0.28, 0.45), rng.uniform(0.4, 1.0)
    head, thin = rng.uniform(0.2, 0.32), rng.uniform(0.07, 0.13)
    x, y = long + rng.uniform(0.05, 0.35), -deep - rng.uniform(0, 0.6)
    tail = (-long - rng.uniform(0.2, 0.6), rng.uniform(-0.8, 0.5))
    chest = [(-long, -deep), (long, -deep), (long * 1.15, deep), (-long * 1.1, deep)]
    ear = np.array([(-0.16, -0.5), (-0.12, -1.5), (0.4, -0.7)]) * head
    return [
        PaintedPart(_limb((-long, -deep / 2), tail, 0.09, 0.04), "far"),
        *_legs(rng, (0.13 - long * 0.8, 0.13 + long * 0.75), deep + leg, thin, "far"),
        PaintedPart(_outline(*chest, rounds=3)),
        *_legs(rng, (-long * 0.8, long * 0.75), deep + leg, thin, "coat"),
        PaintedPart(_limb((long * 0.85, -deep * 0.2), (x, y), deep * 0.7, head * 0.6)),
        PaintedPart(np.add(ear, (x + 0.1, y)), "far"),
        PaintedPart(_oval(x, y, head * 1.1, head * 0.9, 0.3)),
        PaintedPart(_oval(x + head, y + head * 0.45, head * 0.6, head * 0.45, 0.3), "cream"),
        PaintedPart(np.add(ear, (x - 0.05, y))),
        PaintedPart(_oval(x + head * 1.45, y + head * 0.4, head * 0.16, head * 0.14), "dark"),
        PaintedPart(_oval(x + head * 0.45, y - head * 0.15, head * 0.15, head * 0.17), "dark"),
    ]


def _legs(
    rng: Rng, hips: tuple[float, float], foot: float, thin: float, paint: str
) -> list[PaintedPart]:
    """Two legs in step, each with its hoof."""
    stride = rng.uniform(-0.15, 0.15)
    parts = []
    for hip in hips:
        parts.append(PaintedPart(_limb((hip, 0), (hip + stride, foot), thin * 1.6, thin), paint))
        parts.append(PaintedPart(_oval(hip + stride + 0.03, foot, thin * 1.3, thin * 0.9), "dark"))
    return parts


def _bird(rng: Rng) -> list[PaintedPart]:
    head, tail, leg = rng.uniform(0.25, 0.4), rng.uniform(0.4, 1.0), rng.uniform(0.3, 0.8)
    x, y = 0.75, -0.7 - rng.uniform(0, 0.3)
    body = [(-0.8, -0.3), (0, -0.6), (0.7, -0.7), (0.9, 0.1), (0.2, 0.6), (-0.6, 0.3)]
    wing = [(0.5, -0.4), (0.3, 0.3), (-0.5, 0.35), (-1.2, 0.15), (-0.4, -0.4)]
    fan = [(-0.5, -0.3), (-0.9 - tail, -0.1), (-0.85 - tail, 0.3), (-0.4, 0.2)]
    face = x + head * 0.7
    beak = [(face, y - 0.1), (face + head * 1.2, y + 0.08), (face, y + 0.16)]
    return [
        *(
            PaintedPart(_limb((hip, 0.3), (hip, 0.5 + leg), 0.06, 0.04), "beak")
            for hip in (-0.1, 0.2)
        ),
        PaintedPart(_outline(*fan), "far"),
        PaintedPart(_outline(*beak), "beak"),
        PaintedPart(_outline(*body, rounds=3)),
        PaintedPart(_limb((0.4, -0.25), (x, y), 0.3, head * 0.75)),
        PaintedPart(_oval(x, y, head, head * 0.95)),
        PaintedPart(_outline(*wing, rounds=3), "far"),
        PaintedPart(_oval(x + head * 0.35, y - head * 0.2, head * 0.17, head * 0.17), "dark"),
    ]


def _vehicle(rng: Rng) -> list[PaintedPart]:
    long, roof, wheel = rng.uniform(1.2, 1.8), rng.uniform(0.5, 0.9), rng.uniform(0.26, 0.36)
    back, front = -long * rng.uniform(0.5, 0.95), long * rng.uniform(0.2, 0.6)
    body = [(-long, -0.25), (-long, 0.3), (long, 0.3), (long, -0.05), (long * 0.7, -0.25)]
    frame = [(back, -0.1), (back + 0.15, -roof), (front - 0.3, -roof), (front, -0.1)]
    cabin, left = _outline(*frame, rounds=1), (back + front) / 2 - 0.06
    panes = (cabin - cabin.mean(0)) * (0.85, 0.68) + cabin.mean(0)
    pillar = _outline((left, -roof * 0.9), (left + 0.1, -roof * 0.9), (left + 0.1, 0), (left, 0))
    parts = [
        PaintedPart(cabin),
        PaintedPart(panes, "glass"),
        PaintedPart(pillar),
        PaintedPart(_outline(*body, rounds=2)),
    ]
    for x in (-long * 0.6, long * 0.62):
        parts.append(PaintedPart(_oval(x, 0.32, wheel, wheel), "dark"))
        parts.append(PaintedPart(_oval(x, 0.32, wheel / 2, wheel / 2), "metal"))
    return [*parts, PaintedPart(_oval(long * 0.93, 0.02, 0.08, 0.08), "cream")]


KINDS: dict[str, Callable[[Rng], list[PaintedPart]]] = {
    "ball": _ball,
    "beetle": _beetle,
    "bird": _bird,
    "blob": _blob,
    "creature": _creature,
    "flower": _flower,
    "fruit": _fruit,
    "house": _house,
    "mushroom": _mushroom,
    "plant": _plant,
    "vehicle": _vehicle,
}
