"""The door of jobs/tune.py: a sweep from its settings to its results, with Ray Tune or without."""

import logging
from pathlib import Path

import torch
from rich.console import Console

from pipeline.cluster.session import ray_session
from pipeline.cluster.training import say
from pipeline.config import LabelJob
from pipeline.config.tuning import TuneJob
from pipeline.errors import AllTrialsFailed, ConfigError
from pipeline.lease import Lease
from pipeline.storage import Location
from pipeline.tracking.tracker import absolute_tracking_uri
from pipeline.tuning.feature_cache import FeatureCache
from pipeline.tuning.localization_sweep import Wanted, fill, sources_of
from pipeline.tuning.results import print_results, result_files
from pipeline.tuning.run_trial import TrialTask
from pipeline.tuning.space import Space, read_space
from pipeline.tuning.sweep import Sweep, open_tracking, run_here
from pipeline.tuning.trials import SweepFolder, best_of, sweep_name
from pipeline.tuning.tuned_job import Tree, base_of, best_yaml, settings_of


def tune(job: TuneJob) -> int:
    """Search what ``job`` describes, or go on with it, and tell the results.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; trials that have ended are kept.
    """
    logging.basicConfig(level=logging.INFO if job.debug else logging.WARNING, format="%(message)s")
    space = read_space(job.space)
    place = Location.parse(job.output).child(sweep_name(job, space))
    job = job.model_copy(update={"tracking_uri": absolute_tracking_uri(job.tracking_uri)})
    folder = SweepFolder(place)
    with folder.held() as lease:
        job, base = folder.settled(job, space)
        if base is None:
            base = base_of(job, space)
        folder.begin(job, space, base)
        say(f"sweep {place}")
        if folder.trials:
            say(f"going on after {len(folder.trials)} trials")
        _run(job, space, base, folder, lease)
    return 0


def _run(job: TuneJob, space: Space, base: Tree, folder: SweepFolder, lease: Lease) -> None:
    cache = _features(job, space, base, folder)
    task = TrialTask(
        space_name=space.name,
        space_source=space.source,
        base=base,
        folder=str(folder.place),
        use_gpu=job.trial_gpus > 0,
        cpus=job.trial_cpus if job.max_concurrent != 0 else None,
        num_workers=job.trial_workers,
        cache=None if cache is None else str(cache.folder),
    )
    tracking = open_tracking(job, space, base, folder.place, folder.trials)
    with tracking.parent:
        sweep = Sweep(job, space, task, folder, tracking, say, lease.check)
        if len(folder.trials) < sweep.num_trials:
            _try_all(sweep)
        _finish(sweep)
    if cache is not None and job.cache is None:
        cache.delete()


def _try_all(sweep: Sweep) -> None:
    if sweep.job.max_concurrent == 0:
        run_here(sweep)
        return
    from pipeline.cluster.tune_trials import run_with_ray

    # Ray gives the workers of a stopped trial back by way of its dashboard, and else never.
    with ray_session(debug=sweep.job.debug, dashboard=sweep.job.trial_workers > 1):
        run_with_ray(sweep)


def _features(job: TuneJob, space: Space, base: Tree, folder: SweepFolder) -> FeatureCache | None:
    """The features of a localization sweep, computed; None for other sweeps."""
    if space.job != "localization" or job.ground_truth is None:
        return None
    settings = settings_of(space, base, {})
    assert isinstance(settings, LabelJob)
    if job.cache is not None:
        place = Location.parse(str(Path(job.cache).expanduser()))
    else:
        place = folder.place.child("features")
    cache = FeatureCache(place)
    wanted = Wanted(
        job=settings,
        ground_truth=str(Location.parse(job.ground_truth)),
        num_images=job.num_images,
        sources=sources_of(space, settings),
        precision=job.cache_precision,
        device=_device(job),
    )
    fill(cache, wanted, say)
    return cache


def _device(job: TuneJob) -> str:
    if not job.trial_gpus:
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError("--trial-gpus needs a CUDA device, and torch finds none on this machine")
    return "cuda"


def _finish(sweep: Sweep) -> None:
    """Write, send and tell what the sweep came to.

    Raises:
        AllTrialsFailed: no trial came to its end.
    """
    space, trials, base = sweep.space, sweep.folder.trials, sweep.task.base
    files = result_files(space, base, trials)
    for name, content in files.items():
        sweep.folder.place.child(name).write_bytes(content)
    print_results(space, trials, Console())
    best = best_of(space, trials)
    statuses = ("ok", "stopped", "failed")
    counts = {f"trials/{name}": sum(one.status == name for one in trials) for name in statuses}
    found = {} if best is None else {f"best/{space.metric}": best.metric or 0.0}
    sweep.tracking.sweep_ended({**counts, **found}, files)
    if best is None:
        reasons = dict.fromkeys(one.reason or one.status for one in trials)
        raise AllTrialsFailed(
            f"none of {len(trials)} trials came to its end: {'; '.join(list(reasons)[:3])}"
        )
    _, command = best_yaml(space, base, best.values)
    say(f"best     {sweep.folder.place.child('best.yaml')}")
    if command:
        say(f"use      {command}")
    say(f"all      {sweep.folder.place.child('table.md')}, trials.csv, pictures/")
