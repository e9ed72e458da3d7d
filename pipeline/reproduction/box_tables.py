"""LOST's and SoLOST's tables of boxes and detectors as cells.

CorLoc is one number per set of images, without seeds: at ``small`` the rows are the paper's, and
beside them those of backbones small enough for a laptop. To add a table: a function here, and its
name in tables.py.
"""

from collections.abc import Iterator
from dataclasses import replace

from pipeline.config.detection import presets as detector_presets
from pipeline.config.presets import merged
from pipeline.reproduction import published_figures
from pipeline.reproduction.backbones import BACKBONES
from pipeline.reproduction.cells import Boxes, Cell, Detections, Split, Table, Values
from pipeline.reproduction.classifier_tables import Size
from pipeline.reproduction.published_figures import LOST_PAPER, PHOTO_SETS, SECOND_HAND, Published

_RULES = {
    "lost": ("LOST", Boxes("", "", "lost")),
    "solost": ("SoLOST", Boxes("", "", "solost")),
    "lost-cosine": ("LOST, cosine", Boxes("", "", "lost", "cosine")),
    "lost-pearson": ("LOST, Pearson", Boxes("", "", "lost", "pearson")),
}
_SAME_IMAGES = (
    "CorLoc in % of images whose box has IoU >= 0.5 with an object, difficult ones counted; "
    "differences are paired over images. The paper's figures are on its whole sets."
)
_REPORT = f"{published_figures.SOLOST_REPORT}, its comparison of backbones and similarities"


def lost_1(size: Size) -> Table:
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
        found = Detections(Boxes(data, "vit-s16"), "trainval", _detector(size, data, "lost"))
        seg_figure = Published(seg, SECOND_HAND)
        cells += [
            Cell(f"{data}-dino-seg", f"{data}, DINO-seg", seg_figure, None, metric="CorLoc"),
            _cell(base, f"{data}, LOST", lost, LOST_PAPER, Boxes(data, "vit-s16")),
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


def lost_3(size: Size) -> Table:
    """LOST by backbone, and by which tensor of a ViT is the feature."""
    cells: list[Cell] = []
    for backbone, figures in published_figures.LOST_BACKBONES.items():
        for data, value in zip(PHOTO_SETS, figures, strict=True):
            words = f"{data}, {BACKBONES[backbone].words}"
            cells.append(
                _cell(f"{data}-{backbone}", words, value, LOST_PAPER, Boxes(data, backbone))
            )
    of_keys = "voc07-vit-s16"
    for feature, value in published_figures.LOST_FEATURES.items():
        if feature != "key":
            boxes = Boxes("voc07", "vit-s16", feature="query" if feature == "query" else "value")
            words = f"voc07, {BACKBONES['vit-s16'].words}, {feature}"
            cell = _cell(f"{of_keys}-{feature}", words, value, SECOND_HAND, boxes)
            cells.append(replace(cell, base=of_keys))
    deit = Boxes("voc07", "deit-s16")
    words = f"voc07, {BACKBONES['deit-s16'].words}"
    cells.append(_cell("voc07-deit-s16", words, published_figures.LOST_DEIT, SECOND_HAND, deit))
    cells += _stand_ins(size, ("lost",))
    for backbone in _small_backbones(size):
        base = f"voc07-{backbone}-lost"
        for feature in ("query", "key"):
            boxes = Boxes("voc07", backbone, feature="query" if feature == "query" else "key")
            words = f"voc07, {BACKBONES[backbone].words}, {feature} instead of value"
            cells.append(_own(f"voc07-{backbone}-{feature}", words, boxes, base))
    return Table("LOST, Table 3: backbones and features", tuple(cells), (_SAME_IMAGES,))


def solost_4(size: Size) -> Table:
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


def cad_5(size: Size) -> Table:
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
                        recipe=Detections(boxes, on, recipe),
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


def _figure(value: float | None) -> Published | None:
    source = f"{published_figures.SOLOST_REPORT} and its logs: batch 2, one seed"
    return None if value is None else Published(value, source)


def _cell(name: str, words: str, value: float, source: str, boxes: Boxes) -> Cell:
    return Cell(name, words, Published(value, source), boxes, metric="CorLoc")


def _own(name: str, words: str, boxes: Boxes, base: str | None) -> Cell:
    """A cell that no paper has."""
    return Cell(name, words, None, boxes, base=base, metric="CorLoc")


def _small_backbones(size: Size) -> list[str]:
    if size.scale == "paper":
        return []
    return [name for name, backbone in BACKBONES.items() if backbone.stands_in]


def _stand_ins(size: Size, rules: tuple[str, ...]) -> Iterator[Cell]:
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


def _detector(size: Size, data: str, preset: str) -> Values:
    """Values of train_detector."""
    if size.scale == "small":
        # Decoded in the run's own process, as it has one core.
        return merged(detector_presets()["nano"], {"loader_workers": 0})
    values = detector_presets()[preset]
    # VOC07's detectors were trained for 10,000 steps, all others for 24,000.
    return merged(values, {"steps": 10_000 if data == "voc07" else 24_000})
