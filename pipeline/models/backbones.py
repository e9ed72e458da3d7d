"""A network from its name: the architecture from timm, the weights from the hub or from a file.

``build_backbone`` gives frozen patch features, ``build_class_tokens`` a frozen vector per image,
``build_model`` a classifier to be trained, ``build_feature_maps`` what a pyramid stands on.

To add a backbone: a plain timm ViT needs nothing; other names and weights:
``published_weights.py``. A convolutional network gets a name in ``CNNS`` there and a case in
``_cnn``. To add a classifier: timm's need nothing; a network of our own gets a name in
``OWN_CLASSIFIERS`` (``model_options.py``). This file and ``published_weights.py`` alone import
timm.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

import timm
import torch
from timm.layers import Attention, PatchEmbed, RotaryEmbeddingDinoV3
from timm.models import group_parameters, vision_transformer
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn

from pipeline.config.labelling import BackboneConfig, Feature, ResolvedBackbone
from pipeline.errors import ConfigError
from pipeline.models.checkpoints import (
    Weights,
    file_sha256,
    fit_state_dict,
    patch_side,
    read_state_dict,
)
from pipeline.models.classifier_weights import fit_classifier, timm_weights
from pipeline.models.dino_vit import ClassTokens, RotaryViTFeatures, ViTFeatures
from pipeline.models.exported_backbone import name_beside, network_of_checkpoint
from pipeline.models.feature_maps import (
    STRIDES,
    ConvFeatures,
    FeatureMaps,
    Vgg16Map,
    layouts,
    under_names,
)
from pipeline.models.features import FeatureExtractor
from pipeline.models.grid_classifier import GridClassifier
from pipeline.models.model_options import (
    OWN_CLASSIFIERS,
    STANDARD_SIDE,
    ModelOptions,
    build_own,
    check_ranges,
    cut_stem,
    fetch_own,
    image_size,
    timm_arguments,
)
from pipeline.models.published_weights import (
    CNNS,
    SUITED,
    architecture,
    fetch,
    published_normalization,
    require_backbone,
    require_classifier,
    require_timm,
)

_ANOTHER = "take another backbone, such as timm/convnext_tiny"


def load_weights(name: str, checkpoint: str | None) -> Weights:
    """The weights of backbone ``name``, from a local file or else from where they are published.

    Downloads are kept in the caches of huggingface_hub (``HF_HOME``) and torch (``TORCH_HOME``);
    what is there is used without asking the network.

    Args:
        name: A timm ViT with or without tag, one of ``CNNS``, or vit_small_patch8_224.dino_300ep.
        checkpoint: A ``.safetensors`` or ``.pth`` file; None fetches by name.

    Raises:
        ConfigError: the name is unknown, or the network cannot be a backbone here.
        WeightsError: the file cannot be read, or the weights cannot be fetched.
    """
    _require_supported(name)
    path = Path(checkpoint).expanduser() if checkpoint else fetch(name)
    return Weights(read_state_dict(path), file_sha256(path), source=str(path))


def with_recipe(backbone: BackboneConfig) -> ResolvedBackbone:
    """The network that the weights are of, with what suits it where the user left it open.

    Networks trained by DINO give the keys of their last block, as LOST takes them; those trained
    otherwise the values of a middle one, because their keys box the whole image (docs/log.md).

    Raises:
        ConfigError: the name is unknown, or another than the file of weights says.
        WeightsError: the file beside the weights speaks of others.
    """
    if isinstance(backbone, ResolvedBackbone):
        return backbone
    default = type(backbone).model_fields["name"].default
    name = network_of_checkpoint(backbone.name, backbone.checkpoint, default=default)
    # Files with a description of ours beside them are of jobs/pretrain_dino.py.
    described = backbone.checkpoint is not None and name_beside(Path(backbone.checkpoint))
    feature, block = SUITED.get(name, ("key", -1))
    if name not in CNNS and "dino" not in name and not described:
        vit: Any = _require_supported(name)
        feature, block = "value", len(vit.blocks) // 2 - 1
    told = backbone.model_dump(exclude_none=True)
    suits = {"feature": feature, "block": block, "normalize": published_normalization(name)}
    known = {key: value for key, value in suits.items() if value is not None}
    return ResolvedBackbone(**{**known, **told, "name": name})


def build_backbone(
    name: str,
    weights: Weights | None,
    *,
    feature: Feature = "key",
    block: int = -1,
) -> FeatureExtractor:
    """Backbone ``name`` in evaluation mode, frozen, on the CPU.

    Args:
        name: As for ``load_weights``.
        weights: What ``load_weights`` gave; None leaves the random initialisation.
        feature: Which projection of a ViT's block is the patch feature.
        block: Which block of a ViT, from 0; negative counts from the last.

    Raises:
        ConfigError: the name, the feature or the block does not exist for this network.
        WeightsError: the weights do not fit the architecture.
    """
    extractor: FeatureExtractor
    if name in CNNS:
        if feature != "key" or block != -1:
            raise ConfigError(
                f"backbone.feature and backbone.block have no effect on {name}, got {feature} and "
                f"{block}; leave them at key and -1, or take a ViT"
            )
        extractor = ConvFeatures(_cnn(name, weights))
    else:
        vit = _vit(name, weights)
        kind = RotaryViTFeatures if isinstance(vit, Eva) else ViTFeatures
        # DINOv2 and DINOv3 keep notes of the whole image in patches that show nothing.
        mended = "dinov2" in name or "dinov3" in name
        extractor = kind(vit, feature=feature, block=block, mend_artefacts=mended)
    return extractor.eval().requires_grad_(False)


def build_class_tokens(name: str, weights: Weights | None) -> ClassTokens:
    """The class token of ViT ``name``, in evaluation mode, frozen, on the CPU.

    Args:
        name: As for ``load_weights``, but no convolutional network.
        weights: What ``load_weights`` gave; None leaves the random initialisation.

    Raises:
        ConfigError: there is no such ViT, or it has no class token of DINO's kind.
        WeightsError: the weights do not fit the architecture.
    """
    if name in CNNS:
        raise ConfigError(f"backbone.name must be a ViT with a class token, got {name}")
    return ClassTokens(_vit(name, weights)).eval().requires_grad_(False)


def load_classifier_weights(name: str, checkpoint: str | None) -> Weights:
    """The weights of classifier ``name``, from a local file or else from where they are published.

    Args:
        name: As for ``build_model``; a timm name's tag chooses among its publications.
        checkpoint: A ``.safetensors``, ``.pth`` or ``.pth.tar`` file; None fetches by name.

    Raises:
        ConfigError: the name is unknown.
        WeightsError: the file cannot be read, or the weights cannot be fetched.
    """
    require_classifier(name)
    published = fetch_own if name in OWN_CLASSIFIERS else fetch
    path = Path(checkpoint).expanduser() if checkpoint else published(name)
    return Weights(read_state_dict(path), file_sha256(path), source=str(path))


def build_model(
    name: str,
    *,
    num_classes: int,
    weights: Weights | None = None,
    **choices: Unpack[ModelOptions],
) -> GridClassifier:
    """Classifier ``name``, giving logits and grids, in training mode, on the default device.

    Args:
        name: Any timm classifier with or without tag, or one of ``OWN_CLASSIFIERS``.
        num_classes: Outputs.
        weights: What ``load_classifier_weights`` gave, to start from; None starts from scratch.
            All must match but a classifier of another shape, which starts anew. At another
            ``image_size`` than theirs, positions and relative-position tables are resampled as timm
            does; weights of another ``patch_size`` are refused.
        **choices: See ``ModelOptions``.

    Raises:
        ConfigError: the name or an option is unknown or out of range, the network has no such knob,
            cannot take images of that size, or has a single cell in its last grid.
        WeightsError: the weights do not fit.
    """
    require_classifier(name)
    check_ranges(num_classes, choices)
    network: nn.Module
    if name in OWN_CLASSIFIERS:
        size = image_size(choices, (STANDARD_SIDE, STANDARD_SIDE))
        network = build_own(name, num_classes, choices, size)
    else:
        network, size = _timm_classifier(name, num_classes, choices)
    after_norm = name.startswith("t2t_vit")
    model = GridClassifier(
        network,
        stages=choices.get("stages", (-1,)),
        tap=choices.get("tap") or ("post_norm" if after_norm else "pre_norm"),
        layers=_layers(network),
    )
    _, rows, columns = model.grid_shapes(size)[-1]
    if rows * columns == 1:
        raise ConfigError(
            f"the last grid of {name} is 1 x 1 at {size[0]} x {size[1]} px, without positions to "
            "tell apart; give a larger model.image_size or, where the architecture has one, a "
            "smaller model.patch_size"
        )
    if weights is not None:
        fit_classifier(model, weights.state_dict, weights.source)
    return model


def build_feature_maps(name: str) -> FeatureMaps:
    """A timm network's maps at strides 4 to 32, random, in training mode, on the default device.

    Args:
        name: Any of ``timm.list_models()``, with or without tag, that has a map at each of these
            strides and takes images of any size. A tag changes no layer.

    Raises:
        ConfigError: timm has no such network, or it is of another kind.
    """
    require_timm(name)
    with torch.device("meta"):
        whole = _create_maps(name, {}, features_only=False)
        # Transformers of windows would else insist on the size of their published weights.
        takes = inspect.signature(type(whole)).parameters
        arguments: dict[str, Any] = {"strict_img_size": False} if "strict_img_size" in takes else {}
        info: Any = _create_maps(name, arguments).feature_info
        at = dict(zip(info.reduction(), info.out_indices, strict=True))
        if not at.keys() >= set(STRIDES):
            raise ConfigError(f"timm/{name} has no maps of all strides {STRIDES}; {_ANOTHER}")
        arguments["out_indices"] = [at[stride] for stride in STRIDES]
        skeleton = _create_maps(name, arguments).eval()
        channels = skeleton.feature_info.channels()
        try:
            channels_last = layouts(skeleton, channels)
        except Exception as fault:  # networks complain about sizes in every way there is
            reason = " ".join(str(fault).split())[:200]
            raise ConfigError(
                f"timm/{name} gives no maps for images of any size ({reason}); {_ANOTHER}"
            ) from fault
    return FeatureMaps(_create_maps(name, arguments), channels, channels_last)


def feature_map_weights(name: str, weights: Weights, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of timm network ``name`` under the ``names`` that its maps' tensors have.

    Layers after the last map are left out; what belongs nowhere keeps its name.

    Raises:
        WeightsError: they are of another network.
    """
    with torch.device("meta"):
        whole = _create_maps(name, {}, features_only=False)
    state = timm_weights(weights.state_dict, whole, weights.source)
    return under_names(state, whole.state_dict(), names)


def _create_maps(name: str, arguments: dict[str, Any], *, features_only: bool = True) -> Any:
    """The timm network of that name, its complaints as ConfigError."""
    try:
        return timm.create_model(name, features_only=features_only, **arguments)
    except Exception as fault:  # constructors complain about values in every way there is
        raise ConfigError(
            f"timm/{name} gives no maps to stand a pyramid on ({type(fault).__name__}: "
            f"{' '.join(str(fault).split())[:200]}); {_ANOTHER}"
        ) from fault


def _timm_classifier(
    name: str, num_classes: int, choices: ModelOptions
) -> tuple[nn.Module, tuple[int, int]]:
    """The timm network of that name, and the ``(rows, columns)`` of its images in pixels."""
    with torch.device("meta"):
        skeleton: Any = _create_classifier(name, num_classes, {})
    published: Any = getattr(skeleton, "pretrained_cfg", None) or {}
    rows, columns = published.get("input_size", (3, STANDARD_SIDE, STANDARD_SIDE))[-2:]
    if own_side := architecture(name)[1].get("img_size"):
        rows = columns = own_side
    size = image_size(choices, (rows, columns))
    arguments = timm_arguments(name, skeleton, choices, size)
    network = _create_classifier(name, num_classes, arguments)
    patch_size = choices.get("patch_size")
    if patch_size is not None and "patch_size" not in arguments:
        cut_stem(network, patch_size)
    return network, size


def _create_classifier(name: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    """The timm network, its complaints as ConfigError."""
    timm_name, own = architecture(name)
    try:
        network: nn.Module = timm.create_model(
            timm_name, num_classes=num_classes, **(own | arguments)
        )
    except Exception as fault:  # constructors complain about values in every way there is
        raise ConfigError(
            f"{name} cannot be built with {arguments}: {type(fault).__name__}: "
            f"{' '.join(str(fault).split())[:200]}; change model.options, model.image_size or "
            "model.patch_size, or take another model.name"
        ) from fault
    return network


def _layers(network: Any) -> list[list[str]]:
    """Names of the parameters per layer, from input to output; empty where timm does not tell."""
    if not hasattr(network, "group_matcher"):
        return []
    groups: dict[int, list[str]] = group_parameters(network, network.group_matcher(coarse=False))
    return [groups[index] for index in sorted(groups)]


def _cnn(name: str, weights: Weights | None) -> nn.Module:
    """The convolutional network of that name, up to its last map at stride 16."""
    network: nn.Module
    if name.startswith("vgg16"):
        network = Vgg16Map()
    else:
        # Stride 16 dilates the last stage, as torchvision's replace_stride_with_dilation in LOST.
        network = timm.create_model("resnet50", output_stride=16, num_classes=0, global_pool="")
    if weights is not None:
        fit_state_dict(network, weights.state_dict, weights.source)
    return network


def _vit(name: str, weights: Weights | None) -> nn.Module:
    """The ViT of that name, with the weights."""
    if weights is None:
        return build_vit(name)
    skeleton = _require_supported(name)
    if isinstance(skeleton, Eva):
        # Its rotations are buffers, which no file has.
        vit = _create_vit(name)
        fit_state_dict(vit, weights.state_dict, weights.source)
        return vit
    return _fill(skeleton, weights)


def build_vit(name: str, *, drop_path: float = 0.0, weights: Weights | None = None) -> nn.Module:
    """A plain ViT without a classifier, to be trained, on the CPU.

    Args:
        name: As for ``load_weights``, but no convolutional network.
        drop_path: Stochastic depth, the rate of the last block.
        weights: To start from; None draws them from the global generator.

    Raises:
        ConfigError: there is no such ViT.
        WeightsError: the weights do not fit.
    """
    if name in CNNS:
        raise ConfigError(f"model.name must be a ViT, got {name}")
    _require_supported(name)
    vit = _create_vit(name, drop_path_rate=drop_path)
    if weights is not None:
        fit_state_dict(vit, _timm_names(weights.state_dict, vit), weights.source)
    return vit


def _create_vit(name: str, **arguments: Any) -> nn.Module:
    timm_name, own = architecture(name)
    vit: nn.Module = timm.create_model(timm_name, num_classes=0, **own, **arguments)
    return vit


def _fill(skeleton: nn.Module, weights: Weights) -> nn.Module:
    """The ViT ``skeleton`` (on no device yet) with the weights, on the CPU."""
    state = _timm_names(weights.state_dict, skeleton)
    # Plain ViTs have no buffers: all that to_empty leaves undefined is a weight to be filled.
    vit = skeleton.to_empty(device="cpu")
    fit_state_dict(vit, state, weights.source)
    return vit


def _timm_names(state: dict[str, Tensor], vit: Any) -> dict[str, Tensor]:
    """Weights under timm's names, where they came under DINOv2's or DeiT-III's.

    timm would also resample patches and positions of other sizes without a word; weights that need
    that are passed on as they are, to be refused.
    """
    num_patches = vit.patch_embed.num_patches
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return state
    num_prefix = positions.shape[1] - num_patches
    same_grid = num_prefix in (0, 1, vit.num_prefix_tokens)
    if not same_grid or patch_side(state) != vit.patch_embed.patch_size[0]:
        return state
    renamed: dict[str, Tensor] = vision_transformer.checkpoint_filter_fn(
        dict(state), vit, adapt_layer_scale=True
    )
    return renamed


def _require_supported(name: str) -> nn.Module:
    """The network without memory (on the meta device), once it is known to be one we can use."""
    require_backbone(name)
    with torch.device("meta"):
        network = _create_vit(name)
    if name not in CNNS and not _is_plain_vit(network) and not _is_dinov3(network):
        raise ConfigError(
            f"backbone.name must be a plain timm ViT (learned absolute positions, fused qkv), a "
            f"DINOv3 ViT, or one of {', '.join(CNNS)}; {name} is a {type(network).__name__} with "
            "other parts"
        )
    return network


def _is_dinov3(network: Any) -> bool:
    """Whether all parts are those of timm's DINOv3 ViTs: rotations instead of positions."""
    return (
        isinstance(network, Eva)
        and isinstance(network.rope, RotaryEmbeddingDinoV3)
        and network.pos_embed is None
        and all(type(block) is EvaBlock for block in network.blocks)
        and all(isinstance(block.attn.qkv, nn.Linear) for block in network.blocks)
    )


def _is_plain_vit(network: Any) -> bool:
    """Whether all parts are timm's standard ones: others reorder norms or change attention."""
    return (
        isinstance(network, vision_transformer.VisionTransformer)
        and type(network.patch_embed) is PatchEmbed
        and all(type(block) is vision_transformer.Block for block in network.blocks)
        and all(type(block.attn) is Attention for block in network.blocks)
    )
