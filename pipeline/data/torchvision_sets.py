"""CIFAR, SVHN and Flowers102 in their publishers' files, fetched and verified by torchvision.

torchvision compares every file with its published MD5 before anything is read from it (the CIFAR
files are pickles), so damaged or foreign files end here. The readers take torchvision's class as an
argument: a subclass with other checksums reads other files of the same format.

To add a set: a reader that returns `Parts`, and what classification.py says of adding one.

Shape letters:  N images   H rows   W columns   3 red, green, blue
"""

import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import scipy.io
from torchvision import datasets

from pipeline.data.labelled_images import ArrayImages, FileImages, Parts, printable
from pipeline.errors import DataError
from pipeline.storage import one_line

DIGITS: Final = tuple("0123456789")


def read_cifar(root: str, *, download: bool = False, source: Any = datasets.CIFAR10) -> Parts:
    """CIFAR from ``root/cifar-10-batches-py``, or with ``source=CIFAR100`` from its folder.

    Raises:
        DataError: the files are absent, damaged, or cannot be downloaded.
    """
    train = _open(lambda: source(root, train=True, download=download), root)
    test = _open(lambda: source(root, train=False), root)
    return Parts(
        tuple(train.classes),
        ArrayImages(train.data, np.array(train.targets, np.int64), "train"),
        test=ArrayImages(test.data, np.array(test.targets, np.int64), "test"),
    )


def read_svhn(root: str, *, download: bool = False, source: Any = datasets.SVHN) -> Parts:
    """SVHN's cropped digits from ``root/train_32x32.mat`` and ``test_32x32.mat``, without "extra".

    Raises:
        DataError: the files are absent, damaged, or cannot be downloaded.
    """

    def images(split: str) -> ArrayImages:
        opened = _open(lambda: source(root, split=split, download=download), root)
        pixels_NHW3 = opened.data.transpose(0, 2, 3, 1)
        return ArrayImages(pixels_NHW3, opened.labels.astype(np.int64), split)

    return Parts(DIGITS, images("train"), test=images("test"))


def read_flowers(root: str, *, download: bool = False, source: Any = datasets.Flowers102) -> Parts:
    """Flowers102 from ``root/flowers-102``; trained on are its lists ``trnid`` and ``valid``.

    Both together are the paper's 2,040 training images (Table 1). The publisher's validation set is
    not kept apart.

    Raises:
        DataError: the files are absent, damaged, or cannot be downloaded.
    """
    _open(lambda: source(root, download=download), root)
    folder = os.path.join(root, "flowers-102")
    lists = scipy.io.loadmat(os.path.join(folder, "setid.mat"), squeeze_me=True)
    label_of = scipy.io.loadmat(os.path.join(folder, "imagelabels.mat"), squeeze_me=True)["labels"]

    def images(*names: str) -> FileImages:
        # Numbers and labels count from 1.
        numbers = np.concatenate([lists[name] for name in names])
        paths = [f"jpg/image_{number:05d}.jpg" for number in numbers]
        return FileImages(folder, paths, label_of[numbers - 1].astype(np.int64) - 1)

    return Parts(tuple(source.classes), images("trnid", "valid"), test=images("tstid"))


def _open(make: Callable[[], Any], root: str) -> Any:
    """What ``make`` returns; torchvision's complaints become one line with the remedy."""
    try:
        return make()
    # RuntimeError is torchvision's word for absent or damaged, OSError is the network or the disk.
    except (RuntimeError, OSError) as fault:
        raise DataError(
            f"cannot read the data set in {printable(root)} ({one_line(fault)}): set "
            "data.download to have torchvision fetch it, or unpack the publisher's files there"
        ) from fault
