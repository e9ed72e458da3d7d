"""fit_head and labelling with its head as a user runs them, on scenes and the shipped network."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import FitHeadJob, LocalizationConfig
from pipeline.data.lake import Collection
from pipeline.data.pixels import load_pixels
from pipeline.labelling.labeller import ForwardPass, Provenance, PseudoBoxLabeller
from pipeline.labelling.rows import decoded_images
from pipeline.labelling.saved_head import read_head
from pipeline.localization.head import Head
from pipeline.localization.head_fit import CutImages, fit_head
from pipeline.localization.localize import localize
from pipeline.models.backbones import build_backbone, load_weights, with_recipe
from pipeline.scenes.scenes import write_collection
from pipeline.storage import Location
from tests.conftest import ROOT
from tests.jobs.conftest import NO_RAY, help_without_libraries, table_of
from tests.jobs.here import run_here

NANO = ("--backbone.name", "vit_nano_patch8.dino", "--decode.max-side", "160")
HERE = ("--compute.num-actors", "0")
QUIET = ("--tracking-uri", "off", "--progress-seconds", "0.2")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_collection(folder, num_scenes=40, seed=0)
    return folder / "images"


def fit(images: Path, output: Path, *flags: str, **environment: str) -> Any:
    known = ("--images", str(images), "--output", str(output), *NANO, *QUIET)
    return run_here(ROOT / "jobs" / "fit_head.py", *known, *flags, **environment)


def label(images: Path, output: Path, *flags: str, **environment: str) -> Any:
    known = ("--images", str(images), "--output", str(output), *NANO, *QUIET)
    rule = ("--localization.rule", "head")
    return run_here(ROOT / "jobs" / "label_images.py", *known, *rule, *flags, **environment)


def head_of(output: Path) -> Head:
    head, _ = read_head(Location.parse(str(output)))
    return head


def same(left: Head, right: Head) -> bool:
    return bool(
        np.allclose(left.weight_D, right.weight_D, rtol=1e-9, atol=1e-12)
        and abs(left.threshold - right.threshold) < 1e-9
        and left.share == right.share
    )


@pytest.fixture(scope="module")
def fitted(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head fitted in this process, where there is no Ray."""
    output = tmp_path_factory.mktemp("head") / "head"
    done = fit(scenes, output, *HERE, RAY_ADDRESS=NO_RAY)
    assert done.returncode == 0, done.stderr
    assert "fitted on 40 of 40 images" in done.stdout
    return output


def test_the_output_tells_how_it_was_made(fitted: Path) -> None:
    record = json.loads((fitted / "config.json").read_text())
    assert record["config"]["backbone.feature"] == "value"
    assert record["config"]["backbone.block"] == 3
    assert len(record["config"]["backbone.weights_sha256"]) == 64
    assert record["num_images"] == 40
    assert record["collection"]["num_images"] == 40
    assert len(record["changes"]) == 5
    assert {"torch", "patchseed"} <= record["versions"].keys()
    report = (fitted / "report.md").read_text()
    assert f"{record['auc']:.3f}" in report
    assert (fitted / "boxes.png").read_bytes()[:4] == b"\x89PNG"
    # What the fit needed no longer is there.
    assert not list(fitted.glob("_run/*/pass-0000"))


@pytest.mark.ray
def test_two_actors_one_actor_and_none_give_the_same_head(
    scenes: Path, fitted: Path, tmp_path: Path, ray_address: str
) -> None:
    for actors in ("1", "2"):
        output = tmp_path / actors
        done = fit(scenes, output, "--compute.num-actors", actors, RAY_ADDRESS=ray_address)
        assert done.returncode == 0, done.stderr
        assert same(head_of(output), head_of(fitted))


def test_plain_functions_of_a_notebook_give_the_same_head(scenes: Path, fitted: Path) -> None:
    job = FitHeadJob.model_validate(
        {
            "images": str(scenes),
            "output": "none",
            "backbone": {"name": "vit_nano_patch8.dino"},
            "decode": {"max_side": 160},
        }
    )
    backbone = with_recipe(job.backbone)
    labeller = PseudoBoxLabeller(
        build_backbone(
            backbone.name,
            load_weights(backbone.name, None),
            feature=backbone.feature,
            block=backbone.block,
        ),
        LocalizationConfig(),
        Provenance("", "", ""),
        forward=ForwardPass(backbone.normalize),
    )
    inputs = pa.concat_tables(list(Collection(str(scenes)).chunks())).sort_by("image_id")
    images = decoded_images(load_pixels(inputs, **dict(job.decode)))
    sample: list[CutImages] = []
    # The batches of the job, sixteen images a block: others would change a feature's last digits.
    for start in range(0, len(images), 16):
        block = images[start : start + 16]
        found: dict[int, CutImages] = {}
        for rows in labeller.batches(block):
            batch = [image for row in rows if (image := block[row]) is not None]
            tokens_BHWD = labeller.extract(batch).tokens_BHWD
            cut_BHW = localize(tokens_BHWD, rule="ncut").mask_BHW
            for place, row in enumerate(rows):
                one = slice(place, place + 1)
                found[row] = CutImages(tokens_BHWD[one], cut_BHW[one])
        sample += [found[row] for row in sorted(found)]
    assert same(fit_head(lambda: sample).head, head_of(fitted))


def test_a_killed_fit_goes_on_and_gives_the_same_head(
    scenes: Path, fitted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "head"
    flags = [*("--images", str(scenes), "--output", str(output)), *NANO, *QUIET, *HERE]
    command = [sys.executable, "jobs/fit_head.py", *flags, "--compute.block-size", "4"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(output.glob("_run/*/pass-0000/blocks/*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "config.json").exists()
    refused = fit(scenes, output, *HERE)
    assert refused.returncode == 5
    assert "--resume" in refused.stderr
    resumed = fit(scenes, output, *HERE, "--resume", "--compute.block-size", "4")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming:" in resumed.stdout
    # Its blocks are others, so its batches and the last digits of its features are.
    assert np.allclose(head_of(output).weight_D, head_of(fitted).weight_D, rtol=1e-2, atol=1e-4)
    whole = fit(scenes, tmp_path / "whole", *HERE, "--compute.block-size", "4")
    assert whole.returncode == 0
    assert same(head_of(output), head_of(tmp_path / "whole"))
    again = fit(scenes, output, *HERE, "--resume")
    assert again.returncode == 0, again.stderr


def some_of(scenes: Path, count: int, folder: Path) -> Path:
    folder.mkdir()
    for path in sorted(path for path in scenes.rglob("*") if path.is_file())[:count]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def boxes(output: Path) -> list[Any]:
    columns = ("uri", "status", "boxes", "scores", "contrast", "agreement", "method")
    rows: list[Any] = table_of(output).select(columns).to_pylist()
    return rows


def test_a_stored_head_gives_the_boxes_of_one_fitted_first_bit_for_bit(
    scenes: Path, fitted: Path, tmp_path: Path
) -> None:
    force = ("--localization.force-head", *HERE)
    own = label(scenes, tmp_path / "own", *force)
    assert own.returncode == 0, own.stderr
    assert same(head_of(tmp_path / "own" / "_head"), head_of(fitted))
    stored = label(scenes, tmp_path / "stored", "--localization.head", str(fitted), *force)
    assert stored.returncode == 0, stored.stderr
    assert boxes(tmp_path / "own") == boxes(tmp_path / "stored")
    assert {row["method"] for row in boxes(tmp_path / "own")} == {"head"}
    # A finished table is told again; a fresh run beside it is refused.
    assert label(scenes, tmp_path / "own", *force, "--resume").returncode == 0
    assert label(scenes, tmp_path / "own", *force).returncode == 5


def test_a_refused_head_leaves_the_boxes_to_the_cut_and_says_why(
    scenes: Path, tmp_path: Path
) -> None:
    few = some_of(scenes, 8, tmp_path / "few")
    done = label(few, tmp_path / "labels", *HERE)
    assert done.returncode == 0, done.stderr
    assert "the head is refused" in done.stderr
    assert "rests on 8 images" in done.stderr
    assert {row["method"] for row in boxes(tmp_path / "labels")} == {"ncut"}
    manifest = json.loads((tmp_path / "labels" / "_MANIFEST.json").read_text())
    assert "rests on 8 images" in manifest["config"]["localization.head_refused"]
    resumed = label(few, tmp_path / "labels", *HERE, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    forced = label(few, tmp_path / "labels", *HERE, "--localization.force-head", "--overwrite")
    assert forced.returncode == 0, forced.stderr
    assert {row["method"] for row in boxes(tmp_path / "labels")} == {"head"}


def test_of_one_image_no_head_can_be_fitted(scenes: Path, tmp_path: Path) -> None:
    one = some_of(scenes, 1, tmp_path / "one")
    done = fit(one, tmp_path / "head", *HERE)
    assert done.returncode == 3
    assert "no head can be fitted" in done.stderr
    done = label(one, tmp_path / "labels", *HERE)
    assert done.returncode == 0, done.stderr
    assert {row["method"] for row in boxes(tmp_path / "labels")} == {"ncut"}


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (("--backbone.block", "2"), 4, "fitted on other features: block 3 then, 2 now"),
        (("--backbone.feature", "key"), 4, "feature 'value' then, 'key' now"),
        (("--localization.rule", "ncut"), 2, "--localization.head needs --localization.rule head"),
    ],
)
def test_a_head_of_other_features_is_refused_before_an_image_is_read(
    fitted: Path, tmp_path: Path, flags: tuple[str, ...], code: int, told: str
) -> None:
    nowhere = tmp_path / "not-there"
    done = label(nowhere, tmp_path / "labels", "--localization.head", str(fitted), *flags)
    assert done.returncode == code
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


def test_files_of_others_in_the_output_are_never_touched(scenes: Path, tmp_path: Path) -> None:
    output = tmp_path / "head"
    output.mkdir()
    (output / "config.json").write_text("mine")
    for flags in ((), ("--overwrite",)):
        done = fit(scenes, output, *HERE, *flags)
        assert done.returncode == 5
        assert (output / "config.json").read_text() == "mine"


def test_help_loads_no_library() -> None:
    told = help_without_libraries(ROOT / "jobs" / "fit_head.py")
    assert "--num-images" in told
