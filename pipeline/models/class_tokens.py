"""The class token of a plain ViT after its last norm, at any image size: one vector per image.

Positions are interpolated by DINO's own formula, as for patch features. What DINO trains
(``pretraining/network.py``) and what compares whole images or crops use the same function.

Shape letters:  B images   H, W pixels   N tokens   D channels
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.dino_vit import interpolate_positions, require_plain_vit


def class_token(vit: Any, images_B3HW: Tensor) -> Tensor:
    """``(B, D)`` of normalised images; pixels beyond the last whole patch are not seen.

    Args:
        vit: A network that ``require_class_token`` let pass.
        images_B3HW: Of one size, at least a patch on each side.
    """
    patches_BDHW: Tensor = vit.patch_embed.proj(images_B3HW)
    grid = (patches_BDHW.shape[2], patches_BDHW.shape[3])
    positions_1ND = interpolate_positions(vit.pos_embed, grid)
    tokens_BND = vit.patch_embed.norm(patches_BDHW.flatten(2).transpose(1, 2))
    class_B1D = vit.cls_token.expand(len(tokens_BND), -1, -1)
    tokens_BND = torch.cat([class_B1D, tokens_BND], dim=1) + positions_1ND
    tokens_BND = vit.norm(vit.blocks(vit.norm_pre(vit.pos_drop(tokens_BND))))
    class_BD: Tensor = tokens_BND[:, 0]
    return class_BD


class ClassTokens(nn.Module):
    """A frozen ViT that gives class tokens; images of one batch have one size."""

    def __init__(self, vit: nn.Module) -> None:
        """Take over a timm ``VisionTransformer`` with a class token and learned positions.

        Raises:
            ConfigError: it is another network.
        """
        super().__init__()
        require_plain_vit(vit)
        require_class_token(vit, "backbone.name")
        network: Any = vit
        self.vit = vit
        self.patch_size = int(network.patch_embed.proj.stride[0])
        self.num_features = int(network.num_features)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """``(B, D)`` float32 of normalised images; see ``class_token``."""
        return class_token(self.vit, images_B3HW).float()


def require_class_token(vit: Any, flag: str = "model.name") -> None:
    """Raise ConfigError unless a normed class token with a position is all that joins the patches.

    In training, a weight that no output depends on would also keep several workers waiting for its
    gradient. ``flag`` is what the network was chosen by.
    """
    alone = vit.cls_token is not None and vit.num_prefix_tokens == 1
    if not alone or vit.no_embed_class or isinstance(vit.norm, nn.Identity):
        raise ConfigError(
            f"{flag} must be a ViT with a class token that has a position and is normed, and no "
            f"other token besides, got a {type(vit).__name__} of another kind; take one such as "
            "vit_small_patch16_224"
        )
