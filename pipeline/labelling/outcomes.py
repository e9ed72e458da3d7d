"""What was found in a batch, in patches -> what its rows say, in pixels of the original images.

Shape letters:  B images   K objects of all images   H, W rows and columns of patches
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import Boxes, area
from pipeline.config import LocalizationConfig
from pipeline.config.labelling import Rule
from pipeline.data.masks import encode
from pipeline.labelling.rows import Image, Outcome, no_object
from pipeline.localization.localize import Localization
from pipeline.localization.objects import MIN_PATCHES, Objects, contrast, objects_at_levels
from pipeline.localization.refine import refine_mask

OBJECT_LABEL = 1

_NO_SEED = "no patch can be a seed: all features are zero or not finite"
NOTHING_FOUND: dict[Rule, str] = {
    "solost": _NO_SEED,
    "lost": _NO_SEED,
    "ncut": "the image has no two sides: its patches are all alike, zero or not finite",
    "head": "no patch is above the head's threshold",
}


def outcomes_of(
    found: Localization,
    stride: int,
    images: Sequence[Image],
    sizes_B2: NDArray[Any],
    settings: LocalizationConfig,
) -> list[Outcome]:
    """One per image of the batch.

    Args:
        found: by these settings, in the images.
        stride: pixels per patch.
        images: as the network saw them; they may have been scaled down.
        sizes_B2: width and height of the originals.
        settings: how many objects are kept, and what of them.
    """
    seen_B2 = np.array([(image.shape[1], image.shape[0]) for image in images], dtype=np.float64)
    # More than one object is found in a map of them, which only a head gives.
    many = settings.max_objects > 1 and settings.rule == "head"
    objects = _all_objects(found, settings) if many else _main_objects(found)
    has_some = set(objects.image_K.tolist())
    if settings.min_score is not None:
        objects = objects.where(objects.score_K >= settings.min_score)
    image_K = objects.image_K.cpu().numpy()
    boxes_K4 = in_original_pixels(
        objects.boxes_K4.cpu().numpy(), stride, seen_B2[image_K], sizes_B2[image_K]
    )
    columns: dict[str, Sequence[Any]] = {
        "boxes": list(boxes_K4),
        "scores": objects.score_K.tolist(),
        "labels": [OBJECT_LABEL] * len(boxes_K4),
    }
    if found.map_BHW is not None:
        stands_out_K = contrast(found.map_BHW, objects.image_K, objects.boxes_K4)
        columns["contrast"] = stands_out_K.tolist()
    if found.agreement_B is not None and not many:
        columns["agreement"] = found.agreement_B[objects.image_K].tolist()
    if settings.masks or settings.refine_masks:
        columns["masks"] = _masks(objects, stride, images, sizes_B2, refine=settings.refine_masks)
    seeds = None if many else _seeds(found, stride, seen_B2, sizes_B2, settings)
    outcomes: list[Outcome] = []
    for image, size_2 in enumerate(sizes_B2):
        mine: list[int] = np.flatnonzero(image_K == image).tolist()
        if mine:
            outcome = {name: [values[k] for k in mine] for name, values in columns.items()}
            outcome |= _of_best(boxes_K4[mine[0]], size_2) | (seeds[image] if seeds else {})
            outcomes.append({"status": "ok", "error": None, **outcome})
        elif image in has_some:
            outcomes.append(no_object(f"no box scores {settings.min_score:g} or more"))
        elif found.found_B[image]:
            outcomes.append(no_object(f"no object has {MIN_PATCHES} patches or more"))
        else:
            outcomes.append(no_object(NOTHING_FOUND[settings.rule]))
    return outcomes


def in_original_pixels(
    boxes_K4: Boxes, stride: int, seen_K2: NDArray[np.float64], sizes_K2: NDArray[Any]
) -> Boxes:
    """Boxes in patches of ``stride`` pixels -> pixels of the original images.

    Args:
        boxes_K4: xyxy in patches.
        stride: pixels per patch.
        seen_K2: width and height of each box's image as the network saw it.
        sizes_K2: of the original.
    """
    # The right and bottom patches may hang over the image; only boxes are clipped, as in LOST.
    corners_K22 = np.minimum(boxes_K4.reshape(-1, 2, 2) * stride, seen_K2[:, None])
    corners_K22 = corners_K22 * (sizes_K2 / seen_K2)[:, None]
    boxes_in_pixels_K4: Boxes = np.minimum(corners_K22, sizes_K2[:, None]).reshape(-1, 4)
    return boxes_in_pixels_K4


def _main_objects(found: Localization) -> Objects:
    """The one of each image where there is one."""
    image_K = found.found_B.nonzero()[:, 0]
    return Objects(
        image_K, found.boxes_B4[image_K], found.score_B[image_K], found.mask_BHW[image_K]
    )


def _all_objects(found: Localization, settings: LocalizationConfig) -> Objects:
    assert found.map_BHW is not None
    return objects_at_levels(
        found.map_BHW, max_objects=settings.max_objects, nms_iou=settings.nms_iou
    )


def _of_best(box_4: Boxes, size_2: NDArray[Any]) -> Outcome:
    touches = (box_4[:2] <= 0).any() or (box_4[2:] >= size_2).any()
    return {"area_fraction": area(box_4[None])[0] / size_2.prod(), "touches_border": touches}


def _seeds(
    found: Localization,
    stride: int,
    seen_B2: NDArray[np.float64],
    sizes_B2: NDArray[Any],
    settings: LocalizationConfig,
) -> list[Outcome]:
    """Where each image's main object was found from."""
    columns = found.mask_BHW.shape[2]
    seed_B = found.seed_B.cpu().numpy()
    seeds_B2 = (np.column_stack([seed_B % columns, seed_B // columns]) + 0.5) * stride
    seeds_B2 = np.minimum(seeds_B2, seen_B2) * (sizes_B2 / seen_B2)
    degree_B = found.degree_BN.gather(1, found.seed_B[:, None])[:, 0].tolist()
    return [
        # A head compares no patches, so its seeds have no degree.
        {"seed_xy": seed_2, "seed_degree": None if settings.rule == "head" else degree}
        for seed_2, degree in zip(seeds_B2, degree_B, strict=True)
    ]


def _masks(
    objects: Objects,
    stride: int,
    images: Sequence[Image],
    sizes_B2: NDArray[Any],
    *,
    refine: bool,
) -> list[dict[str, Any]]:
    """Of each object, as the table keeps it."""
    masks: list[dict[str, Any]] = []
    for image, mask_HW in zip(
        objects.image_K.tolist(), objects.mask_KHW.cpu().numpy(), strict=True
    ):
        pixels = images[image]
        per_pixel_2 = sizes_B2[image] / (pixels.shape[1], pixels.shape[0])
        if refine:
            fine_hw = refine_mask(mask_HW, pixels, stride)
            masks.append(encode(fine_hw, cell=tuple(per_pixel_2)))
        else:
            masks.append(encode(mask_HW, cell=tuple(per_pixel_2 * stride)))
    return masks
