"""Who may import what, proved by importing: import-linter reads the sources, this runs them."""

import subprocess
import sys

import pytest

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


def loaded_by(module: str, candidates: set[str]) -> set[str]:
    code = f"import sys, {module}; print(*({candidates!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_rooms_outside_the_cluster_load_neither_ray_nor_mlflow_nor_timm() -> None:
    assert loaded_by(", ".join(RAY_FREE), {"ray", "mlflow", "timm"}) == set()


@pytest.mark.parametrize("module", ["pipeline.config", "pipeline.command_line"])
def test_the_command_line_is_light(module: str) -> None:
    assert loaded_by(module, {"torch", "ray", "mlflow", "pandas"}) == set()


def test_a_worker_that_reads_and_writes_blocks_does_not_load_torch() -> None:
    assert loaded_by("pipeline.cluster.block_tasks", {"torch", "timm", "mlflow"}) == set()


def test_what_an_actor_is_made_of_brings_nothing_of_the_drivers() -> None:
    recipes = "pipeline.labelling.labeller, pipeline.detection.labeller"
    assert loaded_by(recipes, {"ray", "rich", "mlflow"}) == set()
    theirs = {"mlflow", "pipeline.progress", "pipeline.tracking", "pipeline.gallery"}
    assert loaded_by("pipeline.cluster.label_blocks", theirs) == set()
