"""What an image costs a bulk job in Ray, its start-up taken off."""

import time
from collections.abc import Iterable
from tempfile import TemporaryDirectory

import pyarrow as pa

from pipeline.cluster.label_blocks import label_blocks
from pipeline.config import ComputeConfig, ImagesConfig
from pipeline.data.lake import INPUT_SCHEMA
from pipeline.labelling.block_tasks import LabelPlan, Recipe
from pipeline.labelling.rows import Provenance
from pipeline.labelling.run import LabelPass
from pipeline.storage import Location


def repeated_inputs(chunks: Iterable[pa.Table], num_images: int) -> pa.Table:
    """So many inputs: the same ones over again, each read and decoded anew."""
    table = pa.concat_tables(list(chunks))
    return table.take([row % table.num_rows for row in range(num_images)]).cast(INPUT_SCHEMA)


def ray_seconds_per_image(
    recipe: Recipe,
    inputs: pa.Table,
    provenance: Provenance,
    decode: ImagesConfig,
    compute: ComputeConfig,
) -> float:
    """Time per image of the job between the first finished block of each actor and the last.

    Raises:
        RuntimeError: there are no more blocks than actors.
    """
    with TemporaryDirectory() as folder:
        label_pass = LabelPass(Location.parse(folder), {})
        label_pass.freeze_inputs(iter([inputs]), block_size=compute.block_size)
        plan = LabelPlan(label_pass, recipe, provenance, decode, compute)
        moments = [
            (time.perf_counter(), receipt.rows)
            for receipt in label_blocks(plan, list(range(len(label_pass.sizes()))))
        ]
    # The first block of every actor still carries its start-up.
    started = compute.num_actors or 1
    if len(moments) <= started:
        raise RuntimeError(f"{started} actors need more than {len(moments)} blocks")
    seconds = moments[-1][0] - moments[started - 1][0]
    return seconds / sum(rows for _, rows in moments[started:])
