"""A trained detector and how its images are to be resized: photos in, boxes out. No Ray.

Shape letters:  D boxes of one image
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.boxes import clip, rescale
from pipeline.data.labelled_images import decode_rgb
from pipeline.detection.box_loader import SeenSize
from pipeline.detection.detector import Detector
from pipeline.evaluation.predictions import Detections

Photo = str | Path | Image.Image | NDArray[np.uint8]
"""A file, an image, or ``(H, W, 3)`` RGB bytes."""


class Predictor:
    """Boxes of photos of any size, in their own pixels."""

    def __init__(self, detector: Detector, size: SeenSize) -> None:
        """Put the detector into evaluation mode.

        Args:
            detector: on the device to compute on.
            size: at which it sees images.
        """
        self.detector = detector.eval()
        self.size = size

    @property
    def device(self) -> torch.device:
        """Where the detector computes."""
        device: torch.device = next(self.detector.parameters()).device
        return device

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a photo of this size has for the detector."""
        return self.size.of(width, height)

    def predict(self, photo: Photo) -> Detections:
        """The boxes of one photo, the surest first.

        Raises:
            DataError: the file is no image that can be decoded.
            OSError: the file cannot be read.
        """
        return self.predict_all([photo])[0]

    @torch.inference_mode()
    def predict_all(self, photos: Sequence[Photo]) -> list[Detections]:
        """The boxes of several photos in one pass; padding may move the last digits.

        Raises:
            DataError, OSError: as ``predict``.
        """
        images = [opened(photo) for photo in photos]
        seen = [self.size.pixels_of(one).to(self.device) for one in images]
        found = self.detector([one_3HW.float() / 255 for one_3HW in seen])
        return [
            Detections(
                clip(
                    rescale(
                        one["boxes"].cpu().numpy(),
                        image.width / seen_3HW.shape[2],
                        image.height / seen_3HW.shape[1],
                    ),
                    image.width,
                    image.height,
                ),
                one["scores"].double().cpu().numpy(),
                one["labels"].cpu().numpy(),
            )
            for image, seen_3HW, one in zip(images, seen, found, strict=True)
        ]


def opened(photo: Photo) -> Image.Image:
    """The photo as RGB.

    Raises:
        DataError, OSError: as ``Predictor.predict``.
    """
    if isinstance(photo, Image.Image):
        return photo.convert("RGB")
    if isinstance(photo, np.ndarray):
        return Image.fromarray(photo)
    return decode_rgb(Path(photo).read_bytes(), str(photo))
