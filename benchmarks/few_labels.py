"""How few labelled images are too few to make probabilities of scores?

    python -m benchmarks.few_labels --ground-truth instances.json --labels labels/ head/

For each table: of its annotated images so many are drawn, a map is fitted on their boxes
(evaluation/score_maps.py), and measured on the boxes of all others. Of the draws it prints the
median and the worst but one tenth: of ECE, of AUROC and of the Brier score. Beside them stand what
the raw scores get, and the ECE of true probabilities on as many boxes, which is not 0: of a finite
number some bin is always off.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.timing import print_table, write_json
from pipeline.config.calibration import CalibrationMethod
from pipeline.data.ground_truth import GroundTruth, read_ground_truth
from pipeline.evaluation.calibration import are_probabilities, brier_score, reliability
from pipeline.evaluation.score_maps import as_columns, fit_score_map
from pipeline.evaluation.scored_boxes import ScoredBoxes
from pipeline.labelling.calibrate_scores import labelled_sample
from pipeline.localization.ranking import area_under_curve
from pipeline.storage import Location

Columns = NDArray[np.float64]
FIGURES = ("ece", "ece_of_truth", "auroc", "brier")


@dataclass(frozen=True)
class Settings:
    """What is calibrated, and how often."""

    labels: tuple[str, ...]
    """Tables of annotated images."""
    ground_truth: str
    numbers: tuple[int, ...] = (10, 20, 30, 50, 100, 200)
    """Of labelled images."""
    methods: tuple[CalibrationMethod, ...] = ("logistic", "isotonic")
    num_draws: int = 20
    output: Path = Path("benchmarks/results/few_labels.json")


def main(settings: Settings) -> None:
    """Calibrate and measure, print a table per table of boxes, and write all as JSON."""
    truths = read_ground_truth(Location.parse(settings.ground_truth))
    result: dict[str, Any] = {"settings": {"draws": settings.num_draws, "tables": settings.labels}}
    for labels in settings.labels:
        result[labels] = measured(labels, truths, settings)
        print_table(f"{labels}: median (worst but a tenth)", *shown(result[labels]))
    write_json(settings.output, result)


def measured(labels: str, truths: list[GroundTruth], settings: Settings) -> dict[str, Any]:
    """Of the raw scores, and by method and number of images: the figures of each draw."""
    sample = labelled_sample(Location.parse(labels), truths)
    boxes = sample.boxes
    evidence = [boxes.evidence[name] for name in sample.evidence]
    columns = {"logistic": as_columns(boxes.score_D, evidence)}
    columns["isotonic"] = as_columns(boxes.score_D, [])
    raw = {"auroc": area_under_curve(boxes.score_D, boxes.hit_D)}
    if are_probabilities(boxes.score_D):
        raw["ece"] = reliability(boxes.score_D, boxes.hit_D).error
        raw["brier"] = brier_score(boxes.score_D, boxes.hit_D)
    found: dict[str, Any] = {"raw": raw}
    for method in settings.methods:
        for number in settings.numbers:
            draws = [
                one_draw(boxes, columns[method], method, number, seed)
                for seed in range(settings.num_draws)
            ]
            found[f"{method} {number}"] = {
                name: [one[name] for one in draws if one] for name in FIGURES
            }
    return found


def one_draw(
    boxes: ScoredBoxes, columns_DC: Columns, method: CalibrationMethod, number: int, seed: int
) -> dict[str, float] | None:
    """Fitted on so many images, measured on the others; None where all boxes are of one kind."""
    rng = np.random.default_rng(seed)
    fitted_D = np.isin(boxes.image_D, rng.permutation(boxes.image_D.max() + 1)[:number])
    hit_D, other_D = boxes.hit_D[fitted_D], boxes.hit_D[~fitted_D]
    if hit_D.all() or not hit_D.any():
        return None
    said_D = fit_score_map(columns_DC[fitted_D], hit_D, method)(columns_DC[~fitted_D])
    true_D = rng.random(len(said_D)) < said_D
    return {
        "ece": reliability(said_D, other_D).error,
        "ece_of_truth": reliability(said_D, true_D).error,
        "auroc": area_under_curve(said_D, other_D),
        "brier": brier_score(said_D, other_D),
    }


def shown(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows."""
    titles = ["map, images", "ECE", "ECE if true", "AUROC", "Brier", "draws"]
    raw = [f"{found['raw'][name]:.3f}" if name in found["raw"] else "n/a" for name in FIGURES]
    rows = [["raw scores", raw[0], "", raw[2], raw[3], ""]]
    for way, draws in found.items():
        if way != "raw":
            cells = [median_and_worst(name, draws[name]) for name in FIGURES]
            rows.append([way, *cells, str(len(draws["ece"]))])
    return titles, rows


def median_and_worst(name: str, values: list[float]) -> str:
    """Of the draws; the worst tenth is left out."""
    worst = np.quantile(values, 0.1 if name == "auroc" else 0.9)
    return f"{np.median(values):.3f} ({worst:.3f})"


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
