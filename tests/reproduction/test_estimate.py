"""The table of operations and weights that hours and disk are reckoned by."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import TrainClassifierJob
from pipeline.config.presets import merged
from pipeline.models.backbones import build_model
from pipeline.reproduction.cells import ClassifierRecipe
from pipeline.reproduction.estimate import _NETWORKS
from pipeline.reproduction.tables import TABLES, TableSize


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_operations_and_weights_are_those_of_the_networks(scale: str) -> None:
    size = TableSize("small") if scale == "small" else TableSize("paper")
    recipes = {
        cell.recipe.network: cell.recipe
        for cell in TABLES["drloc-4"](size).cells
        if isinstance(cell.recipe, ClassifierRecipe) and cell.recipe.data == "cifar10"
    }
    assert len(recipes) == 4
    for network, recipe in recipes.items():
        values = merged(recipe.values, {"data": {"root": "/data"}})
        model = TrainClassifierJob.model_validate(values).model
        side = model.image_size or 224
        patch_size = model.patch_size or (1 if network == "small-resnet50" else None)
        with torch.device("meta"):
            built = build_model(
                model.name,
                num_classes=10,
                image_size=side,
                patch_size=patch_size,
                options=model.option_values(),
            ).eval()
            image = torch.empty(1, 3, side, side)
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            built(image)
        gmacs, millions = _NETWORKS[network]
        assert counted.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.05)
        assert sum(one.numel() for one in built.parameters()) / 1e6 == pytest.approx(
            millions, rel=0.05
        )
