"""The papers' tables as cells, by name: ``drloc-2a``, ``lost-1`` and so on.

``paper`` cells of DRLoc's tables are the presets of config/presets.py; ``small`` ones are its
``small-...`` presets, with CIFAR-10 in the place of CIFAR-100 and ImageNet-100, and 17 flowers in
that of 102. CorLoc is one number per set of images, without seeds: at ``small`` the rows of LOST's
and SoLOST's tables are the paper's, and beside them those of backbones small enough for a laptop.

To add a table: a function from a size to a ``Table``, its figures in published_figures.py, a line
in ``TABLES``, its name in config/reproduction.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product

from pipeline.config.detection import presets as detector_presets
from pipeline.config.presets import merged, presets
from pipeline.config.reproduction import TableRecipe, TableScale
from pipeline.errors import ConfigError
from pipeline.reproduction import published_figures
from pipeline.reproduction.backbones import BACKBONES
from pipeline.reproduction.cells import (
    BoxesRecipe,
    Cell,
    ClassifierRecipe,
    DetectorRecipe,
    Metric,
    Split,
    Table,
    Values,
)
from pipeline.reproduction.published_figures import (
    LOST_PAPER,
    PHOTO_SETS,
    SECOND_HAND,
    Pair,
    Published,
)


@dataclass(frozen=True)
class TableSize:
    """How much work a table is.

    Attributes:
        scale: the paper's, or a laptop's.
        recipe: at the paper's: as its released code trains, as its text says, or our default.
    """

    scale: TableScale = "paper"
    recipe: TableRecipe = "reference"


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


def table_2a(size: TableSize) -> Table:
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


def table_2b(size: TableSize) -> Table:
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


def table_3(size: TableSize) -> Table:
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


def table_4(size: TableSize) -> Table:
    """Ten data sets from scratch."""
    cells = _of_ten(size, published_figures.FROM_SCRATCH, published_figures.SOURCE_4, tuned=False)
    return Table("DRLoc, Table 4: from scratch", cells, _notes(size))


def table_5(size: TableSize) -> Table:
    """Ten data sets, fine-tuned."""
    cells = _of_ten(size, published_figures.FINE_TUNED, published_figures.SOURCE_5, tuned=True)
    notes = (*_notes(size), "The paper tells no learning rate for fine-tuning: it is our choice.")
    return Table("DRLoc, Table 5: fine-tuned", cells, notes)


def _of_ten(
    size: TableSize,
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
    name: str, words: str, figures: Sequence[Published], runs: Sequence[ClassifierRecipe]
) -> list[Cell]:
    """A baseline, and the same with DRLoc."""
    base = f"{name}-base"
    return [
        Cell(base, f"{words}, no DRLoc", figures[0], runs[0]),
        Cell(f"{name}-drloc", f"{words}, + DRLoc", figures[1], runs[1], base=base),
    ]


def _run(
    size: TableSize,
    data: str,
    model: str,
    loss: Values | None,
    *,
    epochs: int = 100,
    tuned: bool = False,
) -> ClassifierRecipe:
    """The runs of one cell: ``loss`` are its values of DRLoc, None is the paired baseline.

    A baseline has nothing of ``loss``: so all the cells that are held to it share its runs.
    """
    if size.scale == "paper":
        suffix = "-finetune" if tuned else "-300ep" if epochs == 300 else ""
        name, values = data, presets()[f"{size.recipe}-{data}-{model}{suffix}"]
    else:
        name, values = _small(data, model, epochs)
    return ClassifierRecipe(
        data=name,
        values=merged(values, _BASELINE if loss is None else loss),
        narrowed=size.scale == "small",
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


def _ablated(size: TableSize) -> str:
    """What Tables 2a and 2b are measured on."""
    return "cifar100" if size.scale == "paper" else "cifar10"


def _notes(size: TableSize) -> tuple[str, ...]:
    return (_NARROWED,) if size.scale == "small" else (_SELECTED,)


_RULES = {
    "lost": ("LOST", BoxesRecipe("", "", "lost")),
    "solost": ("SoLOST", BoxesRecipe("", "", "solost")),
    "lost-cosine": ("LOST, cosine", BoxesRecipe("", "", "lost", "cosine")),
    "lost-pearson": ("LOST, Pearson", BoxesRecipe("", "", "lost", "pearson")),
}
_SAME_IMAGES = (
    "CorLoc in % of images whose box has IoU >= 0.5 with an object, difficult ones counted; "
    "differences are paired over images. The paper's figures are on its whole sets."
)
_REPORT = f"{published_figures.SOLOST_REPORT}, its comparison of backbones and similarities"


def lost_1(size: TableSize) -> Table:
    """LOST against what came before, and with a detector trained on its boxes."""
    cells: list[Cell] = []
    for data, seg, lost, cad in zip(
        PHOTO_SETS,
        published_figures.DINO_SEG,
        published_figures.LOST_ON_DINO,
        published_figures.LOST_AND_CAD,
        strict=True,
    ):
        base = f"{data}-lost"
        found = DetectorRecipe(
            BoxesRecipe(data, "vit-s16"), "trainval", _detector(size, data, "lost")
        )
        seg_figure = Published(seg, SECOND_HAND)
        cells += [
            Cell(f"{data}-dino-seg", f"{data}, DINO-seg", seg_figure, None, metric="CorLoc"),
            _cell(base, f"{data}, LOST", lost, LOST_PAPER, BoxesRecipe(data, "vit-s16")),
            Cell(
                f"{data}-lost-cad",
                f"{data}, LOST + CAD",
                Published(cad, LOST_PAPER),
                found,
                base=base,
                metric="CorLoc",
            ),
        ]
    cells += _stand_ins(size, ("lost",))
    return Table("LOST, Table 1: one object per image (ViT-S/16)", tuple(cells), (_SAME_IMAGES,))


def lost_3(size: TableSize) -> Table:
    """LOST by backbone, and by which tensor of a ViT is the feature."""
    cells: list[Cell] = []
    for backbone, figures in published_figures.LOST_BACKBONES.items():
        for data, value in zip(PHOTO_SETS, figures, strict=True):
            words = f"{data}, {BACKBONES[backbone].words}"
            cells.append(
                _cell(f"{data}-{backbone}", words, value, LOST_PAPER, BoxesRecipe(data, backbone))
            )
    of_keys = "voc07-vit-s16"
    for feature, value in published_figures.LOST_FEATURES.items():
        if feature != "key":
            boxes = BoxesRecipe(
                "voc07", "vit-s16", feature="query" if feature == "query" else "value"
            )
            words = f"voc07, {BACKBONES['vit-s16'].words}, {feature}"
            cell = _cell(f"{of_keys}-{feature}", words, value, SECOND_HAND, boxes)
            cells.append(replace(cell, base=of_keys))
    deit = BoxesRecipe("voc07", "deit-s16")
    words = f"voc07, {BACKBONES['deit-s16'].words}"
    cells.append(_cell("voc07-deit-s16", words, published_figures.LOST_DEIT, SECOND_HAND, deit))
    cells += _stand_ins(size, ("lost",))
    for backbone in _small_backbones(size):
        base = f"voc07-{backbone}-lost"
        for feature in ("query", "key"):
            boxes = BoxesRecipe("voc07", backbone, feature="query" if feature == "query" else "key")
            words = f"voc07, {BACKBONES[backbone].words}, {feature} instead of value"
            cells.append(_own(f"voc07-{backbone}-{feature}", words, boxes, base))
    return Table("LOST, Table 3: backbones and features", tuple(cells), (_SAME_IMAGES,))


def solost_4(size: TableSize) -> Table:
    """SoLOST against LOST, and LOST's other similarities, on every backbone."""
    cells: list[Cell] = []
    for backbone in published_figures.RULES["solost"]:
        for place, data in enumerate(PHOTO_SETS):
            for rule, figures in published_figures.RULES.items():
                if backbone not in figures:
                    continue
                words, boxes = _RULES[rule]
                cell = _cell(
                    f"{data}-{backbone}-{rule}",
                    f"{data}, {BACKBONES[backbone].words}, {words}",
                    figures[backbone][place],
                    _REPORT,
                    replace(boxes, data=data, backbone=backbone),
                )
                base = None if rule == "lost" else f"{data}-{backbone}-lost"
                cells.append(replace(cell, base=base))
    cells += _stand_ins(size, tuple(_RULES))
    return Table("SoLOST, Table 4: SoLOST against LOST", tuple(cells), (_SAME_IMAGES,))


def cad_5(size: TableSize) -> Table:
    """A detector trained on SoLOST's boxes against one trained on LOST's."""
    backbone = "vit-s16" if size.scale == "paper" else "vit-ti16"
    cells: list[Cell] = []
    for metric, told in (
        ("AP50", published_figures.CAD_AP50),
        ("CorLoc", published_figures.CAD_CORLOC),
    ):
        for images, values in told.items():
            data, _, split = images.partition("-")
            base = f"{images}-{metric.lower()}-lost"
            recipe = _detector(size, data, "solost-repro")
            for rule, value in zip(("lost", "solost"), values, strict=True):
                boxes = replace(_RULES[rule][1], data=data, backbone=backbone)
                on: Split = "test" if split == "test" else "trainval"
                cells.append(
                    Cell(
                        name=f"{images}-{metric.lower()}-{rule}",
                        words=f"{images}, {metric}, trained on {_RULES[rule][0]}",
                        published=_figure(value),
                        recipe=DetectorRecipe(boxes, on, recipe),
                        base=None if rule == "lost" else base,
                        metric="AP50" if metric == "AP50" else "CorLoc",
                    )
                )
    notes = [
        "AP50 is COCO's at IoU 0.5, class-agnostic, difficult objects dropped; intervals are over "
        "the detector's seeds. The report ran one seed, and its own runs differ by 3.7 points."
    ]
    if size.scale == "small":
        notes.append(
            "--scale small: the nano detector for 128 px on boxes of ViT-Ti/16; where the images "
            "come without lists, the first 70 % by name are trainval."
        )
    return Table("SoLOST, Table 5: a detector on its boxes (CAD)", tuple(cells), tuple(notes))


_FOUND_BY = {
    "solost": ("SoLOST", BoxesRecipe("", "", "solost")),
    "lost": ("LOST", BoxesRecipe("", "", "lost")),
    "ncut": ("the cut", BoxesRecipe("", "", "ncut")),
    "head": ("a head", BoxesRecipe("", "", "head")),
    "head-many": ("a head, 10 boxes", BoxesRecipe("", "", "head", max_objects=10)),
}
_MEASURED_BY: tuple[Metric, ...] = ("CorLoc", "AP50", "AR@10", "AUROC")


def discovery(size: TableSize) -> Table:
    """Every rule by every measure, and a detector trained on the boxes of SoLOST and of a head."""
    small = size.scale == "small"
    sets = ("voc07", "kangaroo", "scenes") if small else PHOTO_SETS
    backbones = _small_backbones(size) if small else ["vit-s16", "vit-s8", "vit-b16"]
    cells: list[Cell] = []
    if not small:
        for method, value in published_figures.OTHERS_ON_VOC07.items():
            told = Published(value, SECOND_HAND)
            name, words = f"voc07-{method.lower()}", f"voc07, CorLoc, {method}"
            cells.append(Cell(name, words, told, None, metric="CorLoc"))
    for metric, data, backbone in product(_MEASURED_BY, sets, backbones):
        base = f"{data}-{backbone}-{metric.lower()}"
        for rule, (words, boxes) in _FOUND_BY.items():
            cells.append(
                Cell(
                    name=f"{base}-{rule}",
                    words=f"{data}, {BACKBONES[backbone].words}, {metric}, {words}",
                    published=_known(data, backbone, metric, rule),
                    recipe=replace(boxes, data=data, backbone=backbone),
                    base=None if rule == "solost" else f"{base}-solost",
                    metric=metric,
                )
            )
    for data, backbone in (("scenes", "vit-nano8"), ("voc07", "vit-ti16")) if small else ():
        cells += _detectors_on(data, backbone, size)
    notes = (
        "AP50 and AR@10 are COCO's, difficult objects dropped; AUROC is of the scores, a box being "
        "right at IoU >= 0.5. Intervals are over images. A head is fitted on the very images.",
    )
    return Table("Discovery: what each rule finds", tuple(cells), (_SAME_IMAGES, *notes))


def _known(data: str, backbone: str, metric: Metric, rule: str) -> Published | None:
    figures = published_figures.RULES.get(rule, {}).get(backbone)
    if metric != "CorLoc" or figures is None or data not in PHOTO_SETS:
        return None
    return Published(figures[PHOTO_SETS.index(data)], _REPORT)


def _detectors_on(data: str, backbone: str, size: TableSize) -> Iterator[Cell]:
    """AP50 on the test images: of the boxes themselves, and of detectors trained on others."""
    base = f"{data}-test-ap50"
    for rule in ("solost", "head", "head-many"):
        words, boxes = _FOUND_BY[rule]
        boxes = replace(boxes, data=data, backbone=backbone)
        yield Cell(
            name=f"{base}-{rule}",
            words=f"{data} test, AP50, {words}",
            published=None,
            recipe=replace(boxes, split="test"),
            base=None if rule == "solost" else f"{base}-solost",
            metric="AP50",
        )
        yield Cell(
            name=f"{base}-{rule}-cad",
            words=f"{data} test, AP50, detector on {words}",
            published=None,
            recipe=DetectorRecipe(boxes, "test", _detector(size, data, "nano")),
            base=None if rule == "solost" else f"{base}-solost-cad",
            metric="AP50",
        )


def _figure(value: float | None) -> Published | None:
    source = f"{published_figures.SOLOST_REPORT} and its logs: batch 2, one seed"
    return None if value is None else Published(value, source)


def _cell(name: str, words: str, value: float, source: str, boxes: BoxesRecipe) -> Cell:
    return Cell(name, words, Published(value, source), boxes, metric="CorLoc")


def _own(name: str, words: str, boxes: BoxesRecipe, base: str | None) -> Cell:
    """A cell that no paper has."""
    return Cell(name, words, None, boxes, base=base, metric="CorLoc")


def _small_backbones(size: TableSize) -> list[str]:
    if size.scale == "paper":
        return []
    return [name for name, backbone in BACKBONES.items() if backbone.stands_in]


def _stand_ins(size: TableSize, rules: tuple[str, ...]) -> Iterator[Cell]:
    """The same rules on backbones of no paper; the first rule is what the others are held to."""
    for backbone in _small_backbones(size):
        for rule in rules:
            words, boxes = _RULES[rule]
            yield _own(
                f"voc07-{backbone}-{rule}",
                f"voc07, {BACKBONES[backbone].words}, {words}",
                replace(boxes, data="voc07", backbone=backbone),
                None if rule == rules[0] else f"voc07-{backbone}-{rules[0]}",
            )


def _detector(size: TableSize, data: str, preset: str) -> Values:
    """Values of train_detector."""
    if size.scale == "small":
        # Decoded in the run's own process, as it has one core.
        return merged(detector_presets()["nano"], {"loader_workers": 0})
    values = detector_presets()[preset]
    # VOC07's detectors were trained for 10,000 steps, all others for 24,000.
    return merged(values, {"steps": 10_000 if data == "voc07" else 24_000})


TABLES: dict[str, Callable[[TableSize], Table]] = {
    "drloc-2a": table_2a,
    "drloc-2b": table_2b,
    "drloc-3": table_3,
    "drloc-4": table_4,
    "drloc-5": table_5,
    "lost-1": lost_1,
    "lost-3": lost_3,
    "solost-4": solost_4,
    "cad-5": cad_5,
    "discovery": discovery,
}


def chosen_cells(table: Table, rows: Sequence[str]) -> tuple[Cell, ...]:
    """The cells that ``rows`` (names, or patterns with * and ?) choose, and what they are held to.

    Args:
        table: all there are.
        rows: empty chooses all.

    Raises:
        ConfigError: a row fits no cell.
    """
    names = [cell.name for cell in table.cells]
    chosen = set(names) if not rows else set()
    for row in rows:
        fitting = {name for name in names if fnmatchcase(name, row)}
        if not fitting:
            raise ConfigError(f"--rows {row} is none of the table's: {', '.join(names)}")
        chosen |= fitting
    chosen |= {cell.base for cell in table.cells if cell.name in chosen and cell.base}
    return tuple(cell for cell in table.cells if cell.name in chosen)
