"""DINO runs that cannot be: one line, the right exit code, and nothing left behind."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.jobs import training


@dataclass(frozen=True)
class Refusal:
    """A command that must not train: what is wrong with it, its exit code, a part of its line."""

    images: str
    flags: tuple[str, ...]
    code: int
    told: str


REFUSALS = {
    "no images": Refusal("empty", (), 3, "DataError: no images in"),
    "corrupt images": Refusal(
        "corrupt", (), 3, "DataError: at least one image must be readable, none of 18 is"
    ),
    "a network with registers": Refusal(
        *("photos", ("--model.name", "vit_small_patch14_reg4_dinov2"), 2),
        told="ConfigError: model.name must be a ViT with a class token",
    ),
    "half a probe": Refusal(
        "photos", ("--probe.images", "photos"), 2, "--probe.images and --probe.ground-truth belong"
    ),
    "damaged weights": Refusal(
        "photos", ("--init", "{bad}/damaged.safetensors"), 4, "damaged.safetensors cannot be read"
    ),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what no run can use, and of photos that one can."""
    folder = tmp_path_factory.mktemp("bad")
    photos = training.write_shapes(folder / "photos", 18)
    for name in ("empty", "corrupt"):
        (folder / name).mkdir()
    (folder / "empty" / "notes.txt").write_text("no image")
    for path in photos.iterdir():
        (folder / "corrupt" / path.name).write_bytes(path.read_bytes()[:300])
    (folder / "damaged.safetensors").write_bytes(b"\x08\xff" * 1000)
    return folder


@pytest.mark.parametrize("case", REFUSALS)
def test_a_run_that_cannot_be_is_refused_in_one_line_and_leaves_no_folder(
    bad: Path, tmp_path: Path, case: str
) -> None:
    refusal, output = REFUSALS[case], tmp_path / "runs"
    flags = [flag.format(bad=bad) for flag in refusal.flags]
    done = training.here(training.pretraining(bad / refusal.images, output, *flags))
    assert done.returncode == refusal.code, done.stderr
    (line,) = done.stderr.splitlines()
    assert refusal.told in line
    assert list(output.glob("*")) == []
