"""A trained detector as an ONNX file that has been shown to find what the detector finds.

    stored = read_detector(Location.parse("OUT"))
    export_detector_onnx(stored, Location.parse("OUT"))  # OUT/model.onnx

In: ``image``, uint8 ``(3, H, W)`` RGB of any H and W, already resized as ``config.json`` says
(``size``). Out: ``boxes`` ``(D, 4)`` xyxy in its pixels, ``scores`` ``(D,)``, ``labels`` ``(D,)``.

Torchvision's operators (NMS, ROIAlign) and the branches around them are known to torch's older
exporter only, which follows one image through the detector.

Shape letters:  H, W rows and columns   D, E boxes of one image
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.detection.box_loader import SeenSize
from pipeline.detection.detector import Detector
from pipeline.detection.exported_detector import StoredDetector
from pipeline.detection.predictor import Photo, opened
from pipeline.errors import WeightsError
from pipeline.models.onnx_export import ONNX_NAME, OPSET, OnnxRun, keep_checked
from pipeline.scenes.scenes import make_scene
from pipeline.storage import Location

BOX_TOLERANCE_PX = 1e-2
SCORE_TOLERANCE = 1e-4
UNLIKE_FRACTION = 0.01
"""Share of detections that may lack a partner: between two boxes of all but equal score, or of an
overlap that is all but the limit, the last digit decides which one stays."""

_INPUT, _OUTPUTS = "image", ("boxes", "scores", "labels")
# Of the image that is followed through the detector: small, as its size is nothing to the graph.
_TRACED_HW = (96, 128)
_SMALLEST_SCENE = 64
_ASPECT = 4 / 3

Found = tuple[Tensor, Tensor, Tensor]
"""``boxes_D4``, ``scores_D``, ``labels_D``."""


@dataclass(frozen=True)
class DetectorOnnxCheck:
    """How well the ONNX file agrees with the detector it was made from."""

    file: str
    """Where it lies."""

    sha256: str
    opset: int
    num_images: int
    """That were compared, of different sizes."""

    num_detections: int
    """That the detector found on them."""

    num_unlike: int
    """Detections of either that the other has no partner for; see ``UNLIKE_FRACTION``."""

    max_box_difference: float
    """Of the others, pixels."""

    max_score_difference: float


def export_detector_onnx(
    stored: StoredDetector, folder: Location, *, photos: Sequence[Photo] = ()
) -> DetectorOnnxCheck:
    """Write ``model.onnx`` after ONNX Runtime has found the detector's boxes with it.

    Both look at noise and at two procedural scenes, of three sizes, and at ``photos``. One of an
    earlier export is deleted first.

    Args:
        stored: what ``read_detector`` gave; it is left as it is.
        folder: of a disk or a bucket.
        photos: further images to compare on.

    Raises:
        ConfigError: a package of ``patchseed[export]`` is not installed.
        WeightsError: the detector cannot be exported, the file finds other boxes, or there is
            nothing to compare.
        DataError: a photo cannot be decoded.
        StorageError: the folder cannot be written.
    """
    detector = copy.deepcopy(stored.detector).cpu().float().eval().requires_grad_(False)
    network = _OneImage(detector).eval()
    images = [*_made_up_images(stored.size), *(_seen(photo, stored) for photo in photos)]

    def check(run: OnnxRun) -> list[Likeness]:
        with torch.inference_mode():
            alike = [_compare(network, run, image_3HW) for image_3HW in images]
        _require_alike(alike)
        return alike

    kept, alike = keep_checked(folder, lambda path: _write(network, path), check)
    return DetectorOnnxCheck(
        file=kept.file,
        sha256=kept.sha256,
        opset=OPSET,
        num_images=len(alike),
        num_detections=sum(one.num for one in alike),
        num_unlike=sum(one.unlike for one in alike),
        max_box_difference=max(one.box_difference for one in alike),
        max_score_difference=max(one.score_difference for one in alike),
    )


class _OneImage(nn.Module):
    """The detector with tensors alone at both ends."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image_3HW: Tensor) -> Found:
        """What is found on one uint8 image."""
        (found,) = self.detector([image_3HW.float() / 255])
        return found["boxes"], found["scores"], found["labels"]


def _write(network: nn.Module, path: Path) -> None:
    example_3HW = torch.zeros(3, *_TRACED_HW, dtype=torch.uint8)
    torch.onnx.export(
        network,
        (example_3HW,),
        f=path,
        dynamo=False,
        opset_version=OPSET,
        input_names=[_INPUT],
        output_names=list(_OUTPUTS),
        dynamic_axes={
            _INPUT: {1: "height", 2: "width"},
            **{name: {0: "detections"} for name in _OUTPUTS},
        },
    )


def _made_up_images(size: SeenSize) -> list[Tensor]:
    """``(3, H, W)`` uint8 each, of three shapes as large as photos are made."""
    short = max(size.short_side, _SMALLEST_SCENE)
    long = max(short, min(round(short * _ASPECT), size.max_side))
    noise = np.random.default_rng(0).integers(0, 256, (short, short, 3), dtype=np.uint8)
    scenes = [
        make_scene(1, width=long, height=short, num_objects=3).pixels_HW3,
        make_scene(2, width=short, height=long, num_objects=3).pixels_HW3,
    ]
    return [torch.from_numpy(one).permute(2, 0, 1).contiguous() for one in (noise, *scenes)]


def _seen(photo: Photo, stored: StoredDetector) -> Tensor:
    image_3HW = stored.size.pixels_of(opened(photo))
    return image_3HW


@dataclass(frozen=True)
class Likeness:
    """What two detectors made of one image."""

    num: int
    """Detections of the first."""

    unlike: int
    """Detections of one of them that the other has no partner for, of whichever has more."""

    box_difference: float
    """The largest difference of partners, pixels; 0 where there are none."""

    score_difference: float


def likeness(expected: Found, found: Found) -> Likeness:
    """How alike two lists of detections are, in whatever order.

    Partners have the same label, corners within ``BOX_TOLERANCE_PX`` and scores within
    ``SCORE_TOLERANCE``.
    """
    box_DE = (expected[0][:, None] - found[0][None]).abs().amax(dim=2)
    score_DE = (expected[1][:, None] - found[1][None]).abs()
    # Not "greater than": a NaN has no partner.
    partners_DE = (box_DE <= BOX_TOLERANCE_PX) & (score_DE <= SCORE_TOLERANCE)
    partners_DE &= expected[2][:, None] == found[2][None]
    alone = [int((~partners_DE.any(dim=dim)).sum()) for dim in (0, 1)]
    if not partners_DE.any():
        return Likeness(len(expected[0]), max(alone), 0.0, 0.0)
    return Likeness(
        len(expected[0]),
        # Two cannot share a partner without one being left over.
        max(*alone, abs(len(expected[0]) - len(found[0]))),
        float(box_DE[partners_DE].max()),
        float(score_DE[partners_DE].max()),
    )


def _compare(network: nn.Module, run: OnnxRun, image_3HW: Tensor) -> Likeness:
    boxes_E4, scores_E, labels_E = run({_INPUT: image_3HW})
    return likeness(network(image_3HW), (boxes_E4, scores_E, labels_E))


def _require_alike(alike: Sequence[Likeness]) -> None:
    num, unlike = (sum(getattr(one, name) for one in alike) for name in ("num", "unlike"))
    if unlike > UNLIKE_FRACTION * num:
        raise WeightsError(
            f"{ONNX_NAME} was not written: on {len(alike)} images {unlike} detections of {num} are "
            f"not the detector's (corners within {BOX_TOLERANCE_PX:g} px, scores within "
            f"{SCORE_TOLERANCE:g}), allowed is {UNLIKE_FRACTION:.0%}; use model.safetensors"
        )
    if not num:
        raise WeightsError(
            f"{ONNX_NAME} was not written: the detector finds nothing on {len(alike)} images that "
            "it could be compared on; give export_detector_onnx photos on which it does"
        )
