"""How well features tell classes apart, without training: weighted nearest neighbours.

The protocol of Wu et al. (CVPR 2018), which DINO reports (section 4.1): cosine similarity, the 20
nearest, each vote weighted by exp(similarity / 0.07).

Shape letters:  N training images   M test images   D channels   K classes
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Similarities of so many test images to all training images are held at once.
_CHUNK = 1024


def knn_accuracy(
    train_ND: Tensor,
    labels_N: Tensor,
    test_MD: Tensor,
    truth_M: Tensor,
    *,
    num_neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """The share of test images whose neighbours vote for their class, in [0, 1].

    Args:
        train_ND: features of the training images, of any length.
        labels_N: their classes, from 0.
        test_MD: features of the test images.
        truth_M: their classes.
        num_neighbours: that vote; no more than there are training images are taken.
        temperature: of the votes' weights, above 0.

    Raises:
        ValueError: there are no images, or the shapes do not fit.
    """
    if not len(train_ND) or not len(test_MD):
        raise ValueError(f"there must be images, got {len(train_ND)} and {len(test_MD)}")
    if len(labels_N) != len(train_ND) or len(truth_M) != len(test_MD):
        raise ValueError(
            f"each image needs a label, got {len(train_ND)} and {len(labels_N)}, "
            f"{len(test_MD)} and {len(truth_M)}"
        )
    num_classes = int(torch.cat([labels_N, truth_M]).max()) + 1
    train_ND = F.normalize(train_ND.float(), dim=1)
    num_right = 0
    for start in range(0, len(test_MD), _CHUNK):
        chunk_MD = F.normalize(test_MD[start : start + _CHUNK].float(), dim=1)
        nearest = (chunk_MD @ train_ND.T).topk(min(num_neighbours, len(train_ND)), dim=1)
        votes_MK = torch.zeros(len(chunk_MD), num_classes, device=chunk_MD.device)
        votes_MK.scatter_add_(1, labels_N[nearest.indices], (nearest.values / temperature).exp())
        num_right += int((votes_MK.argmax(dim=1) == truth_M[start : start + _CHUNK]).sum())
    return num_right / len(test_MD)
