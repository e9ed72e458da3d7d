"""Random numbers that follow from a key alone, whatever was drawn before and in which process.

Every random thing of the data side is keyed: the order of an epoch by (seed, epoch), an
augmentation by (seed, epoch, index), a mixed batch by (seed, epoch, step). Begin a new kind of key
with a word of its own, so that equal numbers of two kinds do not give equal draws.
"""

import functools
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random import mtrand


def key_of(*parts: int | str) -> int:
    """A 64-bit seed that every part changes; the same on every machine and in every process."""
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Python's, numpy's and torch's (CPU) global generators start at the key, and are put back.

    Torchvision and timm draw from all three. It costs about 30 us of a CPU (2-core machine). So
    numpy's generator is exchanged and not saved: copying its state there and back takes 85 us; and
    `torch.manual_seed` is avoided: it also asks for accelerators, which takes 200 us.

    The one thing not put back is the second half of a pair that numpy's legacy `randn` keeps.
    """
    key = key_of(*parts)
    state_of_random = random.getstate()
    state_of_torch = torch.default_generator.get_state()
    numpy_generator = mtrand.get_bit_generator()
    spare = _spare_numpy_generator()
    # Inside another `seeded` the spare is taken.
    mtrand.set_bit_generator(np.random.MT19937() if numpy_generator is spare else spare)
    try:
        random.seed(key)
        # numpy takes 32 bits, and so does torch on a CPU: each gets its own half.
        np.random.seed(key & 0xFFFFFFFF)
        torch.default_generator.manual_seed(key >> 32)
        yield
    finally:
        random.setstate(state_of_random)
        mtrand.set_bit_generator(numpy_generator)
        torch.default_generator.set_state(state_of_torch)


@functools.cache
def _spare_numpy_generator() -> np.random.MT19937:
    """One per process: making it takes 140 us."""
    return np.random.MT19937()
