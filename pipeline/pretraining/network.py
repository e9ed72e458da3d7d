"""What DINO trains: a ViT's class token through a projection head, at any image size.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, section 3.1.
Student and teacher have one each; the loss is in ``losses/dino.py``. The head projects to
prototypes and is thrown away after training. Positions are interpolated by DINO's own formula, as
the labeller does with the finished weights.

To add a head: a module that maps ``(..., D)`` to ``(..., K)`` and calls the part whose gradients
are dropped during the first epoch ``last_layer``.

Shape letters:  B images   H, W pixels   N tokens   D channels   K prototypes
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from pipeline.config.pretraining import DINOConfig
from pipeline.models.dino_vit import class_token, require_class_token, require_plain_vit


class DINOHead(nn.Module):
    """An MLP to a bottleneck of unit length, then its cosines with K prototypes.

    No batch norm, so an image gets the same output alone and in any batch. Like every parametrised
    module it can be copied and its ``state_dict`` saved, but the module itself does not pickle.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        num_layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        """Draw the weights: the MLP's from a normal of 0.02 cut at 2, its biases 0.

        The prototypes' directions are drawn as ``nn.Linear`` does, as in the released code: their
        unseen lengths decide how far an update turns them.

        Args:
            in_dim: channels of the features.
            out_dim: K, the number of prototypes; 65,536 in the paper.
            num_layers: linear layers of the MLP, at least 1, with a GELU between each two.
            hidden_dim: width between them.
            bottleneck_dim: width of what is normalised.
            norm_last_layer: keep every prototype at length 1, so that outputs are cosines;
                otherwise the lengths start at 1 and are trained.

        Raises:
            ValueError: a number is below 1.
        """
        super().__init__()
        if min(in_dim, out_dim, num_layers, hidden_dim, bottleneck_dim) < 1:
            raise ValueError(
                "in_dim, out_dim, num_layers, hidden_dim and bottleneck_dim must be at least 1, "
                f"got {in_dim}, {out_dim}, {num_layers}, {hidden_dim} and {bottleneck_dim}"
            )
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [_linear(fan_in, fan_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = parametrizations.weight_norm(
            nn.Linear(bottleneck_dim, out_dim, bias=False), dim=0
        )
        length_K1 = self.last_layer.get_parameter("parametrizations.weight.original0")
        nn.init.ones_(length_K1)
        length_K1.requires_grad_(not norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """``(..., K)`` outputs of ``(..., D)`` features; in [-1, 1] with ``norm_last_layer``."""
        bottleneck = self.mlp(features)
        # In float32 even under autocast: what guards against a length of 0 is 0 in float16.
        wide = torch.promote_types(bottleneck.dtype, torch.float32)
        unit = functional.normalize(bottleneck.to(wide), dim=-1).to(bottleneck.dtype)
        prototypes: Tensor = self.last_layer(unit)
        return prototypes


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


class DINONetwork(nn.Module):
    """A backbone and its head; images of one batch have one size, which may change per batch."""

    def __init__(self, vit: nn.Module, config: DINOConfig) -> None:
        """Take over a timm ``VisionTransformer`` with a class token and learned positions.

        Raises:
            ConfigError: it is another network.
        """
        super().__init__()
        require_plain_vit(vit)
        require_class_token(vit)
        self.backbone = vit
        width: Any = vit.num_features
        self.num_prototypes = config.out_dim
        self.head = DINOHead(
            int(width),
            config.out_dim,
            hidden_dim=config.hidden_dim,
            bottleneck_dim=config.bottleneck_dim,
            norm_last_layer=config.norm_last_layer,
        )

    def features(self, images_B3HW: Tensor) -> Tensor:
        """``(B, D)``: the class token after the last norm."""
        return class_token(self.backbone, images_B3HW)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """``(B, K)`` logits over the prototypes."""
        logits_BK: Tensor = self.head(self.features(images_B3HW))
        return logits_BK
