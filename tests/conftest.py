"""What every test may ask for."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden outputs, real photos and weights beside the repository; users do not have them."""
    folder = Path(os.environ.get("PATCHSEED_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(
            f"{folder} is absent: golden data and real photos are not part of the repository"
        )
    return folder


@pytest.fixture(scope="session")
def vit_tiny_weights(shared: Path) -> Path:
    """Real (supervised) ViT-Ti/16 weights."""
    return shared / "weights" / "vit_tiny_patch16_224_in1k_supervised.safetensors"
