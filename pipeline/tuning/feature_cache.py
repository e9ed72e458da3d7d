"""Patch features of a sample of images, on a local disk: computed once, read by every trial.

    FOLDER/images.safetensors     sizes and annotated boxes
    FOLDER/key-11/00000.safetensors ...   features of a block of images, one tensor per batch
    FOLDER/index.json             what they are of; written last: a cache that has it is whole

``ManyFeatures`` takes several features of several blocks of a ViT from one forward pass. Each is
computed by the very modules of its own ``ViTFeatures``, from the tokens that enter its block; so it
is the feature of a pass of its own, bit for bit.

Shape letters:  N images   B images of a batch   H, W patch rows and columns   D channels
                T annotated objects
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from pipeline.boxes import Boxes, as_boxes
from pipeline.config.labelling import Feature
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.models.backbones import build_backbone
from pipeline.models.checkpoints import Weights
from pipeline.models.dino_vit import ViTFeatures
from pipeline.models.features import FeatureExtractor
from pipeline.storage import Location

Source = tuple[str, int]
"""A feature and its block; negative blocks count from the last."""


class ManyFeatures:
    """All features asked for, of each batch of normalised images."""

    def __init__(self, name: str, weights: Weights, sources: Sequence[Source]) -> None:
        """Build the network once for each source, and keep what is needed of it.

        Raises:
            ConfigError: a feature or block does not exist; the network is no ViT and several were
                asked for.
            WeightsError: the weights do not fit.
        """
        self._extractors: dict[Source, FeatureExtractor] = {
            (feature, block): build_backbone(
                name, weights, feature=cast(Feature, feature), block=block
            )
            for feature, block in sources
        }
        self._deepest = max(self._extractors.values(), key=_depth)
        if len(sources) > 1 and not isinstance(self._deepest, ViTFeatures):
            raise ConfigError(f"{name} has one feature; the space must not turn backbone.feature")
        self._depths = {source: _depth(one) for source, one in self._extractors.items()}
        for extractor in self._extractors.values():
            # Its blocks are those of the deepest, with the same weights.
            if isinstance(extractor, ViTFeatures) and extractor is not self._deepest:
                del extractor.blocks

    @property
    def backbone(self) -> FeatureExtractor:
        """The network whose forward pass gives all of them."""
        return self._deepest

    @torch.inference_mode()
    def __call__(self, images_B3HW: Tensor) -> Mapping[Source, Tensor]:
        """``(B, H, W, D)`` of each source."""
        deepest = self._deepest
        if not isinstance(deepest, ViTFeatures):
            (source,) = self._extractors
            return {source: deepest(images_B3HW).tokens_BHWD}
        entering: dict[int, Tensor] = {}
        hooks: list[Any] = [
            block.register_forward_pre_hook(
                lambda module, inputs, index=index: entering.__setitem__(index, inputs[0])
            )
            for index, block in enumerate(deepest.blocks)
        ]
        hooks.append(
            deepest.norm1.register_forward_pre_hook(
                lambda module, inputs: entering.__setitem__(-1, inputs[0])
            )
        )
        try:
            last_BHWD = deepest(images_B3HW).tokens_BHWD
        finally:
            for hook in hooks:
                hook.remove()
        found: dict[Source, Tensor] = {}
        for source, one in self._extractors.items():
            assert isinstance(one, ViTFeatures)
            if one is deepest:
                found[source] = last_BHWD
            elif self._depths[source] == len(deepest.blocks):
                # What enters the norm has lost its prefix tokens and artefacts already.
                found[source] = one.feature(one.norm1(entering[-1])).float()
            else:
                patches_BND = entering[self._depths[source]][:, one.num_prefix :]
                grid = (*last_BHWD.shape[:3], -1)
                found[source] = one.of_patches(patches_BND.reshape(grid))
        return found


def _depth(extractor: FeatureExtractor) -> int:
    """Blocks before the one whose feature it is; 0 where there are none."""
    return len(extractor.blocks) if isinstance(extractor, ViTFeatures) else 0


Floats = NDArray[np.float64]

BYTES = {"fp16": 2, "fp32": 4}
_KINDS = {"fp16": torch.float16, "fp32": torch.float32}
_INDEX = "index.json"
# Room that must stay free on the disk besides.
_SPARE = 256 * 2**20


@dataclass(frozen=True, eq=False)
class Sample:
    """The images of a cache and what is annotated on them.

    Attributes:
        seen_N2: width and height of the pixels the network saw; 0 where there were none.
        sizes_N2: of the original images; 0 likewise.
        objects: each image's annotated boxes, in original pixels.
        num_missing: annotated images that the collection does not have: they count as misses.
        stride: pixels per patch.
    """

    seen_N2: Floats
    sizes_N2: Floats
    objects: Sequence[Boxes]
    num_missing: int
    stride: int


@dataclass(frozen=True)
class FeatureBatch:
    """Images whose features share a grid: their rows of the sample, and where the tensor lies."""

    rows: list[int]
    shard: str
    name: str


class FeatureCache:
    """A folder of features; ``key`` tells one content from another."""

    def __init__(self, folder: Location) -> None:
        if not folder.is_local:
            raise ConfigError(f"--cache must be a folder on a disk, got {folder}")
        self.folder = folder

    def holds(self, key: Mapping[str, Any], sources: Sequence[Source]) -> bool:
        """Whether it is whole, of that content, and has those features."""
        index = self._index()
        if index is None or index["key"] != dict(key):
            return False
        return {tuple(one) for one in index["sources"]} >= set(sources)

    def require_room(self, num_bytes: int) -> None:
        """Raise StorageError where the disk has no room for so much."""
        place = self.folder
        while place.kind() == "missing":
            place = Location(place.filesystem, place.path.rpartition("/")[0] or "/")
        free = shutil.disk_usage(place.path).free
        if num_bytes + _SPARE > free:
            raise StorageError(
                f"the features take {gib(num_bytes)}, and {place} has {gib(free)} free: take fewer "
                "--num-images, fewer features or blocks in the space, --cache-precision fp16, or "
                "--cache on another disk"
            )

    def write_shard(
        self, number: int, source: Source, batches: Mapping[str, Tensor], precision: str
    ) -> None:
        """Keep the features of a block of images, by the name of their batch."""
        tensors = {name: one.to(_KINDS[precision]).contiguous() for name, one in batches.items()}
        place = self.folder.child(folder_of(source)).child(f"{number:05d}.safetensors")
        place.write_bytes(save(tensors))

    def finish(
        self,
        key: Mapping[str, Any],
        sources: Sequence[Source],
        sample: Sample,
        batches: Sequence[FeatureBatch],
    ) -> None:
        """Write what the features are of: from now on the cache is whole."""
        save_file(_as_tensors(sample), self.folder.child("images.safetensors").path)
        index = {
            "key": dict(key),
            "sources": [list(one) for one in sources],
            "batches": [[one.rows, one.shard, one.name] for one in batches],
            "num_missing": sample.num_missing,
            "stride": sample.stride,
        }
        self.folder.child(_INDEX).write_bytes(json.dumps(index).encode())

    def sample(self) -> Sample:
        """The images.

        Raises:
            DataError: the cache is not whole.
        """
        index = self._whole()
        return _sample_of(load_file(self.folder.child("images.safetensors").path), index)

    def features(self, source: Source) -> Iterator[tuple[list[int], Tensor]]:
        """Rows of the sample and their ``(B, H, W, D)`` features, batch by batch, in fp32.

        Raises:
            DataError: the cache is not whole, or holds no such feature.
        """
        index = self._whole()
        if list(source) not in index["sources"]:
            raise DataError(f"{self.folder} holds no {source[0]} of block {source[1]}")
        by_shard: dict[str, list[FeatureBatch]] = {}
        for rows, shard, name in index["batches"]:
            by_shard.setdefault(shard, []).append(FeatureBatch(rows, shard, name))
        for shard, batches in by_shard.items():
            path = self.folder.child(folder_of(source)).child(f"{shard}.safetensors").path
            with safe_open(path, framework="pt") as file:
                for batch in batches:
                    yield batch.rows, file.get_tensor(batch.name).float()

    def delete(self) -> None:
        """Remove it; the index first, so that half a cache is never taken for a whole one."""
        self.folder.child(_INDEX).delete()
        self.folder.delete()

    def _index(self) -> dict[str, Any] | None:
        file = self.folder.child(_INDEX)
        if file.kind() != "file":
            return None
        try:
            index = json.loads(file.read_bytes())
        except ValueError:
            return None
        return index if isinstance(index, dict) and "key" in index else None

    def _whole(self) -> dict[str, Any]:
        index = self._index()
        if index is None:
            raise DataError(f"{self.folder} is no whole cache of features")
        return index


def folder_of(source: Source) -> str:
    """Where a feature's shards lie."""
    return f"{source[0]}-{source[1]}"


def gib(num_bytes: float) -> str:
    """``1.2 GiB``."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _as_tensors(sample: Sample) -> dict[str, Tensor]:
    counts = [len(one) for one in sample.objects]
    return {
        "seen_N2": torch.from_numpy(sample.seen_N2),
        "sizes_N2": torch.from_numpy(sample.sizes_N2),
        "num_objects_N": torch.tensor(counts, dtype=torch.int64),
        "objects_T4": torch.from_numpy(
            as_boxes(np.concatenate([np.zeros((0, 4)), *sample.objects]))
        ),
    }


def _sample_of(tensors: Mapping[str, Tensor], index: Mapping[str, Any]) -> Sample:
    ends_N = np.cumsum(tensors["num_objects_N"].numpy())
    return Sample(
        seen_N2=tensors["seen_N2"].numpy(),
        sizes_N2=tensors["sizes_N2"].numpy(),
        objects=[as_boxes(one) for one in np.split(tensors["objects_T4"].numpy(), ends_N[:-1])],
        num_missing=int(index["num_missing"]),
        stride=int(index["stride"]),
    )
