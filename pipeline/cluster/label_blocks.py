"""Label a collection on Ray Data: blocks of inputs -> pixels (CPU) -> boxes (actors) -> Parquet.

What an actor does to a block of pixels is its recipe (``PseudoBoxes`` of labelling/labeller.py,
``DetectedBoxes`` of detection/labeller.py), and nothing here knows it; the same plan without Ray
is labelling/work_through.py. Another way to label is
another recipe, beside its labeller, and a door like detect_images.py.

Every block goes through whole: one task reads and decodes it, one actor call labels it, one task
puts its rows on disk and returns a receipt. The driver sees receipts only, so its memory does not
grow with the collection. What exactly-once means, and why a kill costs at most the blocks in
flight, is told in labelling/run.py.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import ray
import torch

from pipeline.cluster.session import count, ray_session
from pipeline.config import ComputeConfig
from pipeline.errors import ClusterError, one_line
from pipeline.labelling.block_tasks import (
    CommitBlock,
    LabelPlan,
    LoadBlock,
    Receipt,
    Recipe,
    receipts_of,
)
from pipeline.labelling.rows import Provenance
from pipeline.storage import Location

# Without GPUs actors and decoding share the cores. An actor reserves less than the cores it works
# on, so that reading, decoding and writing always find a slot beside a full set of actors.
_CPU_SHARE_OF_ACTOR = 0.75
_CPU_SHARE_OF_LOADING = 0.25
_CPU_SHARE_OF_COMMIT = 0.125

_LOG = logging.getLogger("pipeline.label_blocks")


@dataclass(frozen=True)
class Placement:
    """How many actors there are and what each of them, and each loading task, reserves."""

    num_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    cpus_per_load: float
    threads: int


def place_actors(compute: ComputeConfig, *, cpus: float, gpus: float) -> Placement:
    """Actors for a cluster with these resources.

    Raises:
        ClusterError: the cluster has no room for the actors asked for, and ``compute.wait`` is off.
    """
    gpu_share = (1.0 if gpus else 0.0) if compute.gpus_per_actor is None else compute.gpus_per_actor
    if gpu_share > 0:
        actors = compute.num_actors or max(1, int(gpus // gpu_share))
        if actors * gpu_share > gpus and not compute.wait:
            raise ClusterError(
                f"{actors} actors with {gpu_share:g} GPU each need {actors * gpu_share:g} GPUs, "
                f"the cluster has {gpus:g}: lower --compute.num-actors, or --compute.wait for nodes"
            )
        return Placement(actors, gpu_share, 0.0, 1.0, 1)
    threads = compute.cpus_per_actor
    actors = compute.num_actors or max(1, int(cpus // threads))
    reserved = actors * threads * _CPU_SHARE_OF_ACTOR + _CPU_SHARE_OF_LOADING
    if reserved > cpus and not compute.wait:
        raise ClusterError(
            f"{actors} actors with {threads} cores each do not fit on {cpus:g} cores: lower "
            "--compute.num-actors or --compute.cpus-per-actor, or --compute.wait for nodes"
        )
    return Placement(actors, 0.0, threads * _CPU_SHARE_OF_ACTOR, _CPU_SHARE_OF_LOADING, threads)


class _LabelBlock:
    """Actor: a labeller, whose recipe comes once a node, through the object store."""

    def __init__(
        self, recipe: "ray.ObjectRef[Recipe]", provenance: Provenance, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
        self.labeller = ray.get(recipe)(provenance, device)

    def __call__(self, pixels: pa.Table) -> pa.Table:
        rows = self.labeller(pixels.drop_columns("block"))
        return rows.append_column("block", pixels["block"])


def label_blocks(plan: LabelPlan, blocks: list[int], *, debug: bool = False) -> Iterator[Receipt]:
    """Label these blocks of the pass on Ray; a receipt for each, as they get done.

    Raises:
        ClusterError: there is no Ray to work on, or the work died inside it. Finished blocks stay.
        StorageError: a block could not be put on disk.
    """
    with ray_session(debug=debug):
        _quieten(debug)
        _warn_of_private_disks(plan.label_pass.folder)
        placement = place_actors(plan.compute, cpus=count("CPU"), gpus=count("GPU"))
        try:
            for batch in _dataset(plan, blocks, placement).iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                yield from receipts_of(batch)
        except ray.exceptions.RayError as fault:
            # Ray's text is a traceback whose last line says what happened.
            reason = one_line(str(fault).strip().rpartition("\n")[2])
            raise ClusterError(
                f"the labelling work died ({reason}). Finished blocks are kept: go on with "
                "--resume; --debug shows more"
            ) from fault


def _warn_of_private_disks(folder: Location) -> None:
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and folder.is_local:
        _LOG.warning("%d nodes will write to %s: it must be a disk they share", nodes, folder)


def _dataset(plan: LabelPlan, blocks: list[int], placement: Placement) -> "ray.data.Dataset":
    recipe = ray.put(plan.recipe)
    return (
        ray.data.from_items(blocks, override_num_blocks=len(blocks))
        .map_batches(
            LoadBlock(plan.label_pass, plan.decode).__call__,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=placement.cpus_per_load,
        )
        .map_batches(
            _LabelBlock,
            fn_constructor_args=(recipe, plan.provenance, placement.threads),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=placement.cpus_per_actor,
            num_gpus=placement.gpus_per_actor or None,
            compute=ray.data.ActorPoolStrategy(size=min(placement.num_actors, len(blocks))),
        )
        .map_batches(
            CommitBlock(plan.label_pass).__call__,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=_CPU_SHARE_OF_COMMIT,
        )
    )


def _quieten(debug: bool) -> None:
    context = ray.data.DataContext.get_current()
    if not debug:
        # After the line above, which imports ray.data, which sets its own levels.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context.enable_progress_bars = debug
    context.print_on_execution_start = debug
    # A block is a unit of work here and must come out of each stage in one piece.
    context.target_max_block_size = None
