"""LOST and SoLOST one image, one patch at a time, written to be obviously right.

The oracle of the batched code where the golden data is absent. Exact for small integer features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Vector = Sequence[float]


@dataclass
class Slow:
    box: list[int]
    found: bool
    seed: int
    degree: list[int]
    component: set[int]


def product(left: Vector, right: Vector) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def slow_localize(
    patches: list[list[float]], width: int, *, rule: str, cosine: bool, m: float, k: int
) -> Slow:
    usable = [product(p, p) > 0 for p in patches]
    indices = range(len(patches))
    degree = [
        sum(product(patches[p], patches[q]) > 0 for q in indices if q != p) if usable[p] else 0
        for p in indices
    ]
    by_degree = sorted((p for p in indices if usable[p]), key=lambda p: (degree[p], p))
    if not by_degree:
        return Slow([0, 0, 0, 0], False, 0, degree, set())
    seed = by_degree[0]
    similar = [p for p in by_degree if p == seed or product(patches[seed], patches[p]) > 0]
    if rule == "lost":
        members = [p for p in by_degree[:k] if p in similar]
    else:
        members = similar[: max(1, int(m * len(similar)))]
    votes = [
        sum(
            product(patches[s], patches[q])
            / (product(patches[s], patches[s]) ** 0.5 if cosine else 1.0)
            for s in members
        )
        for q in indices
    ]
    component = flood({q for q in indices if votes[q] > 0}, seed, width)
    if not component:
        return Slow([0, 0, 0, 0], False, 0, degree, set())
    rows, columns = [q // width for q in component], [q % width for q in component]
    box = [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
    return Slow(box, True, seed, degree, component)


def flood(mask: set[int], seed: int, width: int) -> set[int]:
    """The patches of ``mask`` that ``seed`` reaches over shared edges."""
    reached: set[int] = set()
    queue = [seed] if seed in mask else []
    while queue:
        patch = queue.pop()
        if patch in reached:
            continue
        reached.add(patch)
        row, column = divmod(patch, width)
        beside = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        queue += [r * width + c for r, c in beside if 0 <= c < width and r * width + c in mask]
    return reached
