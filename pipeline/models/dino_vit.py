"""Keys, queries or values of one block of a plain ViT, or its class token, at any image size.

Only what a feature needs is computed: the blocks before it, that block's first norm, and one third
of its ``qkv`` matrix. The block's own attention, its MLP and all that follows are never run and not
kept in memory. Where a model normalises queries and keys per head (``q_norm``, ``k_norm``), those
norms are left out, as in LOST's hook: the feature is the output of ``attn.qkv``. The class token is
taken after the last norm: one vector per image, for what DINO trains (``pretraining/network.py``)
and what compares whole images or crops. Positions are interpolated by DINO's own formula.

The network is taken as it is (timm's ``VisionTransformer`` or one with the same attributes:
``patch_embed.proj``, ``cls_token``, ``pos_embed``, ``blocks[i].norm1``, ``blocks[i].attn.qkv``).
To add a feature of a block: add its name to ``THIRDS``, or write a class beside ``ViTFeatures``.

Shape letters:  B images   H, W patch rows and columns   N tokens   P prefix tokens (class,
distillation, registers)   D channels
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.labelling import Feature
from pipeline.errors import ConfigError
from pipeline.models.features import FeatureExtractor, PatchFeatures

THIRDS = {"query": 0, "key": 1, "value": 2}
"""Where each projection lies in a fused ``qkv`` matrix."""

# Each cached grid costs rows * columns * channels floats (7 MB for ViT-S/8 at 640 x 480), and
# batches come grid by grid, so a few are as good as many.
_MAX_CACHED_GRIDS = 8


class ViTFeatures(FeatureExtractor):
    """The ``feature`` projection of block ``block`` for every patch, prefix tokens dropped."""

    def __init__(
        self,
        vit: nn.Module,
        *,
        feature: Feature = "key",
        block: int = -1,
        mend_artefacts: bool = False,
    ) -> None:
        """Take over the parts of ``vit`` that the feature needs (shared, not copied).

        Raises:
            ConfigError: the block does not exist, or the network is not a plain ViT.
        """
        super().__init__()
        parts: Any = vit
        self._require(parts)
        self.mend_artefacts = mend_artefacts
        self.rotations: Any = getattr(parts, "rope", None)
        blocks = list(parts.blocks)
        if not -len(blocks) <= block < len(blocks):
            raise ConfigError(
                f"backbone.block must be in [{-len(blocks)}, {len(blocks) - 1}] "
                f"for a network of {len(blocks)} blocks, got {block}"
            )
        self.projection = parts.patch_embed.proj
        self.patch_size = int(self.projection.stride[0])
        self.patch_norm = getattr(parts.patch_embed, "norm", nn.Identity())
        self.norm_pre = getattr(parts, "norm_pre", nn.Identity())
        self.blocks = nn.Sequential(*blocks[: block % len(blocks)])
        self.norm1 = blocks[block].norm1
        self.feature = _third_of(blocks[block].attn, THIRDS[feature])

        prefix = _prefix_tokens(parts)
        self.num_prefix = 0 if prefix is None else int(prefix.shape[1])
        self._num_prefix_positions = _num_prefix_positions(parts)
        self.register_buffer("prefix_1PD", prefix)
        positions = parts.pos_embed
        self.register_buffer("pos_embed_1ND", None if positions is None else positions.detach())
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def forward(self, images_B3HW: Tensor) -> PatchFeatures:
        """Features of the images' patches; see the base class."""
        rows, columns = self.patch_grid(images_B3HW)
        tokens_BND = self.projection(images_B3HW).flatten(2).transpose(1, 2)
        tokens_BND = self._add_positions(self.patch_norm(tokens_BND), (rows, columns))
        tokens_BND = self._through_blocks(self.norm_pre(tokens_BND), (rows, columns))
        patches_BND = tokens_BND[:, self.num_prefix :]
        patches_BHWD = patches_BND.reshape(len(patches_BND), rows, columns, -1)
        return PatchFeatures(self.of_patches(patches_BHWD), stride=self.patch_size)

    def of_patches(self, patches_BHWD: Tensor) -> Tensor:
        """``(B, H, W, D)`` features in float32 of what enters the block."""
        if self.mend_artefacts:
            patches_BHWD = without_artefacts(patches_BHWD)
        feature_BHWD: Tensor = self.feature(self.norm1(patches_BHWD))
        return feature_BHWD.float()

    def _require(self, vit: Any) -> None:
        require_plain_vit(vit)

    def _through_blocks(self, tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """``grid`` is for networks that know positions within their blocks."""
        found_BND: Tensor = self.blocks(tokens_BND)
        return found_BND

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """``(1, N, D)`` positional embedding at ``grid`` (rows, columns); the last few are kept."""
        if grid in self._cache:
            self._cache.move_to_end(grid)
        else:
            embedding: Any = self.pos_embed_1ND
            self._cache[grid] = interpolate_positions(
                embedding, grid, num_prefix=self._num_prefix_positions
            )
            if len(self._cache) > _MAX_CACHED_GRIDS:
                self._cache.popitem(last=False)
        return self._cache[grid]

    def _add_positions(self, patches_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Prefix tokens, then patches, each with its position where it has one."""
        positions_1ND = self.positions(grid)
        split = self._num_prefix_positions
        tokens_BND = patches_BND + positions_1ND[:, split:]
        prefix: Any = self.prefix_1PD
        if prefix is None:
            return tokens_BND
        if split:
            prefix = prefix + positions_1ND[:, :split]
        return torch.cat([prefix.expand(len(tokens_BND), -1, -1), tokens_BND], dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ViTFeatures":
        # The cache is no buffer: after .to(device) it would stay behind.
        self._cache.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class RotaryViTFeatures(ViTFeatures):
    """The same of timm's DINOv3 ViTs, whose attention turns queries and keys by where they are.

    The feature is taken before it is turned, as all others are: where a patch lies is no part of
    what it shows.
    """

    def _require(self, vit: Any) -> None:
        if getattr(vit, "rope", None) is None or vit.pos_embed is not None:
            raise ConfigError(f"backbone {type(vit).__name__} has no rotary positions alone")

    def _add_positions(self, patches_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        prefix: Any = self.prefix_1PD
        return torch.cat([prefix.expand(len(patches_BND), -1, -1), patches_BND], dim=1)

    def _through_blocks(self, tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        rotation = self.rotations.get_embed(shape=grid)
        for block in self.blocks:
            tokens_BND = block(tokens_BND, rope=rotation)
        return tokens_BND


HIGH_NORM = 3.0
"""Of an artefact, by the middle norm of its image's patches; theirs are about ten times as long
(Darcet et al., "Vision Transformers Need Registers", ICLR 2024, section 2)."""


def without_artefacts(patches_BHWD: Tensor) -> Tensor:
    """Patches with those of abnormally high norm replaced by the mean of their normal neighbours.

    The eight around a patch are its neighbours. Where none of them is normal it is the mean of all
    normal patches of the image.
    """
    norm_BHW = patches_BHWD.float().norm(dim=-1)
    middle_B = norm_BHW.flatten(1).median(dim=1).values
    normal_BHW = norm_BHW <= HIGH_NORM * middle_B[:, None, None]
    if bool(normal_BHW.all()):
        return patches_BHWD
    weight_B1HW = normal_BHW[:, None].to(patches_BHWD.dtype)
    kept_BDHW = patches_BHWD.permute(0, 3, 1, 2).where(normal_BHW[:, None], 0.0)

    def around(values_BCHW: Tensor) -> Tensor:
        """Sums over windows of three by three."""
        return 9 * functional.avg_pool2d(values_BCHW, 3, stride=1, padding=1)

    count_B1HW = around(weight_B1HW)
    mean_BDHW = around(kept_BDHW) / count_B1HW.clamp(min=1)
    whole_BD11 = kept_BDHW.sum(dim=(2, 3), keepdim=True) / weight_B1HW.sum(
        dim=(2, 3), keepdim=True
    ).clamp(min=1)
    mended_BDHW = torch.where(count_B1HW > 0.5, mean_BDHW, whole_BD11)
    return torch.where(normal_BHW[..., None], patches_BHWD, mended_BDHW.permute(0, 2, 3, 1))


def interpolate_positions(
    pos_embed_1ND: Tensor, grid: tuple[int, int], *, num_prefix: int = 1
) -> Tensor:
    """``(1, P + rows * columns, D)``: a square grid of positions, bicubically brought to ``grid``.

    DINO's formula (``interpolate_pos_encoding``): the factor ``(rows + 0.1) / side`` itself, not
    the ratio of the sizes, enters the coordinates; no antialiasing. timm's resampling differs by
    some per cent, which moves boxes. The trained grid is returned untouched, as in DINO.

    Args:
        pos_embed_1ND: The trained embedding, prefix positions first.
        grid: Patch rows and columns.
        num_prefix: How many of the positions belong to prefix tokens; they are kept as they are.

    Raises:
        ValueError: the trained patch positions do not form a square.
    """
    side = math.isqrt(pos_embed_1ND.shape[1] - num_prefix)
    if side * side != pos_embed_1ND.shape[1] - num_prefix:
        raise ValueError(
            f"patch positions must form a square, got {pos_embed_1ND.shape[1] - num_prefix}"
        )
    if grid == (side, side):
        return pos_embed_1ND
    trained_1DHW = pos_embed_1ND[:, num_prefix:].transpose(1, 2).reshape(1, -1, side, side)
    factors = [(length + 0.1) / side for length in grid]
    patches_1DHW = functional.interpolate(
        trained_1DHW.float(), scale_factor=factors, mode="bicubic", align_corners=False
    )
    patches_1ND = patches_1DHW.flatten(2).transpose(1, 2).to(pos_embed_1ND.dtype)
    return torch.cat([pos_embed_1ND[:, :num_prefix], patches_1ND], dim=1)


def require_plain_vit(vit: Any) -> None:
    """Raise ConfigError unless the parts we take over are there and mean what we think."""
    reason = _why_not_plain(vit)
    if reason:
        raise ConfigError(
            f"backbone {type(vit).__name__} {reason}; supported are plain ViTs: "
            "a patch convolution, learned absolute positions on a square grid, norm and fused qkv"
        )


def _why_not_plain(vit: Any) -> str:
    """Why the network is not a plain ViT, or an empty string."""
    projection = getattr(getattr(vit, "patch_embed", None), "proj", None)
    if not isinstance(projection, nn.Conv2d) or projection.in_channels != 3:
        return "has no single patch convolution on the pixels"
    sides = {*projection.kernel_size, *projection.stride}
    if len(sides) != 1:
        return "has patches that overlap or are not square"
    positions = getattr(vit, "pos_embed", None)
    if not isinstance(positions, Tensor) or positions.ndim != 3:
        return "has no learned absolute positions"
    num_patches = positions.shape[1] - _num_prefix_positions(vit)
    if num_patches < 1 or math.isqrt(num_patches) ** 2 != num_patches:
        return "has positions that form no square grid"
    relative = ("rope", "rel_pos_bias", "shared_rel_pos")
    if any(getattr(vit, name, None) is not None for name in relative):
        return "has rotary or relative positions"
    if not all(_has_fused_qkv(block) for block in getattr(vit, "blocks", [None])):
        return "has blocks without norm1 and a fused attn.qkv"
    return ""


def _has_fused_qkv(block: Any) -> bool:
    """Whether queries, keys and values of the block come out of one Linear after ``norm1``."""
    attention = getattr(block, "attn", None)
    qkv = getattr(attention, "qkv", None)
    # BEiT and EVA add the biases outside of the Linear.
    has_biases_apart = getattr(attention, "q_bias", None) is not None
    return isinstance(qkv, nn.Linear) and hasattr(block, "norm1") and not has_biases_apart


def _prefix_tokens(vit: Any) -> Tensor | None:
    """``(1, P, D)`` class, distillation and register tokens in the order in which they are used."""
    names = ("cls_token", "dist_token", "reg_token")
    tokens = [getattr(vit, name, None) for name in names]
    present = [token.detach() for token in tokens if token is not None]
    return torch.cat(present, dim=1) if present else None


def _num_prefix_positions(vit: Any) -> int:
    """How many entries of ``pos_embed`` belong to prefix tokens (none in DeiT-III)."""
    prefix = _prefix_tokens(vit)
    if prefix is None or getattr(vit, "no_embed_class", False):
        return 0
    return int(prefix.shape[1])


def _third_of(attention: Any, index: int) -> nn.Linear:
    """The Linear that gives one of query, key and value; a copy, so that the others are freed."""
    qkv: nn.Linear = attention.qkv
    width = qkv.out_features // 3
    rows = slice(index * width, (index + 1) * width)
    bias = None if qkv.bias is None else qkv.bias.detach()[rows]
    # DINOv3 with biases has them apart.
    apart = getattr(attention, ("q_bias", "k_bias", "v_bias")[index], None)
    if apart is not None:
        bias = apart.detach()
    third = nn.Linear(qkv.in_features, width, bias=bias is not None, device="meta")
    third.weight = nn.Parameter(qkv.weight.detach()[rows].clone())
    if bias is not None:
        third.bias = nn.Parameter(bias.clone())
    return third


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
