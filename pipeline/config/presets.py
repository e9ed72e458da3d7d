"""Published recipes and the rows of the paper's Tables 2 to 5, as values of a classifier's knobs.

    --preset reference --data.name cifar100 --data.root DIR   # a recipe on any data
    --preset paper-cifar100-swin --data.root DIR              # a row of Table 4 as the text says
    --preset reference-cifar100-swin --data.root DIR          # the same row as the code ran it

To add a recipe: a function that gives nested values, and its name in ``RECIPES``. To add a row: a
line in ``_rows``. Flags after ``--preset`` win over it. Sources: Liu et al., NeurIPS 2021, and the
backbones' own training scripts.
"""

from collections.abc import Callable, Iterator
from typing import Any

from pipeline.config.classification import DOMAINS

Values = dict[str, Any]

DATA_SETS = ("cifar10", "cifar100", "flowers102", "svhn", *(f"domainnet-{d}" for d in DOMAINS))
"""Of Tables 4 and 5, in the paper's order."""

MODELS = {
    "swin": ("swin_tiny_patch4_window7_224", 0.5),
    "cvt": ("cvt_13_paper", 0.1),
    "t2t": ("t2t_vit_14", 0.1),
    # The paper states no lambda for ResNet-50 and ViT-B: this is the released script's default.
    "resnet50": ("resnet50", 0.5),
    "vit-b": ("vit_base_patch16_224", 0.5),
}
"""Short name -> architecture and the paper's lambda for it."""

PRETRAINED = {
    "swin": "swin_tiny_patch4_window7_224.ms_in1k",
    "t2t": "t2t_vit_14",
    "resnet50": "resnet50.tv_in1k",
}
"""Table 5's starting points: weights of the backbones' authors, ImageNet-1K only. T2T's come as a
file (--model.checkpoint)."""


def sane() -> Values:
    """Our default: batch 256, the schedule runs out, native resolution."""
    return {}


def reference() -> Values:
    """As the released code trains: 101 epochs of a 300-epoch cosine, raw targets, 3 x 3 pooling.

    Sources: its main.py and config; the loss's weight rises over 20 epochs and falls to 0 at 300.
    """
    return {
        "epochs": 300,
        "stop_after": 101,
        "batch_size": 1024,
        "model": {"image_size": 224, "drop_path": 0.0},
        "drloc": {
            "schedule": "ramp_decay",
            "ramp_epochs": 20,
            "normalize": "none",
            "reduction": "mean",
            "pooling": "overlap_3x3",
        },
        "data": {"validation_fraction": 0.0, "select_on_test": True},
        "augment": {"crop": "random_resized", "hflip": "always"},
        "optim": {
            "lr": 5e-4,
            "lr_batch": 512,
            "warmup_lr": 5e-7,
            "min_lr": 5e-6,
            "warmup_epochs": 20.0,
            "one_step_late": True,
            "clip": 5.0,
        },
    }


def paper() -> Values:
    """As the text says: Eq. 1-2, a constant weight, 2 x 2 pooling, 100 epochs; else the code's.

    Eq. 2 sums over the batch, which no fixed lambda survives: here that sum is a mean. With the
    text's lambda the term then is 2/7 of the released code's.
    """
    values = reference()
    values.update(epochs=100, stop_after=None)
    values["drloc"] = {
        "schedule": "constant",
        "normalize": "side",
        "reduction": "paper",
        "pooling": "mean_2x2",
    }
    return values


def t2t() -> Values:
    """T2T-ViT's own recipe for ImageNet-1K (300 epochs and 10 of cool-down)."""
    return {
        "epochs": 310,
        "batch_size": 512,
        "model": {"name": "t2t_vit_14", "image_size": 224, "drop_path": 0.1},
        "drloc": {"weight": 0.1},
        "augment": {"crop": "random_resized"},
        "optim": {
            "lr": 5e-4,
            "lr_batch": 512,
            "warmup_lr": 1e-6,
            "min_lr": 1e-5,
            "warmup_epochs": 10.0,
            "cooldown_epochs": 10,
            "clip": 0.0,
            "ema_decay": 0.99996,
        },
    }


def t2t_transfer() -> Values:
    """T2T-ViT's fine-tuning on CIFAR: SGD, 60 epochs, the backbone at a hundredth of the head's."""
    return {
        "epochs": 60,
        "batch_size": 64,
        "model": {"name": "t2t_vit_14", "image_size": 224},
        "drloc": {"weight": 0.1},
        "augment": {
            "crop": "pad",
            "rand_augment": None,
            "color_jitter": 0.0,
            "random_erasing": 0.0,
            "mixup": 0.0,
            "cutmix": 0.0,
        },
        "optim": {
            "kind": "sgd",
            "lr": 0.05,
            "lr_batch": None,
            "warmup_lr": 0.0,
            "min_lr": 2e-4,
            "warmup_epochs": 0.0,
            "weight_decay": 5e-4,
            "clip": 0.0,
            "backbone_lr_ratio": 0.01,
        },
    }


def cvt() -> Values:
    """CvT's own recipe for ImageNet-1K (batch 2048, 300 epochs and 10 of cool-down)."""
    return {
        "epochs": 310,
        "batch_size": 2048,
        "model": {"name": "cvt_13", "image_size": 224, "drop_path": 0.1},
        "drloc": {"weight": 0.1},
        "augment": {"crop": "random_resized"},
        "optim": {
            "lr": 2e-3,
            "lr_batch": 2048,
            "warmup_lr": 1e-6,
            "min_lr": 1e-5,
            "warmup_epochs": 5.0,
            "cooldown_epochs": 10,
            "clip": 0.0,
        },
    }


def small() -> Values:
    """For a laptop's cores: few labels of small images, minutes a run. Of no paper."""
    return {
        "epochs": 15,
        "batch_size": 64,
        "num_workers": 0,
        "data": {"loader_workers": 0, "validation_fraction": 0.02, "train_per_class": 250},
        "model": {"image_size": 32, "patch_size": 2, "drop_path": 0.0},
        "augment": {"rand_augment": None, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0},
        "optim": {
            "lr": 1e-3,
            "lr_batch": None,
            "warmup_lr": 1e-5,
            "min_lr": 1e-5,
            "warmup_epochs": 2.0,
        },
    }


RECIPES: dict[str, Callable[[], Values]] = {
    "sane": sane,
    "reference": reference,
    "paper": paper,
    "t2t": t2t,
    "t2t-transfer": t2t_transfer,
    "cvt": cvt,
    "small": small,
}
"""Presets that say how, not on what."""

# Networks of the three families cut down to where a core computes hundreds of images a second; all
# end in a 4 x 4 grid.
_NARROW = {
    "swin": "{embed_dim: 32, depths: [1, 1, 2], num_heads: [1, 2, 4], window_size: 4}",
    "cvt": "{dims: [32, 64, 128], depths: [1, 1, 2], heads: [1, 2, 4]}",
    "t2t": "{token_dim: 32, dim: 96, depth: 4, heads: 3}",
}


def presets() -> dict[str, Values]:
    """All presets by name, the recipes first.

    Rows: ``{sane,reference,paper}-DATA-MODEL`` (Table 4, and with ``-finetune`` Table 5),
    ``...-cifar100-swin-m32`` (Table 2a, the number of pairs), ``...-cifar100-cvt-lambda0.5``
    (Table 2b, the loss's weight), ``...-imagenet100-cvt-300ep`` (Table 3). Each row's baseline is
    the same preset with ``--drloc.weight 0``. ``small-{cifar10,folder}-{swin,cvt,t2t}``: narrow
    networks for a laptop.
    """
    found = {name: recipe() for name, recipe in RECIPES.items()}
    for name in ("sane", "reference", "paper"):
        for row, values in _rows():
            found[f"{name}-{row}"] = merged(RECIPES[name](), values)
            if name == "reference" and values["model"]["name"] == MODELS["vit-b"][0]:
                # The released code pools the 14 x 14 grids of CvT and T2T, and leaves ViT's.
                found[f"{name}-{row}"]["drloc"]["pooling"] = "none"
    for model, options in _NARROW.items():
        narrow = merged(_row("cifar10", model), {"model": {"options": options, "drop_path": 0.0}})
        found[f"small-cifar10-{model}"] = merged(small(), narrow)
        # A folder of photos, such as Oxford's 17 flowers, whose few images are all trained on.
        photos = {
            "epochs": 30,
            "batch_size": 32,
            "data": {"name": "folder", "validation_fraction": 0.1, "train_per_class": None},
            "model": {"image_size": 64, "patch_size": 4},
        }
        found[f"small-folder-{model}"] = merged(found[f"small-cifar10-{model}"], photos)
    return found


def _rows() -> Iterator[tuple[str, Values]]:
    for data in ("imagenet", "imagenet100", *DATA_SETS):
        for model in MODELS:
            yield f"{data}-{model}", _row(data, model)
    for data in DATA_SETS:
        for model in PRETRAINED:
            yield f"{data}-{model}-finetune", _finetuned(data, model)
    for num_pairs in (32, 64, 128, 256):
        values = merged(_row("cifar100", "swin"), {"drloc": {"num_pairs": num_pairs}})
        yield f"cifar100-swin-m{num_pairs}", values
    for model in ("cvt", "swin", "t2t"):
        for weight in (0.1, 0.5, 1.0):
            values = merged(_row("cifar100", model), {"drloc": {"weight": weight}})
            yield f"cifar100-{model}-lambda{weight:g}", values
        # Trained to the schedule's end, unlike the rows of 100 epochs.
        longer = {"epochs": 300, "stop_after": None}
        yield f"imagenet100-{model}-300ep", merged(_row("imagenet100", model), longer)


def _row(data: str, model: str) -> Values:
    name, weight = MODELS[model]
    values: Values = {"data": {"name": data}, "model": {"name": name}, "drloc": {"weight": weight}}
    if model == "swin":
        # The only network whose released configuration drops paths.
        values["model"]["drop_path"] = 0.2
    return values


def _finetuned(data: str, model: str) -> Values:
    """Table 5 states no learning rate: a tenth of training from scratch is our choice."""
    start = {"name": PRETRAINED[model], "image_size": 224, "pretrained": model != "t2t"}
    return merged(_row(data, model), {"model": start, "optim": {"lr": 5e-5, "min_lr": 5e-7}})


def merged(values: Values, over: Values) -> Values:
    """``values`` with what ``over`` says in its place, group by group; neither is changed."""
    result = dict(values)
    for name, value in over.items():
        below = result.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            result[name] = merged(below, value)
        else:
            result[name] = value
    return result
