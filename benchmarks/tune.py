"""What a sweep costs beside its trials, and what features that are computed once save.

    python -m benchmarks.tune                                  # sample scenes, the shipped network
    python -m benchmarks.tune --images PHOTOS --ground-truth COCO.json \
        --name vit_tiny_patch16_224 --checkpoint VIT.safetensors --normalize half

Overhead: seconds from one trial's end to the next, of a function that does nothing, less the
function's own. Localization: one trial from the cache beside one that decodes and forwards again.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import torch
import tyro

from benchmarks.timing import best_seconds, print_table, write_json
from pipeline.cluster.session import ray_session
from pipeline.cluster.tune_trials import run_with_ray
from pipeline.config import LabelJob
from pipeline.config.tuning import TuneJob
from pipeline.data.lake import Collection
from pipeline.data.pixels import load_pixels
from pipeline.labelling.labeller import ForwardPass, PseudoBoxLabeller
from pipeline.labelling.rows import Provenance
from pipeline.models.backbones import build_backbone, load_weights, with_recipe
from pipeline.scenes.scenes import write_collection
from pipeline.storage import Location
from pipeline.tracking.tracker import NoTracker
from pipeline.tuning.feature_cache import FeatureCache
from pipeline.tuning.localization_sweep import Wanted, fill, measured
from pipeline.tuning.run_trial import TrialTask
from pipeline.tuning.space import space_of
from pipeline.tuning.sweep import Sweep, SweepTracking, run_here
from pipeline.tuning.trials import SweepFolder

NOTHING = """
from ray import tune
METRIC, MODE = "x", "max"
SPACE = {"x": tune.uniform(0.0, 1.0)}
def run(values, report):
    return values["x"]
"""


@dataclass(frozen=True)
class Settings:
    """What to measure on."""

    images: str | None = None
    ground_truth: str | None = None
    name: str = "vit_nano_patch8.dino"
    checkpoint: str | None = None
    normalize: Literal["imagenet", "half"] = "imagenet"
    num_images: int = 60
    max_side: int = 1024
    num_trials: int = 40
    """Of the empty function."""
    output: Path = Path("benchmarks/results/tune.json")


def main(settings: Settings) -> None:
    """Measure both, print and keep them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overhead = overheads(folder, settings.num_trials)
        seconds = localization_seconds(settings, folder)
    ratio = seconds["forwarded again"] / seconds["from the cache"]
    rows = [[way, f"{1000 * value:.1f}"] for way, value in overhead.items()]
    print_table("Overhead per trial", ["trials run", "ms"], rows)
    rows = [[way, f"{value:.2f}", f"{60 / value:.1f}"] for way, value in seconds.items()]
    title = f"A localization trial on {settings.num_images} images, {settings.name}"
    print_table(title, ["features", "s", "trials / min"], rows)
    print(f"the cache is {ratio:.1f} times as fast")
    result = {"overhead_s": overhead, "trial_s": seconds, "ratio": ratio}
    told = {name: str(value) for name, value in vars(settings).items()}
    write_json(settings.output, {**result, "settings": told, "threads": torch.get_num_threads()})


def overheads(folder: Path, num_trials: int) -> dict[str, float]:
    """Seconds per trial of a function that does nothing."""
    here, with_ray = (seconds_apart(folder, name, num_trials) for name in ("here", "ray"))
    return {"in this process": here, "with Ray Tune": with_ray}


def seconds_apart(folder: Path, name: str, num_trials: int) -> float:
    """Mean time between the ends of trials; the first one, which starts processes, is left out."""
    space = space_of(NOTHING, "nothing")
    job = TuneJob(space="nothing.py", num_samples=num_trials, tracking_uri="off", max_concurrent=1)
    place = Location.parse(str(folder / name))
    ends: list[float] = []
    record = SweepFolder(place)
    record.begin(job, space, {})
    sweep = Sweep(
        job,
        space,
        TrialTask(space.name, space.source, {}, str(place)),
        record,
        SweepTracking(job, space, place, NoTracker(), {}),
        tell=lambda line: ends.append(time.perf_counter()),
    )
    if name == "here":
        run_here(sweep)
    else:
        with ray_session():
            run_with_ray(sweep)
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def localization_seconds(settings: Settings, folder: Path) -> dict[str, float]:
    """One trial, from the cache and with its own forward pass."""
    images, truth = settings.images, settings.ground_truth
    if images is None or truth is None:
        truth = str(write_collection(folder / "scenes", num_scenes=settings.num_images, seed=0))
        images = str(folder / "scenes" / "images")
    job = LabelJob.model_validate(
        {
            "images": images,
            "output": "labels",
            "decode": {"max_side": settings.max_side},
            "backbone": {
                "name": settings.name,
                "checkpoint": settings.checkpoint,
                "normalize": settings.normalize,
            },
        }
    )
    wanted = Wanted(job, truth, settings.num_images, (("key", -1),), "fp16")
    cache = FeatureCache(Location.parse(str(folder / "features")))
    fill(cache, wanted, print)
    ways = {
        "from the cache": lambda: measured(cache.folder, job),
        "forwarded again": labeller_of(job, settings.num_images),
    }
    return best_seconds(ways, rounds=3)


def labeller_of(job: LabelJob, num_images: int) -> Callable[[], object]:
    """What a trial would do without a cache: read, decode, forward, find boxes."""
    weights = load_weights(job.backbone.name, job.backbone.checkpoint)
    network = build_backbone(job.backbone.name, weights)
    forward = ForwardPass(with_recipe(job.backbone).normalize)
    labeller = PseudoBoxLabeller(network, job.localization, Provenance("", "", ""), forward=forward)
    inputs = pa.concat_tables(list(Collection(job.images).chunks())).slice(0, num_images)
    size = job.compute.block_size

    def label() -> object:
        return [
            labeller(load_pixels(inputs.slice(start, size), **job.decode.model_dump()))
            for start in range(0, inputs.num_rows, size)
        ]

    return label


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
