"""DRLoc's Tables 2a, 2b, 3, 4 and 5 as cells, at the paper's size or at a laptop's.

``paper`` cells are the presets of config/presets.py; ``small`` ones are its ``small-...`` presets,
with CIFAR-10 in the place of CIFAR-100 and ImageNet-100, and 17 flowers in that of 102.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config.presets import merged, presets
from pipeline.reproduction import published_figures
from pipeline.reproduction.cells import Cell, Classifier, Table, Values
from pipeline.reproduction.published_figures import Pair, Published


@dataclass(frozen=True)
class Size:
    """How much work a table is.

    Attributes:
        scale: the paper's, or a laptop's.
        recipe: at the paper's: as its released code trains, as its text says, or our default.
    """

    scale: Literal["paper", "small"] = "paper"
    recipe: Literal["sane", "reference", "paper"] = "reference"


_MODELS = {"cvt": "CvT-13", "swin": "Swin-T", "t2t": "T2T-ViT-14", "resnet50": "ResNet-50"}
# Where no narrow preset exists, as for the paper's ResNet-50: the same at a thirtieth of the work.
_SMALL_RESNET: Values = {
    "model": {
        "name": "resnet18",
        "options": "{layers: [1, 1, 1, 1], channels: [16, 32, 64, 128]}",
        "patch_size": None,
    },
}
_STANDS_IN = {"imagenet100": "cifar10", "flowers102": "flowers17"}
_SMALL_EPOCHS = {100: 15, 300: 45}
_BASELINE: Values = {"drloc": {"weight": 0.0}}
# What a pair of cells has of DRLoc beside its preset: nothing at all, and nothing more.
_OFF_AND_ON: tuple[Values | None, Values | None] = (None, {})
_NARROWED = (
    "--scale small: each network narrowed to half a million weights or fewer, 250 labels a class; "
    "CIFAR-10 stands in for CIFAR-100 and ImageNet-100, 17 flowers for 102, 15 epochs (30 on "
    "flowers) for 100, 45 for 300. Compare signs and sizes of gains, not accuracies."
)
_SELECTED = (
    "The paper chose its epoch on the test images, and so do the presets of its recipes: those "
    "accuracies are optimistic, ours as its own."
)


def table_2a(size: Size) -> Table:
    """The number of pairs m."""
    cells = []
    for num_pairs, value in published_figures.PAIRS.items():
        with_loss = {"drloc": {"num_pairs": num_pairs}}
        cells.append(
            Cell(
                name=f"m{num_pairs}",
                words=f"m = {num_pairs}" if num_pairs else "m = 0 (no DRLoc)",
                published=Published(value, published_figures.SOURCE_2A),
                recipe=_run(size, _ablated(size), "swin", with_loss if num_pairs else None),
                base="m0" if num_pairs else None,
            )
        )
    title = "DRLoc, Table 2a: the number of pairs m, Swin"
    return Table(title, tuple(cells), _notes(size))


def table_2b(size: Size) -> Table:
    """The loss's weight lambda, by network."""
    cells = []
    for model, values in published_figures.BY_LAMBDA.items():
        for weight, value in zip(published_figures.LAMBDAS, values, strict=True):
            with_loss = {"drloc": {"weight": weight}}
            cells.append(
                Cell(
                    name=f"{model}-lambda{weight:g}",
                    words=f"{_MODELS[model]}, lambda = {weight:g}",
                    published=Published(value, published_figures.SOURCE_2B),
                    recipe=_run(size, _ablated(size), model, with_loss if weight else None),
                    base=f"{model}-lambda0" if weight else None,
                )
            )
    title = "DRLoc, Table 2b: the weight lambda"
    return Table(title, tuple(cells), _notes(size))


def table_3(size: Size) -> Table:
    """ImageNet-100, 100 and 300 epochs."""
    cells: list[Cell] = []
    for epochs, by_model in published_figures.IMAGENET100.items():
        for model, pair in by_model.items():
            spreads = published_figures.SPREADS_100[model] if epochs == 100 else (None, None)
            figures = [
                Published(value, f"{published_figures.SOURCE_3}, {epochs} epochs", spread)
                for value, spread in zip(pair, spreads, strict=True)
            ]
            runs = [_run(size, "imagenet100", model, loss, epochs=epochs) for loss in _OFF_AND_ON]
            name, words = f"{model}-{epochs}ep", f"{_MODELS[model]}, {epochs} epochs"
            cells += _pair(name, words, figures, runs)
    title = "DRLoc, Table 3: ImageNet-100"
    return Table(title, tuple(cells), _notes(size))


def table_4(size: Size) -> Table:
    """Ten data sets from scratch."""
    cells = _of_ten(size, published_figures.FROM_SCRATCH, published_figures.SOURCE_4, tuned=False)
    return Table("DRLoc, Table 4: from scratch", cells, _notes(size))


def table_5(size: Size) -> Table:
    """Ten data sets, fine-tuned."""
    cells = _of_ten(size, published_figures.FINE_TUNED, published_figures.SOURCE_5, tuned=True)
    notes = (*_notes(size), "The paper tells no learning rate for fine-tuning: it is our choice.")
    return Table("DRLoc, Table 5: fine-tuned", cells, notes)


def _of_ten(
    size: Size,
    figures: dict[str, tuple[Pair, ...]],
    source: str,
    *,
    tuned: bool,
) -> tuple[Cell, ...]:
    cells: list[Cell] = []
    for model, pairs in figures.items():
        for data, pair in zip(published_figures.CLASSIFIED, pairs, strict=True):
            runs = [_run(size, data, model, loss, tuned=tuned) for loss in _OFF_AND_ON]
            told = [Published(value, source) for value in pair]
            cells += _pair(f"{data}-{model}", f"{data}, {_MODELS[model]}", told, runs)
    return tuple(cells)


def _pair(
    name: str, words: str, figures: Sequence[Published], runs: Sequence[Classifier]
) -> list[Cell]:
    """A baseline, and the same with DRLoc."""
    base = f"{name}-base"
    return [
        Cell(base, f"{words}, no DRLoc", figures[0], runs[0]),
        Cell(f"{name}-drloc", f"{words}, + DRLoc", figures[1], runs[1], base=base),
    ]


def _run(
    size: Size,
    data: str,
    model: str,
    loss: Values | None,
    *,
    epochs: int = 100,
    tuned: bool = False,
) -> Classifier:
    """The runs of one cell: ``loss`` are its values of DRLoc, None is the paired baseline.

    A baseline has nothing of ``loss``: so all the cells that are held to it share its runs.
    """
    if size.scale == "paper":
        suffix = "-finetune" if tuned else "-300ep" if epochs == 300 else ""
        name, values = data, presets()[f"{size.recipe}-{data}-{model}{suffix}"]
    else:
        name, values = _small(data, model, epochs)
    return Classifier(
        data=name,
        values=merged(values, _BASELINE if loss is None else loss),
        network=model if size.scale == "paper" else f"small-{model}",
        starts_from=model if tuned else None,
    )


def _small(data: str, model: str, epochs: int) -> tuple[str, Values]:
    """A narrow network on data that is small, or made so by taking few labels of each class."""
    shape = "swin" if model == "resnet50" else model
    name = _STANDS_IN.get(data, data)
    if name == "flowers17":
        values = presets()[f"small-folder-{shape}"]
    else:
        over: Values = {"data": {"name": name}, "epochs": _SMALL_EPOCHS[epochs]}
        if name.startswith("domainnet"):
            # Some of its classes have fewer images than the preset asks for.
            over["data"]["train_per_class"] = None
        values = merged(presets()[f"small-cifar10-{shape}"], over)
    return name, merged(values, _SMALL_RESNET) if model == "resnet50" else values


def _ablated(size: Size) -> str:
    """What Tables 2a and 2b are measured on."""
    return "cifar100" if size.scale == "paper" else "cifar10"


def _notes(size: Size) -> tuple[str, ...]:
    return (_NARROWED,) if size.scale == "small" else (_SELECTED,)
