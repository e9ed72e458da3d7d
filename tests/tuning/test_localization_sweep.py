"""A trial on cached features finds the labelling job's boxes, and measures as evaluation does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.config import LabelJob
from pipeline.data.lake import Collection
from pipeline.data.pixels import load_pixels
from pipeline.errors import DataError, StorageError
from pipeline.evaluation.one_box import measure_labels
from pipeline.labelling.labeller import ForwardPass, Provenance, PseudoBoxLabeller
from pipeline.models.backbones import build_backbone, load_weights, with_recipe
from pipeline.scenes.scenes import write_collection
from pipeline.storage import Location
from pipeline.tuning import feature_cache
from pipeline.tuning.feature_cache import FeatureCache, ManyFeatures, Source
from pipeline.tuning.localization_sweep import Wanted, fill, measured
from tests.tables import write_table

NANO = "vit_nano_patch8.dino"
SOURCES: tuple[Source, ...] = (("key", -1), ("value", -1), ("value", 2), ("query", 0))
METHODS: list[dict[str, Any]] = [
    {"rule": "lost", "num_candidates": 25},
    {"rule": "solost", "keep_fraction": 0.4, "similarity": "pearson"},
    {"rule": "lost", "similarity": "cosine"},
    {"rule": "ncut", "cut_threshold": 0.3},
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of several sizes; one image cannot be decoded, and one annotated one is not there."""
    folder = tmp_path_factory.mktemp("sample") / "scenes"
    truth = write_collection(folder, num_scenes=14, seed=3)
    names = [one["file_name"] for one in json.loads(truth.read_text())["images"]]
    (folder / "images" / names[2]).write_bytes(b"no image at all")
    (folder / "images" / names[5]).unlink()
    return folder


def job_for(scenes: Path, source: Source = ("key", -1), **method: Any) -> LabelJob:
    return LabelJob.model_validate(
        {
            "images": str(scenes / "images"),
            "output": "labels",
            "backbone": {"name": NANO, "feature": source[0], "block": source[1]},
            # Smaller than the scenes: boxes must find back to original pixels.
            "decode": {"max_side": 150},
            "compute": {"block_size": 5, "batch_size": 3},
            "localization": method,
        }
    )


def wanted(scenes: Path, **fields: Any) -> Wanted:
    known: dict[str, Any] = {
        "job": job_for(scenes),
        "ground_truth": str(scenes / "instances.json"),
        "num_images": None,
        "sources": SOURCES,
        "precision": "fp32",
    }
    return Wanted(**{**known, **fields})


@pytest.fixture(scope="module")
def cache(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    found = FeatureCache(Location.parse(str(tmp_path_factory.mktemp("cache") / "features")))
    fill(found, wanted(scenes), lambda line: None)
    return found


def labelled_and_evaluated(scenes: Path, job: LabelJob, folder: Path) -> Any:
    """The labelling job's rows, block by block, as a table, and what evaluation says of it."""
    chosen = with_recipe(job.backbone)
    network = build_backbone(
        NANO, load_weights(NANO, None), feature=chosen.feature, block=chosen.block
    )
    forward = ForwardPass(batch_size=job.compute.batch_size)
    labeller = PseudoBoxLabeller(
        network, job.localization, Provenance("r", "c", "w"), forward=forward
    )
    inputs = pa.concat_tables(list(Collection(job.images).chunks()))
    size = job.compute.block_size
    parts = [
        labeller(load_pixels(inputs.slice(start, size), **job.decode.model_dump())).to_pylist()
        for start in range(0, inputs.num_rows, size)
    ]
    write_table(folder, *parts)
    return measure_labels(
        str(folder),
        str(scenes / "instances.json"),
        ignore_difficult=False,
        num_resamples=100,
        seed=0,
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("number", range(len(METHODS)))
def test_a_trial_on_a_cache_of_fp32_has_exactly_the_numbers_of_labelling_and_evaluating(
    scenes: Path, cache: FeatureCache, tmp_path: Path, source: Source, number: int
) -> None:
    job = job_for(scenes, source, **METHODS[number])
    evaluation = labelled_and_evaluated(scenes, job, tmp_path / "table")
    numbers = measured(cache.folder, job)
    # One image is missing and one cannot be read: both count.
    assert evaluation.num_images == 14
    assert numbers["corloc"] == evaluation.labels.hits / evaluation.num_images
    # The same IoUs, added up in another order.
    assert numbers["mean_best_iou"] == pytest.approx(evaluation.labels.mean_best_iou, rel=1e-12)


def test_the_trials_differ_so_that_equality_means_something(
    scenes: Path, cache: FeatureCache
) -> None:
    found = {
        measured(cache.folder, job_for(scenes, source, **method))["mean_best_iou"]
        for source in SOURCES
        for method in METHODS
    }
    assert len(found) > 6


@pytest.mark.parametrize("sources", [SOURCES, (("value", 2), ("key", 2)), (("key", 0),)])
def test_one_pass_gives_each_feature_as_a_pass_of_its_own(sources: tuple[Source, ...]) -> None:
    weights = load_weights(NANO, None)
    many = ManyFeatures(NANO, weights, sources)
    images_B3HW = torch.randn(2, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    found = many(images_B3HW)
    for feature, block in sources:
        alone: Any = build_backbone(NANO, weights, feature=feature, block=block)  # type: ignore[arg-type]
        with torch.inference_mode():
            expected = alone(images_B3HW).tokens_BHWD
        assert torch.equal(found[feature, block], expected)


def test_images_are_forwarded_once_whatever_the_number_of_features_and_of_sweeps(
    scenes: Path, cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = ManyFeatures.__call__

    def counted(self: ManyFeatures, images_B3HW: torch.Tensor) -> Any:
        # But for the one patch that tells how many channels there are.
        seen.append(len(images_B3HW) if images_B3HW.shape[-1] > 8 else 0)
        return forward(self, images_B3HW)

    monkeypatch.setattr(ManyFeatures, "__call__", counted)
    other = FeatureCache(Location.parse(str(tmp_path / "features")))
    fill(other, wanted(scenes), lambda line: None)
    assert sum(seen) == 12
    # A second sweep on the same cache, and one that asks for less.
    fill(other, wanted(scenes), lambda line: None)
    fill(other, wanted(scenes, sources=SOURCES[:1]), lambda line: None)
    assert sum(seen) == 12
    fill(other, wanted(scenes, num_images=3), lambda line: None)
    assert sum(seen) in (14, 15)


def test_half_precision_takes_half_the_room_and_nearly_the_same_boxes(
    scenes: Path, cache: FeatureCache, tmp_path: Path
) -> None:
    half = FeatureCache(Location.parse(str(tmp_path / "features")))
    told: list[str] = []
    fill(half, wanted(scenes, precision="fp16"), told.append)
    assert "features of 12 images: 4 x " in told[0]

    def size(one: FeatureCache) -> int:
        return sum(path.stat().st_size for path in Path(one.folder.path).glob("*-*/*"))

    assert size(half) == pytest.approx(size(cache) / 2, rel=0.02)
    job = job_for(scenes, **METHODS[0])
    pair = [measured(one.folder, job)["mean_best_iou"] for one in (half, cache)]
    assert abs(pair[0] - pair[1]) < 0.05


def test_a_cache_that_does_not_fit_the_disk_is_refused_before_it_begins(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "_SPARE", 2**60)
    place = tmp_path / "features"
    with pytest.raises(StorageError, match="GiB free: take fewer --num-images"):
        fill(FeatureCache(Location.parse(str(place))), wanted(scenes), lambda line: None)
    assert not place.exists()


def test_half_a_cache_is_none(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = FeatureCache(Location.parse(str(tmp_path / "features")))
    monkeypatch.setattr(FeatureCache, "finish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fill(broken, wanted(scenes), lambda line: None)
    with pytest.raises(DataError, match="no whole cache"):
        measured(broken.folder, job_for(scenes))
    monkeypatch.undo()
    fill(broken, wanted(scenes), lambda line: None)
    assert np.isfinite(measured(broken.folder, job_for(scenes))["corloc"])


def test_a_trial_of_a_head_fits_one_on_the_cached_images_or_takes_the_cut(
    scenes: Path, cache: FeatureCache
) -> None:
    cut = measured(cache.folder, job_for(scenes, ("value", 2), rule="ncut"))
    # Thirteen images are too few for a head that is trusted.
    assert measured(cache.folder, job_for(scenes, ("value", 2), rule="head")) == cut
    forced = measured(cache.folder, job_for(scenes, ("value", 2), rule="head", force_head=True))
    assert forced != cut
