"""A training run with Ray Train, with torchrun, or in this process: one run, three ways.

The driver holds the run's folder (lease.py) and tells; the workers train (classification/,
pretraining/, detection/) and rank 0 writes. Checkpoints are ours and not Ray's, so that all three
ways resume by the same code: a worker group that is restarted, and a driver that is started again,
both go on after the last whole epoch.

The doors of jobs/train_classifier.py and jobs/pretrain_dino.py stand at the end; the detector's,
which goes through rounds, is train_detector.py.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Empty
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table

from pipeline.classification.run import export_run
from pipeline.cluster.session import count, ray_session
from pipeline.config import PretrainDinoJob, TrainClassifierJob, TrainingJob
from pipeline.data.places import require_places, with_absolute_places
from pipeline.errors import ClusterError, ConfigError, PatchseedError, one_line
from pipeline.models.exported_backbone import WEIGHTS, write_backbone
from pipeline.progress import duration
from pipeline.runs.folder import RunFolder
from pipeline.runs.kinds import KINDS
from pipeline.runs.life import Outside, TrainHere
from pipeline.storage import Location
from pipeline.training.workers import current_workers

_POLL_SECONDS = 0.2
_WAITING_SECONDS = 20.0


def run_training(
    job: TrainingJob,
    finish: Callable[[RunFolder, dict[str, Any]], None],
    check: Callable[[], object] = lambda: None,
) -> int:
    """Train what ``job`` describes, or go on with it, and tell the results.

    Args:
        job: With absolute places: workers may be in other folders, and on other machines.
        finish: Told the results, once, on the driver.
        check: Raises what would stop each worker, before any is started.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; finished epochs are kept.
    """
    logging.basicConfig(level=logging.INFO if job.debug else logging.WARNING, format="%(message)s")
    folder, train_here = RunFolder.of(job), KINDS[job.kind].train_here()
    if "WORLD_SIZE" in os.environ:
        return _under_torchrun(job, folder, train_here, finish)
    with folder.held(job):
        say(f"run {folder.place}")
        if job.num_workers == 0:
            workers = current_workers(_device(job, local_rank=0))
            summary = train_here(job, folder, workers, Outside(tell=say))
        else:
            if folder.summary() is None:
                check()
            summary = _with_ray(job, folder, train_here)
        finish(folder, summary)
    return 0


def _under_torchrun(
    job: TrainingJob,
    folder: RunFolder,
    train_here: TrainHere,
    finish: Callable[[RunFolder, dict[str, Any]], None],
) -> int:
    """Train as one of the processes that torchrun started; rank 0 holds the folder."""
    from datetime import timedelta

    import torch.distributed as dist

    device = _device(job, local_rank=int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=job.timeout_s))
    workers = current_workers(device)
    try:
        if workers.is_first:
            with folder.held(job):
                say(f"run {folder.place}")
                workers.wait()
                finish(folder, train_here(job, folder, workers, Outside(tell=say)))
        else:
            workers.wait()
            train_here(job, folder, workers, Outside(tell=say))
    finally:
        dist.destroy_process_group()
    return 0


def _device(job: TrainingJob, *, local_rank: int) -> torch.device:
    if not job.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--use-gpu needs a CUDA device, and torch finds none on this machine")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _with_ray(job: TrainingJob, folder: RunFolder, train_here: TrainHere) -> dict[str, Any]:
    """Train in Ray Train's workers, restarted as often as the job allows."""
    with ray_session(debug=job.debug):
        _require_room(job)
        say(f"Ray Train is starting: --num-workers {job.num_workers}")
        with _lines_from_workers() as lines:
            return fit_with_workers(WorkerTask(job, folder, train_here, lines))


def _set_ray_defaults(job: TrainingJob) -> None:
    """Ray's own settings, where the environment does not have them; workers inherit them."""
    # Without it, ranks that wait for a report that never comes wait for ever.
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(job.timeout_s))
    # A worker's second report waits for the controller to have looked at the first.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def _require_room(job: TrainingJob) -> None:
    """Refuse more workers than the cluster can hold, instead of waiting for them for ever.

    Raises:
        ClusterError: there are too few cores or GPUs, and nobody said to wait for more.
    """
    if job.wait:
        return
    least = job.min_workers or job.num_workers
    for name, each in (("CPU", job.cpus_per_worker), ("GPU", int(job.use_gpu))):
        if each * least > count(name):
            raise ClusterError(
                f"{least} workers need {each * least} {name}s, the cluster has {count(name):g}; "
                "give fewer --num-workers, or --wait where an autoscaler brings nodes"
            )


@contextmanager
def _lines_from_workers() -> Iterator[Any]:
    """A queue whose lines, put by workers anywhere, are printed here at once.

    Until the first of them, it is told from time to time that there is none yet.
    """
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})
    stop = threading.Event()

    def print_lines() -> None:
        began = told = time.monotonic()
        heard = False
        while True:
            ended = stop.is_set()
            try:
                while True:
                    say(queue.get_nowait())
                    heard = True
            except Empty:
                if ended:
                    return
            now = time.monotonic()
            if not heard and now - told > _WAITING_SECONDS:
                told = now
                say(f"waiting for Ray's workers to start ({duration(now - began)})")
            stop.wait(_POLL_SECONDS)

    printer = threading.Thread(target=print_lines, name="lines-from-workers", daemon=True)
    printer.start()
    try:
        yield queue
    finally:
        stop.set()
        printer.join(timeout=10)
        queue.shutdown()


@dataclass(frozen=True)
class WorkerTask:
    """What each worker is told; it pickles."""

    job: TrainingJob
    folder: RunFolder
    train_here: TrainHere
    """The run on one worker; it pickles."""

    lines: Any


def fit_with_workers(task: WorkerTask, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train in Ray Train's workers, where there is a Ray already; the summary of the run.

    Raises:
        PatchseedError: as a worker left word of it, or ClusterError where Ray broke.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    job, folder = task.job, task.folder
    _set_ray_defaults(job)
    elastic = (job.min_workers, job.num_workers) if job.min_workers else job.num_workers
    # Ray keeps a little of its own for each attempt; it must not be taken for an earlier one's.
    name = f"ray-{uuid.uuid4().hex[:8]}"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"task": task},
        torch_config=TorchConfig(timeout_s=int(job.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=elastic,
            use_gpu=job.use_gpu,
            resources_per_worker={"CPU": job.cpus_per_worker, "GPU": int(job.use_gpu)},
        ),
        run_config=RunConfig(
            name=name,
            callbacks=list(callbacks),
            storage_path=str(folder.place),
            failure_config=FailureConfig(max_failures=job.max_failures, controller_failure_limit=1),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )
    try:
        trainer.fit()
    except Exception as fault:  # Ray wraps whatever happened in kinds of its own
        left = folder.fault()
        if left is not None:
            raise left from fault
        raise ClusterError(
            f"training ended inside Ray ({one_line(fault)}); the same command goes on after the "
            "last finished epoch, --debug shows the workers' logs"
        ) from fault
    finally:
        folder.place.child(name).delete()
    left, summary = folder.fault(), folder.summary()
    if left is not None:
        raise left
    if summary is None:
        raise ClusterError(f"the workers ended without results in {folder.place}")
    return summary


def _worker(config: dict[str, Any]) -> None:
    """One worker's life, in a process of Ray's."""
    from ray import train as ray_train
    from ray.train.torch import get_device

    task: WorkerTask = config["task"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _forward_warnings(task.lines)
    if task.folder.fault() is not None:
        # An attempt before this one found what no attempt can mend; the driver reads it.
        return
    device = get_device() if task.job.use_gpu else torch.device("cpu")
    if not task.job.use_gpu:
        torch.set_num_threads(task.job.cpus_per_worker)
    outside = Outside(tell=task.lines.put_nowait, report=lambda numbers: ray_train.report(numbers))
    try:
        task.train_here(task.job, task.folder, current_workers(device), outside)
    except PatchseedError as fault:
        # Written first: another attempt would meet it again, and the driver tells it as it is.
        task.folder.write_fault(fault)
        raise


class _ToDriver(logging.Handler):
    """Sends warnings of our own to the driver's terminal."""

    def __init__(self, put: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._put = put

    def emit(self, record: logging.LogRecord) -> None:
        self._put(record.getMessage())


def _forward_warnings(lines: Any) -> None:
    logging.getLogger("pipeline").addHandler(_ToDriver(lines.put_nowait))


def say(line: str) -> None:
    """A line on the driver's terminal, at once."""
    print(line, flush=True)  # noqa: T201


def train_classifier(job: TrainClassifierJob) -> int:
    """Train what ``job`` describes, or go on with it, and tell the results.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; finished epochs are kept.
    """
    job = with_absolute_places(job)

    def check() -> None:
        require_places(job, but=("data.root",) if job.data.download else ())

    def finish(folder: RunFolder, summary: dict[str, Any]) -> None:
        if job.export is not None:
            for line in export_run(folder, Location.parse(job.export), onnx=job.onnx):
                say(line)
        _tell_results(summary, folder)

    return run_training(job, finish, check)


def _tell_results(summary: dict[str, Any], folder: RunFolder) -> None:
    metrics = summary["metrics"]
    table = Table()
    table.add_column("accuracy")
    table.add_column("selected epoch", justify="right")
    table.add_column("last epoch", justify="right")
    for of, selected in (("val", "val/accuracy_best"), ("test", "test/accuracy_selected")):
        if selected in metrics:
            last = metrics[f"{of}/accuracy_last"]
            table.add_row(of, f"{metrics[selected]:.2%}", f"{last:.2%}")
    Console().print(table)
    say(f"epoch {metrics['selected_epoch']:.0f} was chosen on {summary['data']['selected_on']}")
    say(f"model    {folder.place.child('model')}")
    say(f"figures  {folder.place.child('figures')}")
    say("compare  python jobs/compare_runs.py --runs " + str(folder.place).rpartition("/")[0])


def pretrain_dino(job: PretrainDinoJob) -> int:
    """Train what ``job`` describes, or go on with it.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; finished epochs are kept.
    """
    job = with_absolute_places(job)

    def finish(folder: RunFolder, summary: dict[str, Any]) -> None:
        target = Location.parse(job.output)
        content = folder.place.child("model").child(WEIGHTS).read_bytes()
        state = safetensors.torch.load(content)
        write_backbone(state, target, name=job.model.name, made_by=summary, half=job.half)
        teacher = target.child(WEIGHTS)
        say(f"teacher  {teacher}")
        say(
            f"label    python jobs/label_images.py --backbone.checkpoint {teacher} "
            "--images ... --output ..."
        )

    return run_training(job, finish, partial(require_places, job))
