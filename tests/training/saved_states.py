"""Checkpoints with a content that tells its epoch, and what lies in their folder."""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.storage import Location
from pipeline.training.checkpoints import INDEX_NAME, CheckpointStore, SavedState


def store_in(folder: Path | str, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(Location.parse(str(folder)), keep=keep)


def state_of(epoch: int, *, size: int = 1000) -> dict[str, Any]:
    """What only this epoch has."""
    return {"weights": torch.full((size,), float(epoch)), "epoch": epoch}


def assert_is(saved: SavedState | None, epoch: int, score: float | None) -> None:
    assert saved is not None
    assert (saved.epoch, saved.score, saved.state["epoch"]) == (epoch, score, epoch)
    assert saved.state["weights"].eq(epoch).all()


def epochs_on_disk(folder: Path) -> list[int]:
    return sorted(int(place.stem.split("_")[1]) for place in folder.glob("epoch_*.pt"))


def listed(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / INDEX_NAME).read_text())["checkpoints"]
    return found


def flip_a_byte(place: Path) -> None:
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)
