"""What a network without labels has learnt, watched while it trains: boxes and neighbours.

Neither probe trains anything or moves a random number. Neighbours tell how well features tell
classes apart, by the protocol of Wu et al. (CVPR 2018), which DINO reports (section 4.1): cosine
similarity, the 20 nearest, each vote weighted by exp(similarity / 0.07).

To watch something else: a function of the backbone here, and a line in ``run.py``.

Shape letters:  N training images   M test images   D channels   K classes
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.boxes import Boxes
from pipeline.config import PretrainDinoJob
from pipeline.data.ground_truth import annotated_images
from pipeline.data.labelled_folders import is_archive, read_archive, read_folder
from pipeline.data.labelled_images import LabelledImages
from pipeline.data.pixels import load_pixels, pixels_of_row
from pipeline.errors import DataError
from pipeline.evaluation.corloc import best_ious, corloc
from pipeline.localization.localize import localize
from pipeline.models.dino_vit import ViTFeatures
from pipeline.models.features import NORMALIZATIONS, normalize_and_pad
from pipeline.pretraining.images import middle_square
from pipeline.pretraining.network import DINONetwork
from pipeline.storage import Location

# Similarities of so many test images to all training images are held at once.
_CHUNK = 1024


def knn_accuracy(
    train_ND: Tensor,
    targets_N: Tensor,
    test_MD: Tensor,
    truth_M: Tensor,
    *,
    num_neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """The share of test images whose neighbours vote for their class, in [0, 1].

    Args:
        train_ND: features of the training images, of any length.
        targets_N: their classes, from 0.
        test_MD: features of the test images.
        truth_M: their classes.
        num_neighbours: that vote; no more than there are training images are taken.
        temperature: of the votes' weights, above 0.

    Raises:
        ValueError: there are no images, or the shapes do not fit.
    """
    if not len(train_ND) or not len(test_MD):
        raise ValueError(f"there must be images, got {len(train_ND)} and {len(test_MD)}")
    if len(targets_N) != len(train_ND) or len(truth_M) != len(test_MD):
        raise ValueError(
            f"each image needs a label, got {len(train_ND)} and {len(targets_N)}, "
            f"{len(test_MD)} and {len(truth_M)}"
        )
    num_classes = int(torch.cat([targets_N, truth_M]).max()) + 1
    train_ND = F.normalize(train_ND.float(), dim=1)
    num_right = 0
    for start in range(0, len(test_MD), _CHUNK):
        chunk_MD = F.normalize(test_MD[start : start + _CHUNK].float(), dim=1)
        nearest = (chunk_MD @ train_ND.T).topk(min(num_neighbours, len(train_ND)), dim=1)
        votes_MK = torch.zeros(len(chunk_MD), num_classes, device=chunk_MD.device)
        votes_MK.scatter_add_(1, targets_N[nearest.indices], (nearest.values / temperature).exp())
        num_right += int((votes_MK.argmax(dim=1) == truth_M[start : start + _CHUNK]).sum())
    return num_right / len(test_MD)


# White, as training has it where an image is transparent.
_BACKGROUND = (255, 255, 255)
_BATCH = 128


@dataclass(frozen=True, eq=False)
class BoxProbe:
    """Photos and the boxes of their objects, at the size that the network is to see."""

    photos: Sequence[NDArray[np.uint8]]
    truths: Sequence[Boxes]

    @torch.inference_mode()
    def rate(self, backbone: nn.Module, device: torch.device) -> float:
        """CorLoc of SoLOST on the keys of the last block, as ``label_images.py`` labels."""
        features = ViTFeatures(backbone).to(device)
        mean, std = NORMALIZATIONS["imagenet"]
        boxes_N4 = np.zeros((len(self.photos), 4))
        for number, photo in enumerate(self.photos):
            batch = normalize_and_pad([photo], multiple=features.patch_size, mean=mean, std=std)
            found = localize(features(batch.to(device)).tokens_BHWD)
            box_4 = found.boxes_B4[0].cpu().numpy() * features.patch_size
            boxes_N4[number] = np.minimum(box_4, [photo.shape[1], photo.shape[0]] * 2)
        return corloc(best_ious(boxes_N4, self.truths))


def read_box_probe(images: str, ground_truth: str, *, max_side: int, num_images: int) -> BoxProbe:
    """The first annotated photos of a collection, their longer side at most ``max_side``.

    Raises:
        DataError: no photo of the collection is annotated, or a file cannot be read.
    """
    chosen, truths = annotated_images(images, ground_truth, num_images=num_images)
    decoded = load_pixels(
        chosen, min_side=1, max_side=max_side, max_pixels=10**9, background=_BACKGROUND
    )
    photos, boxes = [], []
    for row, truth in enumerate(truths):
        photo = pixels_of_row(decoded, row)
        if photo is None or truth.width is None:
            continue
        photos.append(photo)
        boxes.append(truth.boxes_N4 * (photo.shape[1] / truth.width))
    return BoxProbe(photos, boxes)


@dataclass(frozen=True, eq=False)
class Probes:
    """All that a job asked to be watched."""

    boxes: BoxProbe | None
    labelled: tuple[LabelledImages, LabelledImages] | None
    side: int
    """Of the squares that neighbours are looked for among, in pixels."""

    def numbers(self, teacher: DINONetwork, device: torch.device) -> dict[str, float]:
        """``probe/corloc`` and ``probe/knn``, each in [0, 1], where they were asked for."""
        found = {}
        if self.boxes is not None:
            found["probe/corloc"] = self.boxes.rate(teacher.backbone, device)
        if self.labelled is not None:
            train, test = self.labelled
            found["probe/knn"] = neighbour_accuracy(
                teacher, train, test, side=self.side, device=device
            )
        return found


def read_probes(job: PretrainDinoJob) -> Probes:
    """The probes of the job's settings.

    Raises:
        DataError: photos, boxes or class folders cannot be read, or do not belong together.
    """
    chosen, boxes, labelled = job.probe, None, None
    if chosen.images is not None and chosen.ground_truth is not None:
        boxes = read_box_probe(
            chosen.images,
            chosen.ground_truth,
            max_side=chosen.max_side,
            num_images=chosen.num_images,
        )
    if chosen.labelled is not None:
        root = str(Location.parse(chosen.labelled))
        parts = read_archive(root) if is_archive(root) else read_folder(root)
        if parts.test is None:
            raise DataError(f"--probe.labelled must hold train/ and test/, {root} has no test/")
        labelled = (parts.train, parts.test)
    return Probes(boxes, labelled, job.crops.global_size)


@torch.inference_mode()
def neighbour_accuracy(
    network: DINONetwork,
    train: LabelledImages,
    test: LabelledImages,
    *,
    side: int,
    device: torch.device,
) -> float:
    """k-NN accuracy of the class tokens, in [0, 1]; the squares in the middle of the images."""
    known, asked = (_tokens(network, images, side, device) for images in (train, test))
    return knn_accuracy(
        known, torch.from_numpy(train.targets), asked, torch.from_numpy(test.targets)
    )


def _tokens(
    network: DINONetwork, images: LabelledImages, side: int, device: torch.device
) -> Tensor:
    """``(N, D)`` on the CPU."""
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS["imagenet"])
    found = []
    for start in range(0, len(images), _BATCH):
        squares = [
            middle_square(images.image(index), side=side)
            for index in range(start, min(start + _BATCH, len(images)))
        ]
        batch_B3HW = (torch.stack(squares).float() / 255 - mean) / std
        found.append(network.features(batch_B3HW.to(device)).cpu())
    return torch.cat(found)
