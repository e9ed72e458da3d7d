"""What DINO trains: a ViT's class token through a projection head, at any image size.

Positions are interpolated by DINO's own formula, as the labeller does with the finished weights.

Shape letters:  B images   H, W pixels   N tokens   D channels   K prototypes
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.dino_head import DINOHead
from pipeline.models.dino_vit import interpolate_positions, require_plain_vit


class DINONetwork(nn.Module):
    """A backbone and its head; images of one batch have one size, which may change per batch."""

    def __init__(
        self,
        vit: nn.Module,
        *,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        """Take over a timm ``VisionTransformer`` with a class token and learned positions.

        Raises:
            ConfigError: it is another network.
        """
        super().__init__()
        require_plain_vit(vit)
        _require_class_token(vit)
        self.backbone = vit
        width: Any = vit.num_features
        self.num_prototypes = num_prototypes
        self.head = DINOHead(
            int(width),
            num_prototypes,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            norm_last_layer=norm_last_layer,
        )

    def features(self, images_B3HW: Tensor) -> Tensor:
        """``(B, D)``: the class token after the last norm."""
        vit: Any = self.backbone
        patches_BDHW: Tensor = vit.patch_embed.proj(images_B3HW)
        grid = (patches_BDHW.shape[2], patches_BDHW.shape[3])
        positions_1ND = interpolate_positions(vit.pos_embed, grid)
        tokens_BND = vit.patch_embed.norm(patches_BDHW.flatten(2).transpose(1, 2))
        class_B1D = vit.cls_token.expand(len(tokens_BND), -1, -1)
        tokens_BND = torch.cat([class_B1D, tokens_BND], dim=1) + positions_1ND
        tokens_BND = vit.norm(vit.blocks(vit.norm_pre(vit.pos_drop(tokens_BND))))
        class_BD: Tensor = tokens_BND[:, 0]
        return class_BD

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """``(B, K)`` logits over the prototypes."""
        logits_BK: Tensor = self.head(self.features(images_B3HW))
        return logits_BK


def _require_class_token(vit: Any) -> None:
    """Raise ConfigError unless a normed class token with a position is all that joins the patches.

    A weight that no output depends on would also keep several workers waiting for its gradient.
    """
    alone = vit.cls_token is not None and vit.num_prefix_tokens == 1
    if not alone or vit.no_embed_class or isinstance(vit.norm, nn.Identity):
        raise ConfigError(
            "model.name must be a ViT with a class token that has a position and is normed, and no "
            f"other token besides, got a {type(vit).__name__} of another kind; take one such as "
            "vit_small_patch16_224"
        )
