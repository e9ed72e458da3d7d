"""Procedural scenes that look a little like photographs, with exact boxes and masks.

They are the sample collection of ``make demo`` and endless training images for small models. A
scene is a ground in perspective below a sky or a wall, one dominant object off the centre, perhaps
one or two smaller ones, and one light. Everything follows from the seed. A box is drawn around the
pixels of its object that are visible, so the labels are exact by construction.

To add a kind of object: scenes/shapes.py. To add a ground: scenes/backdrops.py.

Shape letters:  H, W image   N objects
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.boxes import as_boxes, xyxy_to_xywh
from pipeline.errors import ConfigError, StorageError
from pipeline.scenes.backdrops import GROUNDS, Rng, backdrop
from pipeline.scenes.rendering import cast_shadow, contrasting, paste, render, through_lens
from pipeline.scenes.shapes import KINDS, PaintedPart, extent, moved
from pipeline.storage import Location

ANNOTATIONS_NAME = "instances.json"


MIN_SIDE = 64


MAX_OBJECTS = 6


SIZES = ((500, 375), (375, 500), (480, 360), (400, 400), (500, 333), (360, 480), (640, 426))
"""(width, height), mixed as in VOC and COCO."""


@dataclass(frozen=True)
class Scene:
    """One picture and all there is to know about it; the main object comes first."""

    pixels_HW3: NDArray[np.uint8]
    boxes_N4: NDArray[np.float64]
    """xyxy pixels, tight around the visible part, x1 and y1 exclusive."""
    masks_NHW: NDArray[np.bool_]
    """Visible pixels; no pixel belongs to two objects."""
    category_N: tuple[str, ...]


def make_scene(seed: int, *, width: int, height: int, num_objects: int | None = None) -> Scene:
    """The scene of this seed, the same on every machine but for rounding in a pixel's last bit.

    Args:
        seed: an integer from 0.
        width: pixels, at least 64.
        height: pixels, at least 64.
        num_objects: 1 to 6; None for mostly one, at times two or three.

    Raises:
        ConfigError: the seed, a side or the number of objects is outside its range.
    """
    _check(seed, [(width, height)])
    if num_objects is not None and not 1 <= num_objects <= MAX_OBJECTS:
        raise ConfigError(f"num_objects must be in [1, {MAX_OBJECTS}], got {num_objects}")
    rng = np.random.default_rng(seed)
    count = num_objects or int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
    ground = str(rng.choice(list(GROUNDS)))
    canvas_HW3, horizon = backdrop(rng, (height, width), ground)
    kinds = [str(kind) for kind in rng.choice(list(KINDS), count)]
    things = _arrange(rng, [KINDS[kind](rng) for kind in kinds], (height, width), horizon)
    light = np.array([rng.choice([-1, 1]) * rng.uniform(0.35, 0.9), -rng.uniform(0.5, 1), 0.8])
    owner_HW = np.full((height, width), -1)
    # From the back to the front: what stands lower in the picture is nearer.
    for index in sorted(range(count), key=lambda index: extent(things[index])[3]):
        colours = contrasting(rng, canvas_HW3, things[index], kinds[index])
        layer = render(rng, things[index], colours, light)
        cast_shadow(canvas_HW3, layer, horizon, light)
        paste(canvas_HW3, owner_HW, layer, index)
    masks_NHW = owner_HW == np.arange(count)[:, None, None]
    boxes_N4 = as_boxes([_tight_box(mask_HW) for mask_HW in masks_NHW])
    return Scene(through_lens(rng, canvas_HW3), boxes_N4, masks_NHW, tuple(kinds))


def write_collection(
    folder: Path,
    *,
    num_scenes: int,
    seed: int,
    sizes: Sequence[tuple[int, int]] = SIZES,
    num_objects: Sequence[int | None] = (None,),
) -> Path:
    """The path of a new COCO file beside ``images/{landscape,portrait,square}/scene_00000.jpg``.

    ``file_name`` is relative to ``folder/images``; boxes are xywh, segmentations uncompressed RLE.
    The COCO file is written last, so where it is, the collection is whole. The scenes take the
    ``sizes`` in turn, and the ``num_objects``, which are those of ``make_scene``.

    Raises:
        ConfigError: the number of scenes, the seed or a size is outside its range.
        StorageError: the folder is not empty or cannot be written.
    """
    _check(seed, sizes)
    if num_scenes < 1:
        raise ConfigError(f"num_scenes must be at least 1, got {num_scenes}")
    root = Location.parse(str(folder))
    if not root.is_empty():
        raise StorageError(f"{root} is not empty; name a new folder or delete this one first")
    coco: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    coco["categories"] = [{"id": place, "name": kind} for place, kind in enumerate(KINDS, 1)]
    for index in range(num_scenes):
        width, height = sizes[index % len(sizes)]
        # Children of one seed: collections of neighbouring seeds share no scene.
        child = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
        scene = make_scene(
            child, width=width, height=height, num_objects=num_objects[index % len(num_objects)]
        )
        form = ("portrait", "square", "landscape")[int(np.sign(width - height)) + 1]
        name = f"{form}/scene_{index:05d}.jpg"
        root.child("images").child(name).write_bytes(_jpeg(scene.pixels_HW3))
        image = {"id": index + 1, "file_name": name, "width": width, "height": height}
        coco["images"].append(image)
        coco["annotations"] += _annotations(scene, index + 1, len(coco["annotations"]) + 1)
    root.child(ANNOTATIONS_NAME).write_bytes((json.dumps(coco) + "\n").encode())
    return Path(root.path) / ANNOTATIONS_NAME


def _check(seed: int, sizes: Sequence[tuple[int, int]]) -> None:
    if seed < 0:
        raise ConfigError(f"seed must be an integer from 0, got {seed}")
    if not sizes:
        raise ConfigError("sizes must name at least one (width, height), got none")
    for width, height in sizes:
        if min(width, height) < MIN_SIDE:
            raise ConfigError(f"width and height must be at least {MIN_SIDE}, got {width}x{height}")


def _jpeg(pixels_HW3: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_HW3).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO's records of the scene's objects."""
    kinds = list(KINDS)
    return [
        {
            "id": first_id + place,
            "image_id": image_id,
            "category_id": kinds.index(kind) + 1,
            "bbox": xyxy_to_xywh(box)[0].tolist(),
            "area": int(mask_HW.sum()),
            "segmentation": {"size": list(mask_HW.shape), "counts": _run_lengths(mask_HW)},
            "iscrowd": 0,
        }
        for place, (kind, box, mask_HW) in enumerate(
            zip(scene.category_N, scene.boxes_N4, scene.masks_NHW, strict=True)
        )
    ]


def _run_lengths(mask_HW: NDArray[np.bool_]) -> list[int]:
    """COCO's runs down the columns; the first one counts background."""
    flat = np.concatenate([[False], mask_HW.ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(run) for run in np.diff(edges, prepend=0, append=mask_HW.size)]


def _tight_box(mask_HW: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _arrange(
    rng: Rng, things: list[list[PaintedPart]], size: tuple[int, int], horizon: int
) -> list[list[PaintedPart]]:
    """The things in pixels: the first one big and off the centre, the others clear of it."""
    placed: list[list[PaintedPart]] = []
    # At least about 14 pixels a side, also in a thumbnail.
    least = 200 / (size[0] * size[1])
    for thing in things:
        low, high = (0.09, 0.42) if not placed else (max(0.015, least), max(0.07, least))
        share = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        turned = moved(thing, (float(rng.choice([-1, 1])), 1))
        spots: list[tuple[float, list[PaintedPart]]] = []
        for _ in range(40):
            spot = _stand(rng, turned, size, (share, horizon))
            spots.append((max((_overlap(spot, other) for other in placed), default=0.0), spot))
            if spots[-1][0] < 0.12:
                break
            share = max(least, share * 0.96)
        placed.append(min(spots, key=lambda scored: scored[0])[1])
    return placed


def _stand(
    rng: Rng, thing: list[PaintedPart], size: tuple[int, int], plan: tuple[float, int]
) -> list[PaintedPart]:
    """The thing at a random place on the ground, its box covering about the planned share."""
    (height, width), (share, horizon) = size, plan
    x0, y0, x1, y1 = extent(thing)
    wide, tall = x1 - x0, y1 - y0
    wanted = float(np.sqrt(share * height * width / (wide * tall)))
    scale = min(wanted, 0.92 * width / wide, 0.92 * height / tall)
    side = rng.choice([-1, 1]) * rng.uniform(0.35, 1.06)
    left = (width - wide * scale) * (1 + side) / 2
    highest = max(horizon + 0.06 * height, tall * scale)
    foot = rng.uniform(min(highest, 0.99 * height), 0.99 * height)
    return moved(thing, (scale, scale), (left - x0 * scale, foot - y1 * scale))


def _overlap(one: list[PaintedPart], other: list[PaintedPart]) -> float:
    """The two boxes' intersection as a share of the smaller one."""
    a, b = np.array(extent(one)), np.array(extent(other))
    common = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0).prod()
    return float(common / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()))
