"""Several features of several blocks of a ViT, from one forward pass.

Each feature is computed by the very modules of its own ``ViTFeatures``, from the tokens that enter
its block; so it is the feature of a pass of its own, bit for bit.

Shape letters:  B images   H, W patch rows and columns   N tokens   D channels
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.backbones import Weights, build_backbone
from pipeline.models.dino_vit import ViTFeatures
from pipeline.models.features import FeatureExtractor

FeatureName = Literal["key", "query", "value"]
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
                name, weights, feature=cast(FeatureName, feature), block=block
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
                # What enters the norm has lost its prefix tokens already.
                found[source] = one.feature(one.norm1(entering[-1])).float()
            else:
                patches_BND = entering[self._depths[source]][:, one.num_prefix :]
                found[source] = one.feature(one.norm1(patches_BND)).float()
        return {source: one.reshape(*last_BHWD.shape[:3], -1) for source, one in found.items()}


def _depth(extractor: FeatureExtractor) -> int:
    """Blocks before the one whose feature it is; 0 where there are none."""
    return len(extractor.blocks) if isinstance(extractor, ViTFeatures) else 0
