"""How loader processes get the images: one copy of the big arrays for all of them.

They do not start as forks, so that each would otherwise unpickle names and pixels of its own.
"""

import pickle
import shutil
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.labelled_images import LabelledImages

_WORTH_SHARING = 2**16


class Packed(NamedTuple):
    """Images for another process: torch moves a tensor it pickles into shared memory, once."""

    pickled: bytes
    buffers: list[Tensor]


def pack(images: LabelledImages) -> Packed:
    """The images with their big arrays beside them, where shared memory has room for those.

    Docker gives a container 64 MiB of it unless told otherwise, and a process that writes beyond
    ends by SIGBUS: so at most half of what is free is taken, the batches need the rest.
    """
    buffers: list[Tensor] = []
    room = _free_shared_memory() // 2

    def kept_inside(buffer: pickle.PickleBuffer) -> bool:
        nonlocal room
        view = buffer.raw()
        if view.nbytes < _WORTH_SHARING or view.nbytes > room:
            return True
        room -= view.nbytes
        shared = torch.frombuffer(view, dtype=torch.uint8).clone()
        buffers.append(shared)
        return False

    return Packed(pickle.dumps(images, protocol=5, buffer_callback=kept_inside), buffers)


def unpack(packed: Packed) -> LabelledImages:
    """The images, whose big arrays are views of the shared memory."""
    images: LabelledImages = pickle.loads(
        packed.pickled, buffers=[buffer.numpy() for buffer in packed.buffers]
    )
    return images


def _free_shared_memory() -> int:
    """Bytes; 0 where there is no such folder (not Linux), and then every process has its copy."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0
