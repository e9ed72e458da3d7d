"""CvT-13: vision transformers whose queries, keys and values come out of convolutions.

Two members of one family (Wu et al., ICCV 2021): ``cvt_13`` as its authors published it, and
``cvt_13_paper``, the re-implementation that the DRLoc paper trained (keys and values share one
convolution, no biases there, no class token, no norm at the end, an average of the map is
classified). Parameters of ``cvt_13`` carry the names of the authors' own checkpoints.

To add a size: another ``CvtLayout``. To change a block: write what gives a ``CvtBlock``, as
``_official_block`` and ``_paper_block`` do, and put it into a ``CvtStyle``.

Shape letters:  B images   H, W rows and columns   D channels   N tokens, a class token first where
there is one   P prefix tokens (0 or 1)   E heads   K classes
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from pipeline.errors import ConfigError
from pipeline.models.grid_classifier import StagedNetwork

# timm's mark for what belongs to the layer before it.
_WITH_THE_LAST = (99999,)


@dataclass(frozen=True)
class CvtLayout:
    """Sizes of the stages, one entry per stage; the default is CvT-13's."""

    dims: Sequence[int] = (64, 192, 384)
    depths: Sequence[int] = (1, 2, 10)
    heads: Sequence[int] = (1, 3, 6)
    kernels: Sequence[int] = (7, 3, 3)
    strides: Sequence[int] = (4, 2, 2)
    paddings: Sequence[int] = (2, 1, 1)
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        per_stage = (self.depths, self.heads, self.kernels, self.strides, self.paddings)
        if any(len(sizes) != len(self.dims) for sizes in per_stage):
            raise ConfigError(
                f"dims, depths, heads, kernels, strides and paddings of a CvT must be equally long "
                f"(one entry per stage), got {self}"
            )
        if any(dim % heads for dim, heads in zip(self.dims, self.heads, strict=True)):
            raise ConfigError(
                f"dims of a CvT must be multiples of its heads, got {self.dims} and {self.heads}"
            )


OFFICIAL_LAYOUT = CvtLayout()
"""CvT-13's."""

PAPER_LAYOUT = CvtLayout(paddings=(3, 1, 1))
"""As the DRLoc paper trained it."""


@dataclass(frozen=True)
class CvtStyle:
    """In what the members of the family differ."""

    make_block: Callable[[int, int, float, float], "CvtBlock"]
    """From channels, heads, MLP ratio and drop path rate."""

    make_norm: Callable[[int], nn.Module]
    """From channels: the norm of the embeddings, over the last axis."""

    class_token: bool
    """Whether a normalised class token of the last stage is classified, or the map's average."""


def cvt_13(
    num_classes: int, layout: CvtLayout = OFFICIAL_LAYOUT, *, drop_path: float = 0.0
) -> "Cvt":
    """The published CvT: 19,997,480 parameters at 1000 classes.

    Args:
        num_classes: Classes.
        layout: Sizes.
        drop_path: Rate of the last block; it rises from 0 over the last stage alone (the authors
            trained with 0.1).
    """
    style = CvtStyle(_official_block, nn.LayerNorm, class_token=True)
    network = Cvt(layout, style, num_classes=num_classes, drop_path=drop_path)
    network.apply(_init_official)
    return network


def cvt_13_paper(
    num_classes: int, layout: CvtLayout = PAPER_LAYOUT, *, drop_path: float = 0.0
) -> "Cvt":
    """The CvT of the DRLoc paper's tables: 19,936,296 parameters at 1000 classes.

    Args:
        num_classes: Classes.
        layout: Sizes.
        drop_path: As for ``cvt_13``; the paper trained without.
    """
    style = CvtStyle(_paper_block, ChannelNorm, class_token=False)
    return Cvt(layout, style, num_classes=num_classes, drop_path=drop_path)


class Cvt(StagedNetwork):
    """Stages of convolutional embedding and blocks; what is classified depends on the style."""

    def __init__(
        self, layout: CvtLayout, style: CvtStyle, *, num_classes: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.num_stages = len(layout.dims)
        channels = 3
        for stage, (dim, depth) in enumerate(zip(layout.dims, layout.depths, strict=True)):
            is_last = stage == self.num_stages - 1
            rates = torch.linspace(0, drop_path if is_last else 0.0, depth, device="cpu").tolist()
            geometry = (layout.kernels[stage], layout.strides[stage], layout.paddings[stage])
            embed = ConvEmbed(channels, dim, geometry, style.make_norm(dim))
            heads, ratio = layout.heads[stage], layout.mlp_ratio
            blocks = [style.make_block(dim, heads, ratio, rate) for rate in rates]
            self.add_module(
                f"stage{stage}", Stage(embed, blocks, class_token=is_last and style.class_token)
            )
            channels = dim
        self.norm = nn.LayerNorm(channels) if style.class_token else nn.Identity()
        self.head = nn.Linear(channels, num_classes)

    def forward_stages(self, images_B3HW: Tensor, stages: Sequence[int]) -> tuple[Tensor, ...]:
        """``(B, D)`` what is classified, then the maps of ``stages``; see the base class."""
        map_BDHW, maps = images_B3HW, []
        prefix_BPD = None
        for stage in self._stages():
            map_BDHW, prefix_BPD = stage(map_BDHW)
            maps.append(map_BDHW)
        pooled_BD = map_BDHW.mean(dim=(2, 3)) if prefix_BPD is None else prefix_BPD[:, 0]
        return self.norm(pooled_BD), *(maps[stage] for stage in stages)

    def forward_head(self, features_BD: Tensor) -> Tensor:
        """``(B, K)`` logits of what ``forward_stages`` gave first."""
        logits_BK: Tensor = self.head(features_BD)
        return logits_BK

    def no_weight_decay(self) -> set[str]:
        """The class token, as in the authors' recipe (which also spares norms and biases)."""
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers from the input on, as patterns in timm's format."""
        if coarse:
            return {"blocks": [(r"^stage(\d+)", None), (r"^norm", _WITH_THE_LAST)]}
        embed = r"^stage(\d+)\.(?:patch_embed|cls_token)"
        block = r"^stage(\d+)\.blocks\.(\d+)"
        return {"blocks": [(embed, (-1,)), (block, None), (r"^norm", _WITH_THE_LAST)]}

    def _stages(self) -> list["Stage"]:
        children = (self.get_submodule(f"stage{index}") for index in range(self.num_stages))
        return [child for child in children if isinstance(child, Stage)]


class Stage(nn.Module):
    """Embed the map at a coarser grid, then blocks over its tokens; ``(map, prefix tokens)``."""

    def __init__(
        self, patch_embed: "ConvEmbed", blocks: Sequence["CvtBlock"], *, class_token: bool
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        token_11D = torch.empty(1, 1, patch_embed.proj.out_channels)
        self.cls_token = (
            nn.Parameter(nn.init.trunc_normal_(token_11D, std=0.02)) if class_token else None
        )
        self.blocks = nn.ModuleList(blocks)

    def forward(self, map_BDHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(B, D, H, W)`` the stage's map, and its class token ``(B, 1, D)`` or None."""
        map_BHWD = self.patch_embed(map_BDHW)
        grid = (int(map_BHWD.shape[1]), int(map_BHWD.shape[2]))
        tokens_BND = map_BHWD.flatten(1, 2)
        if self.cls_token is not None:
            prefix_B1D = self.cls_token.expand(tokens_BND.shape[0], -1, -1).to(tokens_BND.dtype)
            tokens_BND = torch.cat([prefix_B1D, tokens_BND], dim=1)
        for block in self.blocks:
            tokens_BND = block(tokens_BND, grid)
        prefix_BPD, patches_BND = split_prefix(tokens_BND, grid)
        has_prefix = self.cls_token is not None
        return to_map(patches_BND, grid), prefix_BPD if has_prefix else None


class ConvEmbed(nn.Module):
    """A strided convolution and a norm over its channels: ``(B, H, W, D)``, channels last."""

    def __init__(
        self, channels: int, dim: int, geometry: tuple[int, int, int], norm: nn.Module
    ) -> None:
        super().__init__()
        kernel, stride, padding = geometry
        self.proj = nn.Conv2d(channels, dim, kernel, stride, padding)
        self.norm = norm

    def forward(self, map_BDHW: Tensor) -> Tensor:
        """The coarser map."""
        map_BHWD: Tensor = self.norm(self.proj(map_BDHW).permute(0, 2, 3, 1))
        return map_BHWD


class ChannelNorm(nn.Module):
    """``gain * (x - mean) / (deviation + eps) + bias`` over the last axis.

    Not LayerNorm: eps is added to the deviation, not to the variance, as in the paper's CvT.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """The normalised tokens, in their own type; the statistics are float32."""
        values = tokens.float()
        # Not var_mean: over a short last axis it is ten times slower on a CPU.
        centred = values - values.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        # The root's gradient is infinite at 0: a constant token must not turn the run into NaN.
        deviation = variance.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return (centred / (deviation + self.eps) * self.weight + self.bias).to(tokens.dtype)


class CvtBlock(nn.Module):
    """Attention and MLP, each after a norm and with a way around it."""

    def __init__(
        self,
        norms: tuple[nn.Module, nn.Module],
        attention: nn.Module,
        mlp: nn.Module,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn = attention
        self.mlp = mlp
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tokens after the block; ``grid`` is rows and columns of the patches among them."""
        tokens_BND = tokens_BND + self.drop_path(self.attn(self.norm1(tokens_BND), grid))
        after_BND: Tensor = tokens_BND + self.drop_path(self.mlp(self.norm2(tokens_BND)))
        return after_BND


class ConvProjection(nn.Module):
    """Depthwise 3 x 3 convolution and BatchNorm over the patches; prefix tokens pass by."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tokens, their patches on the convolution's grid."""
        prefix_BPD, patches_BND = split_prefix(tokens_BND, grid)
        # Contiguous, or gradients of the convolution come in another layout than its weights, and
        # DistributedDataParallel copies (and warns). It costs nothing measurable.
        map_BDHW = self.bn(self.conv(to_map(patches_BND, grid).contiguous()))
        return torch.cat([prefix_BPD, map_BDHW.flatten(2).transpose(1, 2)], dim=1)


class OfficialAttention(nn.Module):
    """Queries, keys and values each by their own convolution; the scale is ``dim ** -0.5``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.conv_proj_q = ConvProjection(dim, stride=1)
        self.conv_proj_k = ConvProjection(dim, stride=2)
        self.conv_proj_v = ConvProjection(dim, stride=2)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim)
        self.proj_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """What attention adds to the tokens."""
        query_BND = self.proj_q(self.conv_proj_q(tokens_BND, grid))
        key_BND = self.proj_k(self.conv_proj_k(tokens_BND, grid))
        value_BND = self.proj_v(self.conv_proj_v(tokens_BND, grid))
        added_BND: Tensor = self.proj(
            attend(query_BND, key_BND, value_BND, heads=self.heads, scale=self.scale)
        )
        return added_BND


class PaperAttention(nn.Module):
    """Keys and values share a convolution, no biases; the scale is one head's ``dim ** -0.5``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.conv_proj_q = ConvProjection(dim, stride=1)
        self.conv_proj_kv = ConvProjection(dim, stride=2)
        self.proj_q = nn.Linear(dim, dim, bias=False)
        self.proj_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """What attention adds to the tokens."""
        query_BND = self.proj_q(self.conv_proj_q(tokens_BND, grid))
        key_BND, value_BND = self.proj_kv(self.conv_proj_kv(tokens_BND, grid)).chunk(2, dim=-1)
        added_BND: Tensor = self.proj(
            attend(query_BND, key_BND, value_BND, heads=self.heads, scale=self.scale)
        )
        return added_BND


class QuickGelu(nn.Module):
    """``x * sigmoid(1.702 x)``."""

    def forward(self, values: Tensor) -> Tensor:
        """The activation of each value."""
        return values * torch.sigmoid(1.702 * values)


def attend(
    query_BND: Tensor, key_BND: Tensor, value_BND: Tensor, *, heads: int, scale: float
) -> Tensor:
    """``(B, N, D)``: softmax attention in ``heads`` equal parts of the channels, joined again."""
    query_BEND, key_BEND, value_BEND = (
        tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)
        for tokens in (query_BND, key_BND, value_BND)
    )
    mixed_BEND = functional.scaled_dot_product_attention(
        query_BEND, key_BEND, value_BEND, scale=scale
    )
    return mixed_BEND.transpose(1, 2).flatten(2)


def split_prefix(tokens_BND: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Prefix tokens ``(B, P, D)``, P perhaps 0, and the patches of ``grid`` behind them."""
    num_prefix = tokens_BND.shape[1] - grid[0] * grid[1]
    return tokens_BND[:, :num_prefix], tokens_BND[:, num_prefix:]


def to_map(patches_BND: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(B, D, H, W)`` of patches in raster order."""
    return patches_BND.transpose(1, 2).reshape(-1, patches_BND.shape[2], *grid)


def _official_block(dim: int, heads: int, mlp_ratio: float, drop_path: float) -> CvtBlock:
    norms = (nn.LayerNorm(dim), nn.LayerNorm(dim))
    return CvtBlock(
        norms, OfficialAttention(dim, heads), mlp(dim, mlp_ratio, QuickGelu()), drop_path
    )


def _paper_block(dim: int, heads: int, mlp_ratio: float, drop_path: float) -> CvtBlock:
    norms = (ChannelNorm(dim), ChannelNorm(dim))
    return CvtBlock(norms, PaperAttention(dim, heads), mlp(dim, mlp_ratio, nn.GELU()), drop_path)


def mlp(dim: int, ratio: float, activation: nn.Module) -> nn.Sequential:
    """Two Linears, named ``fc1`` and ``fc2`` as in published checkpoints."""
    hidden = int(dim * ratio)
    layers: list[tuple[str, nn.Module]] = [
        ("fc1", nn.Linear(dim, hidden)),
        ("act", activation),
        ("fc2", nn.Linear(hidden, dim)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _init_official(module: nn.Module) -> None:
    """Linears by a truncated normal of deviation 0.02, biases 0; convolutions stay torch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
