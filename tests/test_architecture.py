"""Who may import what, proved by importing: import-linter reads the sources, this runs them."""

import subprocess
import sys

from tests.conftest import ROOT

RAY_FREE = [
    "pipeline.boxes",
    "pipeline.comparison.report",
    "pipeline.clustering.kmeans",
    "pipeline.clustering.table_boxes",
    "pipeline.command_line",
    "pipeline.config",
    "pipeline.data.images",
    "pipeline.labelling.run",
    "pipeline.data.lake",
    "pipeline.pretraining.views",
    "pipeline.data.pixels",
    "pipeline.scenes.scenes",
    "pipeline.detection.box_loader",
    "pipeline.detection.detector",
    "pipeline.detection.predictor",
    "pipeline.evaluation.one_box",
    "pipeline.evaluation.evaluate_boxes",
    "pipeline.labelling.labeller",
    "pipeline.losses.dino",
    "pipeline.losses.multi_stage",
    "pipeline.pretraining.network",
    "pipeline.localization.localize",
    "pipeline.models.dino_vit",
    "pipeline.models.dino_vit",
    "pipeline.models.features",
    "pipeline.models.cvt",
    "pipeline.models.t2t_vit",
    "pipeline.reproduction.plan",
    "pipeline.tracking.tracker",
    "pipeline.training.loop",
    "pipeline.training.checkpoints",
    "pipeline.tuning.trials",
    "pipeline.drawing.images",
]


LIGHT = ["pipeline.config", "pipeline.command_line"]
RECIPES = ["pipeline.labelling.labeller", "pipeline.detection.labeller"]
WATCHED = ("torch", "ray", "mlflow", "timm", "pandas", "rich")
OF_THE_DRIVER = ("pipeline.progress", "pipeline.tracking", "pipeline.gallery")


def loaded_in_turn(*steps: list[str]) -> list[set[str]]:
    """What of all that is watched is loaded after each step of one process's imports."""
    watched = {*WATCHED, *OF_THE_DRIVER}
    code = "import sys\n" + "".join(
        f"import {', '.join(modules)}\nprint(*({watched!r} & set(sys.modules)))\n"
        for modules in steps
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_rooms_outside_the_cluster_load_neither_ray_nor_mlflow_and_the_command_line_is_light() -> (
    None
):
    light, recipes, rooms = loaded_in_turn(LIGHT, RECIPES, RAY_FREE)
    assert not light & {"torch", "ray", "mlflow", "pandas"}
    # What an actor is made of brings nothing of the driver's.
    assert not recipes & {"ray", "rich", "mlflow"}
    assert not rooms & {"ray", "mlflow", "timm"}


def test_workers_load_no_more_than_they_use() -> None:
    tasks, actors = loaded_in_turn(
        ["pipeline.labelling.block_tasks"], ["pipeline.cluster.label_blocks"]
    )
    # A worker that reads and writes blocks.
    assert not tasks & {"torch", "timm", "mlflow"}
    assert not actors & {"mlflow", *OF_THE_DRIVER}
