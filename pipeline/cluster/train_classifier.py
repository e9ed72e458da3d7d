"""Training a classifier with Ray Train, with torchrun, or in this process: one run, three ways.

The driver holds the run's folder (lease.py) and tells; the workers train (pretraining/) and rank 0
writes. Checkpoints are ours and not Ray's, so that all three ways resume by the same code: a worker
group that is restarted, and a driver that is started again, both go on after the last whole epoch.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pipeline.cluster.session import count, ray_session
from pipeline.config import TrainClassifierJob
from pipeline.errors import ClusterError, ConfigError, PatchseedError
from pipeline.pretraining.export_run import export_run
from pipeline.pretraining.run_folder import RunFolder
from pipeline.progress import duration
from pipeline.storage import Location, one_line
from pipeline.tracking import OFF, absolute_uri
from pipeline.training.workers import current_workers

_LOG = logging.getLogger("pipeline.train_classifier")
_POLL_SECONDS = 0.2
_WAITING_SECONDS = 20.0


def train_classifier(job: TrainClassifierJob) -> int:
    """Train what ``job`` describes, or go on with it, and tell the results.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; finished epochs are kept.
    """
    logging.basicConfig(level=logging.INFO if job.debug else logging.WARNING, format="%(message)s")
    job = _with_absolute_places(job)
    folder = RunFolder.of(job)
    if "WORLD_SIZE" in os.environ:
        return _under_torchrun(job, folder)
    with folder.held(job):
        _say(f"run {folder.place}")
        if job.num_workers == 0:
            summary = _here(job, folder, _device(job, local_rank=0))
        else:
            summary = _with_ray(job, folder)
        _finish(job, folder, summary)
    return 0


def _with_absolute_places(job: TrainClassifierJob) -> TrainClassifierJob:
    """The job as workers in other folders, and on other machines, understand it."""
    root = str(Location.parse(job.data.root))
    uri = job.tracking_uri if job.tracking_uri == OFF else absolute_uri(job.tracking_uri)
    model = job.model
    if model.checkpoint is not None:
        model = model.model_copy(update={"checkpoint": os.path.abspath(model.checkpoint)})
    return job.model_copy(
        update={
            "output": str(Location.parse(job.output)),
            "tracking_uri": uri,
            "data": job.data.model_copy(update={"root": root}),
            "model": model,
        }
    )


def _here(job: TrainClassifierJob, folder: RunFolder, device: torch.device) -> dict[str, Any]:
    from pipeline.pretraining.classifier_run import Outside, train_classifier_here

    return train_classifier_here(job, folder, current_workers(device), Outside(tell=_say))


def _under_torchrun(job: TrainClassifierJob, folder: RunFolder) -> int:
    """Train as one of the processes that torchrun started; rank 0 holds the folder."""
    from datetime import timedelta

    import torch.distributed as dist

    device = _device(job, local_rank=int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=job.timeout_s))
    try:
        if dist.get_rank() == 0:
            with folder.held(job):
                _say(f"run {folder.place}")
                dist.barrier()
                _finish(job, folder, _here(job, folder, device))
        else:
            dist.barrier()
            _here(job, folder, device)
    finally:
        dist.destroy_process_group()
    return 0


def _device(job: TrainClassifierJob, *, local_rank: int) -> torch.device:
    if not job.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--use-gpu needs a CUDA device, and torch finds none on this machine")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _with_ray(job: TrainClassifierJob, folder: RunFolder) -> dict[str, Any]:
    """Train in Ray Train's workers, restarted as often as the job allows."""
    _set_ray_defaults(job)
    with ray_session(debug=job.debug):
        _require_room(job)
        _say(f"Ray Train is starting: --num-workers {job.num_workers}")
        with _lines_from_workers() as lines:
            return _fit(job, folder, lines)


def _set_ray_defaults(job: TrainClassifierJob) -> None:
    """Ray's own settings, where the environment does not have them; workers inherit them."""
    # Without it, ranks that wait for a report that never comes wait for ever.
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(job.timeout_s))
    # A worker's second report waits for the controller to have looked at the first.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def _require_room(job: TrainClassifierJob) -> None:
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
                    _say(queue.get_nowait())
                    heard = True
            except Empty:
                if ended:
                    return
            now = time.monotonic()
            if not heard and now - told > _WAITING_SECONDS:
                told = now
                _say(f"waiting for Ray's workers to start ({duration(now - began)})")
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
class _WorkerTask:
    """What each worker is told; it pickles."""

    job: TrainClassifierJob
    folder: RunFolder
    lines: Any


def _fit(job: TrainClassifierJob, folder: RunFolder, lines: Any) -> dict[str, Any]:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    elastic = (job.min_workers, job.num_workers) if job.min_workers else job.num_workers
    # Ray keeps a little of its own for each attempt; it must not be taken for an earlier one's.
    name = f"ray-{uuid.uuid4().hex[:8]}"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"task": _WorkerTask(job, folder, lines)},
        torch_config=TorchConfig(timeout_s=int(job.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=elastic,
            use_gpu=job.use_gpu,
            resources_per_worker={"CPU": job.cpus_per_worker, "GPU": int(job.use_gpu)},
        ),
        run_config=RunConfig(
            name=name,
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

    from pipeline.pretraining.classifier_run import Outside, train_classifier_here

    task: _WorkerTask = config["task"]
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
        train_classifier_here(task.job, task.folder, current_workers(device), outside)
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


def _finish(job: TrainClassifierJob, folder: RunFolder, summary: dict[str, Any]) -> None:
    if job.export is not None:
        for line in export_run(folder, Location.parse(job.export), onnx=job.onnx):
            _say(line)
    _tell_results(summary, folder)


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
    _say(f"epoch {metrics['selected_epoch']:.0f} was chosen on {summary['data']['selected_on']}")
    _say(f"model    {folder.place.child('model')}")
    _say(f"figures  {folder.place.child('figures')}")
    _say("compare  python jobs/compare_runs.py --runs " + str(folder.place).rpartition("/")[0])


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201
