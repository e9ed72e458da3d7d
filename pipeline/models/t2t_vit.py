"""T2T-ViT-14: overlapping neighbourhoods become tokens by and by, then a plain ViT.

Yuan et al., ICCV 2021, with Performers (linear attention) between the splits, as published.
Parameters carry the names of the authors' checkpoints. Two are frozen: the Performers' random
directions ``w`` and the sinusoids ``pos_embed``.

To add a size: another ``T2tLayout``.

Shape letters:  B images   H, W rows and columns   D channels   N tokens   F random features
K classes
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from pipeline.errors import ConfigError
from pipeline.models.cvt import attend, mlp, to_map
from pipeline.models.grid_classifier import StagedNetwork

PUBLISHED_SCALE = 384**-0.5
"""Attention scale of the authors' published T2T-ViT-14; from scratch they use one head's width."""


@dataclass(frozen=True)
class T2tLayout:
    """Sizes; the default is T2T-ViT-14's. Three soft splits, with a Performer between each two."""

    token_dim: int = 64
    dim: int = 384
    depth: int = 14
    heads: int = 6
    mlp_ratio: float = 3.0
    kernels: Sequence[int] = (7, 3, 3)
    strides: Sequence[int] = (4, 2, 2)
    paddings: Sequence[int] = (2, 1, 1)
    dropout: float = 0.1
    """Of the Performers; the ViT has none."""

    def __post_init__(self) -> None:
        if {len(self.kernels), len(self.strides), len(self.paddings)} != {3}:
            raise ConfigError(
                f"kernels, strides and paddings of a T2T-ViT must have 3 entries each, got {self}"
            )
        if self.dim % (2 * self.heads) or self.token_dim % 2:
            raise ConfigError(
                "a T2T-ViT's dim must be a multiple of twice its heads, its token_dim even, got "
                f"dim {self.dim}, heads {self.heads}, token_dim {self.token_dim}"
            )

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for images of ``(rows, columns)`` pixels."""
        rows, columns = image_size
        for kernel, stride, padding in zip(self.kernels, self.strides, self.paddings, strict=True):
            rows = (rows + 2 * padding - kernel) // stride + 1
            columns = (columns + 2 * padding - kernel) // stride + 1
        return rows, columns


T2T_VIT_14 = T2tLayout()


def t2t_vit_14(
    num_classes: int,
    layout: T2tLayout = T2T_VIT_14,
    *,
    image_size: tuple[int, int] = (224, 224),
    drop_path: float = 0.0,
) -> "T2tVit":
    """T2T-ViT-14: 21,545,550 parameters at 1000 classes and 224 px, 79,744 of them frozen.

    Args:
        num_classes: Classes.
        layout: Sizes.
        image_size: ``(rows, columns)`` of the images, in pixels; the only size it then takes.
        drop_path: Rate of the last block, rising from 0 (the authors trained with 0.1).
    """
    return T2tVit(num_classes, layout, image_size=image_size, drop_path=drop_path)


class T2tVit(StagedNetwork):
    """Tokens-to-token, sinusoids, blocks, norm; the class token is classified.

    ``attention_scale`` is a buffer and not a constant, so that it travels with the weights:
    published ones need another than those from scratch.
    """

    attention_scale: Tensor

    def __init__(
        self,
        num_classes: int,
        layout: T2tLayout,
        *,
        image_size: tuple[int, int],
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_stages = layout.depth
        self.grid = layout.grid(image_size)
        num_tokens = 1 + self.grid[0] * self.grid[1]
        self.tokens_to_token = TokensToToken(layout)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, layout.dim))
        sinusoids_1ND = sinusoid_table(num_tokens, layout.dim).to(self.cls_token.device)
        self.pos_embed = nn.Parameter(sinusoids_1ND, requires_grad=False)
        rates = torch.linspace(0, drop_path, layout.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(T2tBlock(layout, rate) for rate in rates)
        self.norm = nn.LayerNorm(layout.dim)
        self.head = nn.Linear(layout.dim, num_classes)
        self.register_buffer("attention_scale", torch.tensor((layout.dim // layout.heads) ** -0.5))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_linears)

    def forward_stages(self, images_B3HW: Tensor, stages: Sequence[int]) -> tuple[Tensor, ...]:
        """``(B, N, D)`` normalised tokens, then the maps of blocks ``stages`` before that norm.

        Raises:
            ValueError: the images are not of the size the network was built for.
        """
        tokens_BND, grid = self.tokens_to_token(images_B3HW)
        if grid != self.grid:
            raise ValueError(
                f"images must give the {self.grid[0]} x {self.grid[1]} tokens the network was "
                f"built for, got {grid[0]} x {grid[1]}; build it with their image size"
            )
        class_B1D = self.cls_token.expand(tokens_BND.shape[0], -1, -1).to(tokens_BND.dtype)
        tokens_BND = torch.cat([class_B1D, tokens_BND], dim=1) + self.pos_embed
        after = []
        for block in self.blocks:
            tokens_BND = block(tokens_BND, self.attention_scale)
            after.append(tokens_BND)
        maps = (to_map(after[stage][:, 1:], grid) for stage in stages)
        return self.norm(tokens_BND), *maps

    def forward_head(self, features_BND: Tensor) -> Tensor:
        """``(B, K)`` logits of the class token."""
        logits_BK: Tensor = self.head(features_BND[:, 0])
        return logits_BK

    def no_weight_decay(self) -> set[str]:
        """As in the authors' recipe."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers from the input on, as patterns in timm's format."""
        del coarse
        stem = r"^tokens_to_token|^cls_token|^pos_embed"
        # 99999 is timm's mark for what belongs to the layer before it.
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


class TokensToToken(nn.Module):
    """Three soft splits with Performers between: ``(B, N, D)`` tokens, and their grid."""

    def __init__(self, layout: T2tLayout) -> None:
        super().__init__()
        width = layout.token_dim
        self.splits = tuple(zip(layout.kernels, layout.strides, layout.paddings, strict=True))
        sizes = [3 * layout.kernels[0] ** 2, *(width * side**2 for side in layout.kernels[1:])]
        self.attention1 = TokenPerformer(sizes[0], width, dropout=layout.dropout)
        self.attention2 = TokenPerformer(sizes[1], width, dropout=layout.dropout)
        self.project = nn.Linear(sizes[2], layout.dim)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The tokens and the ``(rows, columns)`` they form."""
        tokens_BND, grid = soft_split(images_B3HW, *self.splits[0])
        for performer, split in (
            (self.attention1, self.splits[1]),
            (self.attention2, self.splits[2]),
        ):
            map_BDHW = to_map(performer(tokens_BND), grid)
            tokens_BND, grid = soft_split(map_BDHW, *split)
        return self.project(tokens_BND), grid


def soft_split(
    map_BDHW: Tensor, kernel: int, stride: int, padding: int
) -> tuple[Tensor, tuple[int, int]]:
    """``(B, N, D * kernel * kernel)``: each overlapping neighbourhood as a token; and the grid."""
    height, width = map_BDHW.shape[-2:]
    rows = (height + 2 * padding - kernel) // stride + 1
    columns = (width + 2 * padding - kernel) // stride + 1
    columns_BDN = functional.unfold(map_BDHW, kernel, padding=padding, stride=stride)
    return columns_BDN.transpose(1, 2), (rows, columns)


class TokenPerformer(nn.Module):
    """Linear attention that also narrows the tokens; the values are the way around it."""

    def __init__(self, dim: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        # One matrix for keys, queries and values, in that order.
        self.kqv = nn.Linear(dim, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout)
        )
        num_features = width // 2
        directions_FD = torch.empty(num_features, width)
        nn.init.orthogonal_(directions_FD, gain=math.sqrt(num_features))
        self.w = nn.Parameter(directions_FD, requires_grad=False)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """``(B, N, width)``."""
        key_BND, query_BND, value_BND = self.kqv(self.norm1(tokens_BND)).chunk(3, dim=-1)
        mixed_BND = linear_attention(query_BND, key_BND, value_BND, self.w)
        narrow_BND = value_BND + self.dropout(self.proj(mixed_BND))
        after_BND: Tensor = narrow_BND + self.mlp(self.norm2(narrow_BND))
        return after_BND


def linear_attention(
    query_BND: Tensor, key_BND: Tensor, value_BND: Tensor, directions_FD: Tensor
) -> Tensor:
    """``(B, N, D)`` float32: values averaged by the kernel ``features(query) . features(key)``.

    Linear in N: keys and values are summed up before a query sees them. In float32 whatever the
    autocast: the features are exponentials, and half precision made runs diverge.
    """
    with _autocast_off(query_BND.device):
        query_BNF = positive_features(query_BND.float(), directions_FD.float())
        key_BNF = positive_features(key_BND.float(), directions_FD.float())
        summed_BFD = key_BNF.transpose(1, 2) @ value_BND.float()
        weight_BN1 = query_BNF @ key_BNF.sum(dim=1)[:, :, None]
        return (query_BNF @ summed_BFD) / (weight_BN1 + 1e-8)


def positive_features(tokens_BND: Tensor, directions_FD: Tensor) -> Tensor:
    """``(B, N, F)``: ``exp(w . x - |x|^2 / 2) / sqrt(F)``, whose products estimate ``exp(x . y)``.

    Choromanski et al., ICLR 2021 (Performer), Lemma 1.
    """
    half_norm_BN1 = tokens_BND.square().sum(dim=-1, keepdim=True) / 2
    return torch.exp(tokens_BND @ directions_FD.T - half_norm_BN1) / math.sqrt(len(directions_FD))


class T2tBlock(nn.Module):
    """A plain ViT block."""

    def __init__(self, layout: T2tLayout, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(layout.dim)
        self.attn = Attention(layout.dim, layout.heads)
        self.norm2 = nn.LayerNorm(layout.dim)
        self.mlp = mlp(layout.dim, layout.mlp_ratio, nn.GELU())
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, tokens_BND: Tensor, scale: Tensor) -> Tensor:
        """The tokens after the block; ``scale`` is that of the attention's products."""
        tokens_BND = tokens_BND + self.drop_path(self.attn(self.norm1(tokens_BND), scale))
        after_BND: Tensor = tokens_BND + self.drop_path(self.mlp(self.norm2(tokens_BND)))
        return after_BND


class Attention(nn.Module):
    """Softmax attention without biases on queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens_BND: Tensor, scale: Tensor) -> Tensor:
        """What attention adds to the tokens."""
        query_BND, key_BND, value_BND = self.qkv(tokens_BND).chunk(3, dim=-1)
        # On the queries: as a tensor the scale cannot be handed to the kernel without a sync.
        mixed_BND = attend(query_BND * scale, key_BND, value_BND, heads=self.heads, scale=1.0)
        added_BND: Tensor = self.proj(mixed_BND)
        return added_BND


def sinusoid_table(length: int, dim: int) -> Tensor:
    """``(1, length, dim)`` float32: sine on even and cosine on odd channels, base 10000.

    Positions count the tokens one after the other, the class token first; not rows and columns.
    """
    position_N1 = torch.arange(length, dtype=torch.float64, device="cpu")[:, None]
    even_D = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu")
    angles_ND = position_N1 / 10000 ** (even_D / dim)
    return torch.stack([angles_ND.sin(), angles_ND.cos()], dim=-1).flatten(1)[None].float()


def _autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _init_linears(module: nn.Module) -> None:
    """Truncated normal of deviation 0.02, biases 0, as the authors."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
