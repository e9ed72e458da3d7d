"""What DINO trains: a ViT's class token through a projection head, at any image size.

Positions are interpolated by DINO's own formula, as the labeller does with the finished weights.

Shape letters:  B images   H, W pixels   N tokens   D channels   K prototypes
"""

from typing import Any

from torch import Tensor, nn

from pipeline.models.class_tokens import class_token, require_class_token
from pipeline.models.dino_head import DINOHead
from pipeline.models.dino_vit import require_plain_vit


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
        require_class_token(vit)
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
        return class_token(self.backbone, images_B3HW)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """``(B, K)`` logits over the prototypes."""
        logits_BK: Tensor = self.head(self.features(images_B3HW))
        return logits_BK
